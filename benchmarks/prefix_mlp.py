"""Gate, up and GeGLU of the prefix: the tiled product against cuBLAS with a pass behind it, their times and errors.

    python benchmarks/prefix_mlp.py
    python benchmarks/prefix_mlp.py --precision fp8

At the full model's width. Weights change from call to call, so that they come from memory. Each way is timed twice a
turn: "burst", one pass through the weights after a pause, and "steady", many without one, when power may run short.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from turbopi.engine.turbo.fp8_ops import library_fp8_matmul
from turbopi.kernels import E4M3, E4M3_MAX, TiledGeglu, geglu, store_ref, tile_geglu, tiled_geglu, tiled_geglu_ref
from turbopi.kernels.tiled_geglu import Tiling
from turbopi.kernels.tuning import gpu_file
from turbopi.quant.fp8 import Fp8Weight, to_fp8_weight

WIDTH, MLP = 2048, 16384
CUDA = torch.device("cuda", 0)
PAUSE_S = 0.02
INPUT_AMAX, HIDDEN_AMAX = 5.0, 16.0
"""In E4M3: how far the input and the result reach, what is beyond being saturated."""


@dataclass(frozen=True)
class Options:
    """What to time."""

    rows: tuple[int, ...] = (528, 552, 592, 640, 784, 968, 1936, 7744)
    """Prefix tokens of all samples: buckets of two and three views, then batches."""
    precision: Literal["bf16", "fp8"] = "bf16"
    """Of weights, input and result."""
    sets: int = 3
    """Weights that calls go through."""
    rounds: int = 5
    """Turns of each way."""
    steady: int = 10
    """Passes through the weights without a pause."""
    out: Path | None = None
    """The receipt; the default name says on which GPU, and whether in fp8."""


@dataclass(frozen=True, eq=False)
class Weights:
    """The same matrix, gate then up, as it is and reordered."""

    plain: Tensor | Fp8Weight
    tiled: TiledGeglu

    @staticmethod
    def random(scale: float, precision: str) -> Weights:
        """Normal values."""
        plain = (torch.randn(2 * MLP, WIDTH, device=CUDA) * scale).to(torch.bfloat16)
        if precision == "bf16":
            return Weights(plain, tile_geglu(plain))
        fp8 = to_fp8_weight(plain, INPUT_AMAX)
        return Weights(fp8, tile_geglu(fp8.values, fp8.scale, fp8.inverse))


class Case:
    """One number of rows: buffers, and each way as a replay of all weights."""

    def __init__(self, rows: int, weights: list[Weights], scale: float = 1.0) -> None:
        self.rows, self.weights = rows, weights
        tiled = weights[0].tiled
        self.x = torch.empty(rows, WIDTH, device=CUDA, dtype=tiled.rows.dtype)
        store_ref(torch.randn(rows, WIDTH, device=CUDA) * scale, self.x, tiled.inverse)
        self.sums = torch.empty(rows, 2 * MLP, device=CUDA, dtype=torch.bfloat16)
        self.out = torch.empty(rows, MLP, device=CUDA, dtype=tiled.rows.dtype)
        self.inverse = E4M3_MAX / HIDDEN_AMAX if tiled.e4m3 else 1.0
        recorder = CudaGraphRecorder(CUDA)
        calls = {"cuBLAS": self.product, "cuBLAS, GeGLU": self.both, "tiled": self.tiled}
        self.ways = {name: recorder.record(partial(self.through, call)) for name, call in calls.items()}

    def through(self, call: Callable[[Weights], None]) -> None:
        """One call for each of the weights."""
        for weights in self.weights:
            call(weights)

    def product(self, weights: Weights) -> None:
        """The sums alone, by cuBLAS."""
        if isinstance(weights.plain, Fp8Weight):
            library_fp8_matmul(self.x, weights.plain, self.sums)
        else:
            torch.mm(self.x, weights.plain.t(), out=self.sums)

    def both(self, weights: Weights) -> None:
        """What the tiled product replaces."""
        self.product(weights)
        geglu(self.sums, self.out, self.inverse)

    def tiled(self, weights: Weights) -> None:
        """All in one kernel."""
        tiled_geglu(self.x, weights.tiled, self.out, self.inverse)

    def errors(self) -> dict[str, float]:
        """Relative to float32 sums of the same operands; beside it what rounding such sums to E4M3 costs."""
        want, found = torch.empty(self.rows, MLP, device=CUDA), {}
        tiled_geglu_ref(self.x, self.weights[0].tiled, want)
        ways: list[tuple[str, Callable[[Weights], None]]] = [("cuBLAS, GeGLU", self.both), ("tiled", self.tiled)]
        if self.out.dtype == E4M3:
            ways.append(("rounding alone", lambda weights: store_ref(want, self.out, self.inverse)))
        for name, call in ways:
            call(self.weights[0])
            found[name] = float((self.out.float() / self.inverse - want).norm() / want.norm())
        return found

    def times(self, rounds: int, steady: int) -> dict[str, dict[str, list[float]]]:
        """Microseconds of a call, by way and kind, a number a round."""
        clock = StageClock(CUDA)
        found: dict[str, dict[str, list[float]]] = {name: {"burst": [], "steady": []} for name in self.ways}
        for _ in range(rounds):
            for name, replay in self.ways.items():
                for kind, passes in (("burst", 1), ("steady", steady)):
                    time.sleep(PAUSE_S if kind == "burst" else 0.0)
                    clock.start()
                    for _ in range(passes):
                        replay()
                    clock.mark()
                    found[name][kind].append(1e3 * clock.stop()[0] / passes / len(self.weights))
        return found


def measure(case: Case, options: Options) -> dict[str, Any]:
    """One entry of the receipt."""
    times = case.times(options.rounds, options.steady)
    medians = {name: {kind: statistics.median(us) for kind, us in kinds.items()} for name, kinds in times.items()}
    properties = torch.cuda.get_device_properties(CUDA)
    tiling = Tiling.fit(2 * MLP, case.rows, properties.multi_processor_count, case.x.dtype)
    return {"rows": case.rows, "tiling": asdict(tiling), "us": medians, "samples_us": times}


def report(results: list[dict[str, Any]]) -> Table:
    """A line a number of rows."""
    table = Table(
        "rows", "tokens of a tile", *(f"{name}, {kind}" for name, kinds in results[0]["us"].items() for kind in kinds)
    )
    for result in results:
        cells = []
        for kinds in result["us"].values():
            for us in kinds.values():
                cells.append(f"{us:.1f} us, {4e-6 * result['rows'] * WIDTH * MLP / us:.0f} TFLOP/s")
        table.add_row(str(result["rows"]), str(result["tiling"]["tokens"]), *cells)
    return table


@torch.no_grad()
def main() -> None:
    """Measure, print, write the receipt."""
    options = tyro.cli(Options, description=__doc__)
    weights = [Weights.random(1.5 * WIDTH**-0.5, options.precision) for _ in range(options.sets)]
    results = []
    for rows in options.rows:
        case = Case(rows, weights)
        result = measure(case, options)
        results.append(result if rows > 1000 else result | {"errors": case.errors()})
    # The same arithmetic with nothing to switch: what is left of the time is not power.
    zeros = measure(Case(552, [Weights.random(0.0, options.precision)] * options.sets, 0.0), options)
    Console(width=170).print(report([*results, zeros]))
    Console(width=170).print({result["rows"]: result["errors"] for result in results if "errors" in result})
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    name = f"prefix_mlp_{'fp8_' if options.precision == 'fp8' else ''}{gpu_file(CUDA).stem}.json"
    out = options.out or Path(__file__).parent / "results" / name
    write_receipt(out, "prefix gate, up and GeGLU", {"runs": results, "zeros": zeros}, settings)


if __name__ == "__main__":
    main()
