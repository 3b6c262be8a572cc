"""Gate, up and GeGLU of the prefix: the tiled product against cuBLAS with a pass behind it, their times and errors.

    python benchmarks/prefix_mlp.py

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
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from turbopi.bench import write_receipt
from turbopi.bench.clock import StageClock
from turbopi.engine.capture import CudaGraphRecorder
from turbopi.kernels import TiledGeglu, geglu, tile_geglu, tiled_geglu
from turbopi.kernels.tiled_geglu import Tiling

WIDTH, MLP = 2048, 16384
CUDA = torch.device("cuda", 0)
PAUSE_S = 0.02


@dataclass(frozen=True)
class Options:
    """What to time."""

    rows: tuple[int, ...] = (528, 552, 592, 640, 784, 968, 1936, 7744)
    """Prefix tokens of all samples: buckets of two and three views, then batches."""
    sets: int = 3
    """Weights that calls go through."""
    rounds: int = 5
    """Turns of each way."""
    steady: int = 10
    """Passes through the weights without a pause."""
    out: Path = Path(__file__).parent / "results" / "prefix_mlp_nvidia-h200.json"
    """The receipt."""


@dataclass(frozen=True, eq=False)
class Weights:
    """The same matrix, gate then up, as it is and reordered."""

    plain: Tensor
    tiled: TiledGeglu

    @staticmethod
    def random(scale: float) -> Weights:
        """Normal values."""
        plain = (torch.randn(2 * MLP, WIDTH, device=CUDA) * scale).to(torch.bfloat16)
        return Weights(plain, tile_geglu(plain))


class Case:
    """One number of rows: buffers, and each way as a replay of all weights."""

    def __init__(self, rows: int, weights: list[Weights], scale: float = 1.0) -> None:
        self.rows, self.weights = rows, weights
        self.x = (torch.randn(rows, WIDTH, device=CUDA) * scale).to(torch.bfloat16)
        self.sums = torch.empty(rows, 2 * MLP, device=CUDA, dtype=torch.bfloat16)
        self.out = torch.empty(rows, MLP, device=CUDA, dtype=torch.bfloat16)
        recorder = CudaGraphRecorder(CUDA)
        calls = {"cuBLAS": self.product, "cuBLAS, GeGLU": self.both, "tiled": self.tiled}
        self.ways = {name: recorder.record(partial(self.through, call)) for name, call in calls.items()}

    def through(self, call: Callable[[Weights], None]) -> None:
        """One call for each of the weights."""
        for weights in self.weights:
            call(weights)

    def product(self, weights: Weights) -> None:
        """The sums alone, by cuBLAS."""
        torch.mm(self.x, weights.plain.t(), out=self.sums)

    def both(self, weights: Weights) -> None:
        """What the tiled product replaces."""
        self.product(weights)
        geglu(self.sums, self.out)

    def tiled(self, weights: Weights) -> None:
        """All in one kernel."""
        tiled_geglu(self.x, weights.tiled, self.out)

    def errors(self) -> dict[str, float]:
        """Relative to float32."""
        gate, up = (self.x.float() @ self.weights[0].plain.float().T).chunk(2, dim=-1)
        want, found = F.gelu(gate, approximate="tanh") * up, {}
        for name, call in (("cuBLAS, GeGLU", self.both), ("tiled", self.tiled)):
            call(self.weights[0])
            found[name] = float((self.out.float() - want).norm() / want.norm())
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
    tiling = Tiling.fit(2 * MLP, case.rows, properties.multi_processor_count)
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
    weights = [Weights.random(1.5 * WIDTH**-0.5) for _ in range(options.sets)]
    results = []
    for rows in options.rows:
        case = Case(rows, weights)
        result = measure(case, options)
        results.append(result if rows > 1000 else result | {"errors": case.errors()})
    # The same arithmetic with nothing to switch: what is left of the time is not power.
    zeros = measure(Case(552, [Weights.random(0.0)] * options.sets, 0.0), options)
    Console(width=170).print(report([*results, zeros]))
    Console(width=170).print({result["rows"]: result["errors"] for result in results if "errors" in result})
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    write_receipt(options.out, "prefix gate, up and GeGLU", {"runs": results, "zeros": zeros}, settings)


if __name__ == "__main__":
    main()
