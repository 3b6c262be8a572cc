"""What deciding costs: host time of the runtime's decision at every tick, on frames of the real size.

    python benchmarks/runtime_decision.py

Two cameras of 224 px as uint8, a prompt of 60 tokens of which 30 spell the state. The model is tiny: its time does not
count. "decide" is the decision alone, "with frames" also prepares and compares the observation. The receipt is
benchmarks/results/runtime_decision.json.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from turbopi import ModelInput, RuntimeConfig, preset
from turbopi.audit.golden import hash_model
from turbopi.bench import summary, write_receipt
from turbopi.config import ModelConfig
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo.ops import twin_ops
from turbopi.runtime import ChunkingConfig, DeadlineConfig, PhaseGate, ReuseConfig, Runtime, SimilarityGate
from turbopi.runtime.reuse import decide

TEXT, TOKENS = 30, 60
CASES: dict[str, RuntimeConfig] = {
    "everything at every tick": RuntimeConfig(1),
    "fixed frequency": RuntimeConfig(1, reuse=ReuseConfig(every=3)),
    "fixed frequency, phase gate": RuntimeConfig(1, reuse=ReuseConfig(every=3, phase=PhaseGate(curvature=0.1))),
    "fixed frequency, deadline": RuntimeConfig(
        2,
        reuse=ReuseConfig(every=3),
        deadline=DeadlineConfig(1e6, 1e6, fewer_steps=(1,), reuse_every=4),
        chunking=ChunkingConfig(),
    ),
    "state gate": RuntimeConfig(1, reuse=ReuseConfig(gate=SimilarityGate(0.99, "state"))),
    "image gate": RuntimeConfig(1, reuse=ReuseConfig(gate=SimilarityGate(0.99, "images"))),
}


@dataclass(frozen=True)
class Options:
    """How long to measure."""

    ticks: int = 2000
    """Of each case."""
    out: Path = Path(__file__).parent / "results" / "runtime_decision.json"
    """The receipt."""


def main() -> None:
    """Measure every case, write the receipt, show the table."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    config = preset("pi05-tiny")
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=224))
    engine = TurboEngine(hash_model(config, 7, torch.float32), "fp32", twin_ops(), None)
    observations = [observation(config, seed) for seed in range(16)]
    results = {name: measure(engine, runtime, observations, options.ticks) for name, runtime in CASES.items()}
    still = measure(engine, RuntimeConfig(1), observations[:1], options.ticks)
    results["identical frames"] = still
    path = write_receipt(options.out, "the runtime's decision, host time", results, {"ticks": options.ticks})
    table = Table("case", "decide p50, µs", "p99", "with frames p50, µs", "p99")
    for name, found in results.items():
        cells = (
            f"{1e3 * found[part][key]:.1f}" for part in ("decide", "with_frames") for key in ("median_ms", "p99_ms")
        )
        table.add_row(name, *cells)
    Console().print(table, f"wrote {path}")


def observation(config: ModelConfig, seed: int) -> ModelInput:
    """One observation: frames and state of the seed, the same task."""
    g = torch.Generator().manual_seed(seed)
    size = config.vision.image_size
    tokens = torch.zeros(1, config.max_tokens, dtype=torch.int64)
    tokens[0, :TEXT] = torch.arange(3, 3 + TEXT)
    tokens[0, TEXT:TOKENS] = torch.randint(100, 200, (TOKENS - TEXT,), generator=g)
    return ModelInput(
        images=torch.randint(0, 256, (1, config.cameras, 3, size, size), generator=g, dtype=torch.uint8),
        image_mask=torch.tensor([[True, True, False]]),
        tokens=tokens,
        token_mask=torch.arange(config.max_tokens)[None] < TOKENS,
        state=torch.rand(1, config.state_dim, generator=g) * 2 - 1,
    )


def measure(engine: TurboEngine, runtime: RuntimeConfig, observations: list[ModelInput], ticks: int) -> dict[str, Any]:
    """Milliseconds of the decision alone, and of the decision with the preparation and comparison of frames.

    Every tick of the first 50 really runs, so that the decisions that follow meet a real snapshot; then only the
    decision is repeated, as it is made at each tick.
    """
    looped = Runtime(engine, runtime)
    noise = torch.zeros(1, engine.config.horizon, engine.config.action_dim)
    whole: list[float] = []
    for tick in range(50):
        _, report = looped.sample(observations[tick % len(observations)], noise, TEXT)
        whole.append(report.decision_ms)
    alone: list[float] = []
    for tick in range(ticks):
        inputs = observations[tick % len(observations)]
        seen, begin = looped.seen(inputs, TEXT), time.perf_counter()
        decide(looped.reuse, seen, looped.held, looped.tick + tick % 3, looped.similarity(seen, inputs), looped.event)
        alone.append(1e3 * (time.perf_counter() - begin))
    return {"decide": summary(alone, keep=200), "with_frames": summary(whole, keep=50)}


if __name__ == "__main__":
    main()
