"""The two classic knobs, in closed loop: flow-matching steps, and actions executed between two inferences (replan).

    python benchmarks/classic_knobs.py --out build/knobs --workers 15 --at-once 5
    python benchmarks/classic_knobs.py --out build/knobs --steps 1 10 --replans

Every setting plays the same episodes from the same noise as (10 steps, replan 5); McNemar's exact test compares them.
The same command continues a run that was stopped. The receipt, which holds the settings whose episodes are complete,
is benchmarks/results/classic_knobs.json.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from closed_loop_docs import draw_knobs
from doc_tables import IMAGES, RESULTS
from paired_runs import RunOptions, is_complete, percent, row, run_all, success_cells, wide_console
from rich.table import Table

from turbopi.bench import write_receipt
from turbopi.sim.evaluate import EvalConfig
from turbopi.sim.simulations import LiberoScenes

STEPS, REPLANS = (1, 2, 3, 5, 10, 20), (1, 2, 5, 8, 10)


@dataclass(frozen=True, order=True)
class Setting:
    """One position of the two knobs."""

    steps: int = 10
    replan: int = 5

    @property
    def name(self) -> str:
        """Of the run's directory."""
        return f"steps{self.steps}_replan{self.replan}"


USUAL = Setting()


@dataclass(frozen=True)
class Options(RunOptions):
    """What to measure."""

    steps: tuple[int, ...] = STEPS
    """Flow-matching steps, at replan 5."""
    replans: tuple[int, ...] = REPLANS
    """Actions executed between inferences, at 10 steps."""
    invalid_tokens: Literal["dropped", "masked"] | None = None
    """Treatment of padding; masked keeps shapes the same, which suits engines that capture. None: the checkpoint's."""
    receipt: Path = RESULTS / "classic_knobs.json"
    """The receipt."""
    picture: Path = IMAGES / "classic_knobs.svg"
    """The plot."""

    @property
    def settings(self) -> list[Setting]:
        """The usual setting, and those asked for."""
        asked = [replace(USUAL, steps=s) for s in self.steps] + [replace(USUAL, replan=r) for r in self.replans]
        return list(dict.fromkeys([USUAL, *asked]))


def main() -> None:
    """Play what is missing, write the receipt, show the table."""
    options = tyro.cli(Options, description=__doc__)
    console = wide_console()
    if options.play:
        run_all({s.name: run_of(options, s) for s in options.settings}, options.at_once, console)
    results: dict[str, Any] = {"reference": USUAL.name, "settings": collect(options)}
    config = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    path = write_receipt(options.receipt, "steps and replan in closed loop, libero_spatial", results, config)
    console.print(table(results["settings"]))
    console.print(f"wrote {path} and {draw_knobs(results, options.picture)}")


def run_of(options: Options, setting: Setting) -> EvalConfig:
    """The evaluation of one setting."""
    treatment = {"invalid_tokens": options.invalid_tokens}
    source = replace(options.source, options={**options.policy, **treatment, "steps": setting.steps})
    return options.run(setting.name, source, LiberoScenes(), setting.replan)


def collect(options: Options) -> list[dict[str, Any]]:
    """All settings whose episodes are complete, of this call or an earlier one."""
    known = replace(options, steps=(*STEPS, *options.steps), replans=(*REPLANS, *options.replans)).settings
    return [
        {"steps": s.steps, "replan": s.replan, **row(options.out / USUAL.name, options.out / s.name, options.minimum)}
        for s in sorted(known)
        if is_complete(options.out / s.name, options.episodes)
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    """Success and latency, a row a setting."""
    columns = ("steps", "replan", "success", "95 % interval", "p", "rate", "median steps", "inference p50, ms")
    shown = Table(*columns, title="classic knobs")
    for result in rows:
        shown.add_row(
            str(result["steps"]),
            str(result["replan"]),
            *success_cells(result),
            percent(result["rate"]),
            str(result["median_steps_of_successes"]),
            f"{result['latency']['p50_ms']:.1f}",
        )
    return shown


if __name__ == "__main__":
    main()
