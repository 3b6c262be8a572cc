"""The denoise kernel: its error against its twin, its determinism, its time.

    python benchmarks/denoise_loop.py

Random weights of the full-size π0.5 expert, so that weights come from memory as they do in use.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from turbopi.bench import write_receipt
from turbopi.bench.clock import StageClock
from turbopi.engine.capture import CudaGraphRecorder
from turbopi.kernels.denoise import Cache, DenoiseKernel, Layer, Schedule, Shape, denoise_ref
from turbopi.kernels.denoise_fp8 import ScaledMatrix
from turbopi.quant.fp8 import to_fp8_weight

REACH = {"qkv": 8.0, "out": 4.0, "gate_up": 8.0, "down": 16.0}
"""How far the products' inputs reach, about, with the weights and modulations below."""


@dataclass(frozen=True)
class Options:
    """What to time."""

    rows: tuple[int, ...] = (10, 15, 16)
    """Suffix rows."""
    prefix: int = 552
    """Prefix tokens."""
    steps: int = 10
    """Flow-matching evaluations."""
    in_flight: tuple[int, ...] = (1, 2)
    """Chunks of weights that a CTA asks memory for at once."""
    precisions: tuple[Literal["bf16", "fp8"], ...] = ("bf16", "fp8")
    """Of the products, in turns in one run."""
    repeats: int = 200
    """Timed replays of a graph."""
    out: Path = Path(__file__).parent / "results" / "denoise_loop.json"
    """The receipt."""


class Case:
    """Random weights, schedule, cache and noise of one shape; `slots` in the cache, by default as many as are used.

    `exact` are the layers in bfloat16, `layers` the same, or in E4M3 with `fp8`.
    """

    def __init__(
        self,
        shape: Shape,
        prefix: int,
        steps: int,
        *,
        slots: int | None = None,
        device: str = "cuda",
        fp8: bool = False,
    ) -> None:
        self.shape, self.device = shape, torch.device(device)
        self._generator = torch.Generator(device).manual_seed(0)
        width, inner, mlp = shape.width, shape.heads * shape.head_dim, shape.mlp_dim
        heads = shape.heads + 2 * shape.kv_heads
        scale = torch.ones(heads * shape.head_dim, 1, device=device)
        scale[:inner] = shape.head_dim**-0.5
        self.exact = [
            Layer(
                (self._random(heads * shape.head_dim, width) / width**0.5 * scale).bfloat16(),
                (self._random(width, inner) / inner**0.5).bfloat16(),
                (self._random(2 * mlp, width) / width**0.5).bfloat16(),
                (self._random(width, mlp) / mlp**0.5).bfloat16(),
            )
            for _ in range(shape.depth)
        ]
        self.layers = [in_fp8(layer) for layer in self.exact] if fp8 else self.exact
        self.schedule = Schedule(
            modulation=self._random(steps, 2 * shape.depth + 1, 3, width) * 0.3,
            in_weights=self._random(shape.action_dim, width) / 6,
            in_bias=self._random(steps, width) / 10,
            out_weights=self._random(shape.action_dim, width) / width**0.5 / steps,
            out_bias=self._random(shape.action_dim) / 10 / steps,
        )
        positions = torch.arange(shape.longest, device=device)[:, None]
        angles = positions / 10000 ** (torch.arange(shape.head_dim // 2, device=device) / (shape.head_dim // 2))
        size = (shape.depth, shape.kv_heads, slots or prefix + shape.rows, shape.head_dim)
        self.cache = Cache(
            keys=self._random(*size).bfloat16(),
            values=self._random(*size).bfloat16(),
            length=torch.tensor([prefix], dtype=torch.int32, device=device),
            cosines=angles.cos(),
            sines=angles.sin(),
        )
        self.noise = self._random(shape.rows, shape.action_dim)

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, device=self.device)


def in_fp8(layer: Layer) -> Layer:
    """The layer in E4M3."""
    kept = {name: to_fp8_weight(getattr(layer, name).float(), reach) for name, reach in REACH.items()}
    return Layer(**{name: ScaledMatrix(w.values, w.scale, w.inverse) for name, w in kept.items()})


def milliseconds(replay: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median time of a replay on the device."""
    clock, times = StageClock(device), []
    for _ in range(repeats + 3):
        clock.start()
        replay()
        clock.mark()
        times += clock.stop()
    return statistics.median(times[3:])


def measure(rows: int, precision: str, in_flight: int, prefix: int, steps: int, repeats: int) -> dict[str, Any]:
    """Error against the twin after one step and after all, bit-identity of two runs, and time."""
    shape = Shape(1024, 18, 8, 1, 256, 4096, rows, longest=968 + rows)
    result: dict[str, Any] = {
        "rows": rows,
        "precision": precision,
        "in_flight": in_flight,
        "prefix": prefix,
        "steps": steps,
    }
    for count in (1, steps):
        case = Case(shape, prefix, count, fp8=precision == "fp8")
        kernel = DenoiseKernel(shape, case.layers, case.device, in_flight)
        x_t, expected = case.noise.clone(), case.noise.clone()
        replay = CudaGraphRecorder(case.device).record(partial(kernel.run, case.schedule, case.cache, x_t))
        answers = []
        for _ in range(3):
            x_t.copy_(case.noise)
            replay()
            torch.cuda.synchronize()
            answers.append(x_t.clone())
        denoise_ref(case.layers, case.schedule, case.cache, expected)
        moved = (expected - case.noise).norm()
        result[f"error_after_{count}"] = float((answers[0] - expected).norm() / moved)
        result["bit_identical"] = all(torch.equal(answers[0], a) for a in answers)
    result["ms"] = milliseconds(replay, case.device, repeats)
    return result


def main() -> None:
    """Measure, print, write the receipt."""
    options = tyro.cli(Options, description=__doc__)
    results = [
        measure(rows, precision, in_flight, options.prefix, options.steps, options.repeats)
        for rows in options.rows
        for in_flight in options.in_flight
        for precision in options.precisions
    ]
    table = Table(*results[0])
    for result in results:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in result.values()))
    Console(width=140).print(table)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    write_receipt(options.out, "denoise kernel, random weights", {"runs": results}, settings)


if __name__ == "__main__":
    main()
