"""Latency of the three stages of an engine, warm, by wall clock and by device events.

    python benchmarks/stage_latency.py --preset pi05 --device cuda --precision bf16

Two cameras of three and a prompt of 40 tokens. Hash weights: they time, they certify nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from turbopi import ModelInput, PrefixCache, preset
from turbopi.audit.golden import hash_model
from turbopi.bench import summary, write_receipt
from turbopi.engine import create_engine, precision_dtype

T = TypeVar("T")
STAGES = ("encode_images", "prefill", "denoise", "tick")


@dataclass(frozen=True)
class Options:
    """What to time."""

    preset: str = "pi05-small"
    """Sizes of the model."""
    engine: str = "eager"
    """Way to run the stages."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the weights."""
    device: str = "cpu"
    """Where."""
    horizon: int = 10
    """Actions per chunk."""
    prompt_tokens: int = 40
    """Valid prompt tokens."""
    steps: int = 10
    """Flow-matching evaluations."""
    warmup: int = 3
    """Untimed ticks."""
    repeats: int = 30
    """Timed ticks."""
    threads: int = 2
    """CPU threads."""
    out: Path | None = None
    """The receipt; the default name says what was timed."""


class Clock:
    """Wall clock and, on a GPU, device events around one call."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.wall: list[float] = []
        self.events: list[float] = []

    def time(self, call: Callable[[], T]) -> T:
        """Run and record; the device is idle before and after."""
        if not self.cuda:
            start = time.perf_counter()
            result = call()
            self.wall.append(1e3 * (time.perf_counter() - start))
            return result
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start = time.perf_counter()
        begin.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        self.wall.append(1e3 * (time.perf_counter() - start))
        self.events.append(begin.elapsed_time(end))
        return result

    def results(self) -> dict[str, object]:
        """Both clocks' summaries."""
        return {"wall": summary(self.wall)} | ({"device": summary(self.events)} if self.cuda else {})


def main() -> None:
    """Time, print, write the receipt."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    config = dataclasses.replace(preset(options.preset), horizon=options.horizon)
    model = hash_model(config, 7, precision_dtype(options.precision), options.device)
    engine = create_engine(options.engine, model, options.precision)
    inputs, noise = observation(config.vision.image_size, config.cameras, options)
    inputs, noise = inputs.to(engine.device), noise.to(engine.device)

    def encode() -> Tensor:
        return engine.encode_images(inputs.images, inputs.image_mask)

    def prefill(tokens: Tensor) -> PrefixCache:
        return engine.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)

    clocks = {stage: Clock(engine.device) for stage in STAGES}
    for repeat in range(options.warmup + options.repeats):
        if repeat == options.warmup:
            clocks = {stage: Clock(engine.device) for stage in STAGES}
        tokens = clocks["encode_images"].time(encode)
        cache = clocks["prefill"].time(lambda t=tokens: prefill(t))
        clocks["denoise"].time(lambda c=cache: engine.denoise(c, inputs.state, noise, options.steps))
        clocks["tick"].time(lambda: engine.denoise(prefill(encode()), inputs.state, noise, options.steps))
    results = {stage: clock.results() for stage, clock in clocks.items()}
    table = Table("stage", "median ms", "p99 ms", title=f"{options.preset}, {options.engine}, {options.precision}")
    for stage, result in results.items():
        table.add_row(stage, f"{result['wall']['median_ms']:.2f}", f"{result['wall']['p99_ms']:.2f}")
    Console().print(table)
    name = f"latency_{options.preset}_{options.engine}_{options.precision}_{engine.device.type}.json"
    out = options.out or Path(__file__).parent / "results" / name
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    write_receipt(out, "stage latency, hash weights", results, settings | {"model": config.to_dict()})


def observation(size: int, cameras: int, options: Options) -> tuple[ModelInput, Tensor]:
    """Two cameras present, `prompt_tokens` valid tokens, on the CPU; and noise."""
    g = torch.Generator().manual_seed(0)
    inputs = ModelInput(
        images=torch.rand(1, cameras, 3, size, size, generator=g) * 2 - 1,
        image_mask=torch.arange(cameras)[None] < 2,
        tokens=torch.randint(3, 1000, (1, options.prompt_tokens), generator=g),
        token_mask=torch.ones(1, options.prompt_tokens, dtype=torch.bool),
        state=torch.zeros(1, 32),
    )
    return inputs, torch.randn(1, options.horizon, 32, generator=g)


if __name__ == "__main__":
    main()
