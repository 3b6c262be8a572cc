"""Every precision in closed loop: the same episodes, the same noise, each held against bf16 by McNemar's exact test.

    python benchmarks/precisions.py --out build/precisions --device cpu --workers 15 --at-once 3
    python benchmarks/precisions.py --out build/precisions --runs turbo:fp8 --workers 5

A run is ENGINE:PRECISION. `turbo` runs on the GPU, other engines on --device: processes that share a GPU wait for each
other, which turbo alone is quick enough for. Quantised ones read calibration.json in the checkpoint (`turbo-pi
calibrate`). The same command continues runs that were stopped; new runs may be added. The receipt,
benchmarks/results/precisions.json, holds every run whose episodes are complete; those of it that are not in --out stay,
if the reference ended as theirs did. 200 episodes are played, 20 of each task.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import tyro
from doc_tables import RESULTS
from paired_runs import RunOptions, is_complete, joined, percent, row, run_all, success_cells, wide_console
from rich.table import Table

from turbopi.bench import write_receipt
from turbopi.engine import Precision, engines_for
from turbopi.sim.evaluate import EvalConfig
from turbopi.sim.simulations import LiberoScenes

REFERENCE = "turbo:bf16"
RUNS = (REFERENCE, "turbo:fp8", "eager:int8", "eager:w8a16", "eager:w4a16", "eager:nvfp4")
REPLAN = 5
QUANTISED_ONLY = ("plan", "calibration")


@dataclass(frozen=True)
class Options(RunOptions):
    """What to play."""

    runs: tuple[str, ...] = RUNS
    """ENGINE:PRECISION of each; the reference is always among them."""
    reference: str = REFERENCE
    """With which the others are compared."""
    plan: Path | None = None
    """Precision plan of all quantised runs; give such runs an --out of their own."""
    calibration: Path | None = None
    """Input ranges. None: calibration.json in the checkpoint."""
    receipt: Path = RESULTS / "precisions.json"
    """The receipt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.engine, self.precision) != ("eager", "fp32"):
            raise ValueError("engine and precision belong to each run here: name them with --runs ENGINE:PRECISION")

    @property
    def names(self) -> tuple[str, ...]:
        """All runs, the reference first."""
        return tuple(dict.fromkeys((self.reference, *self.runs)))


def main() -> None:
    """Play what is missing, write the receipt, show the table."""
    options = tyro.cli(Options, description=__doc__)
    console = wide_console()
    if options.play:
        run_all({name: run_of(options, name) for name in options.names}, options.at_once, console)
    runs = joined(options.receipt, "runs", "run", options.reference, collect(options))
    results: dict[str, Any] = {"reference": options.reference, "runs": runs}
    config = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    path = write_receipt(options.receipt, f"precisions in closed loop, {options.suite}", results, config)
    console.print(table(results))
    console.print(f"wrote {path}")


def split(name: str) -> tuple[str, Precision]:
    """Engine and precision of a run's name. Raises ValueError for an engine that does not run the precision."""
    engine, _, precision = name.partition(":")
    known = engines_for(cast("Precision", precision))
    if engine not in known:
        raise ValueError(f"{name!r} is no run: {precision!r} is run by {', '.join(known) or 'no engine'}")
    return engine, cast("Precision", precision)


def directory(options: Options, name: str) -> Path:
    """Where a run is."""
    return options.out / name.replace(":", "_")


def run_of(options: Options, name: str) -> EvalConfig:
    """The evaluation of one run."""
    engine, precision = split(name)
    device = "cuda" if engine == "turbo" else options.device
    chosen: dict[str, Any] = {"engine": engine, "precision": precision, "device": device}
    if precision not in ("fp32", "bf16"):
        chosen |= {key: getattr(options, key) for key in QUANTISED_ONLY}
    source = replace(options.source, options=chosen)
    return options.run(directory(options, name).name, source, LiberoScenes(), REPLAN)


def collect(options: Options) -> list[dict[str, Any]]:
    """All runs in the directory whose episodes are complete, of this call or an earlier one."""
    there = [path.name.replace("_", ":", 1) for path in sorted(options.out.iterdir()) if path.is_dir()]
    names = dict.fromkeys((*options.names, *there))
    reference = directory(options, options.reference)
    return [
        {"run": name, **row(reference, directory(options, name), options.minimum)}
        for name in names
        if is_complete(directory(options, name), options.episodes)
    ]


def table(results: dict[str, Any]) -> Table:
    """Success and latency, a row a run."""
    columns = ("run", "success", "95 % interval", "p", "rate", "median steps", "inference p50, ms")
    shown = Table(*columns, title=f"precisions, compared with {results['reference']}")
    for result in results["runs"]:
        shown.add_row(
            result["run"],
            *success_cells(result),
            percent(result["rate"]),
            str(result["median_steps_of_successes"]),
            f"{result['latency']['p50_ms']:.1f}",
        )
    return shown


if __name__ == "__main__":
    main()
