"""What known mistakes cost: success in closed loop beside the error of the actions, one mistake at a time.

    python benchmarks/planted_mistakes.py --out build/mistakes --workers 15 --at-once 5
    python benchmarks/planted_mistakes.py --out build/mistakes --only unbroken positions --trials 2 --tasks 2

Every mistake (`mistakes.py`) plays the same episodes from the same noise as the unbroken policy; McNemar's exact test
compares them. Its error is measured on looks recorded from the unbroken policy's own episodes. A ladder of white noise
says which size of error costs success at all. The same command continues a run that was stopped. The receipt, which
holds the mistakes whose episodes are complete, is benchmarks/results/planted_mistakes.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import tyro
from action_audit import AGES, NOISE_SEED, Observations, Recording, answers, errors, record
from closed_loop_docs import draw_mistakes
from doc_tables import IMAGES, RESULTS
from mistakes import MISTAKES, UNBROKEN, FrozenScenes, Mistake, MistakenSource
from paired_runs import RunOptions, is_complete, percent, row, run_all, success_cells, wide_console
from rich.table import Table

from turbopi.bench import write_receipt
from turbopi.policy import Policy
from turbopi.sim.episodes_file import write_json
from turbopi.sim.evaluate import EvalConfig
from turbopi.sim.simulations import LiberoScenes
from turbopi.sim.workers import SceneSource

REPLAN = 5
OBSERVATIONS = "observations.npz"
AUDIT = "audit.json"
EFFECT = 1e-9
"""A relative error below this is none: the mistake did not reach the actions."""


@dataclass(frozen=True)
class Options(RunOptions):
    """What to measure."""

    only: tuple[str, ...] = tuple(MISTAKES)
    """Names of mistakes; the unbroken policy always plays too."""
    per_task: int = 5
    """Observations for the error, from one episode of each task."""
    receipt: Path = RESULTS / "planted_mistakes.json"
    """The receipt."""
    picture: Path = IMAGES / "planted_mistakes.svg"
    """The plot."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.only if name not in MISTAKES]
        if unknown:
            raise ValueError(f"unknown mistakes {', '.join(unknown)}; known: {', '.join(MISTAKES)}")

    @property
    def chosen(self) -> list[Mistake]:
        """The mistakes to make, the unbroken policy first."""
        return [mistake for name, mistake in MISTAKES.items() if name == UNBROKEN or name in self.only]


def main() -> None:
    """Play what is missing, measure the errors, write the receipt, show the table."""
    options = tyro.cli(Options, description=__doc__)
    console = wide_console()
    scenes = LiberoScenes()
    if options.play:
        run_all({m.name: run_of(options, m, scenes) for m in options.chosen}, options.at_once, console)
    audit = Audit(options, observations(options, scenes))
    for mistake in options.chosen:
        audit.measure(mistake)
    results = collect(options)
    config = {
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()},
        "replan": REPLAN,
        "tick": "a control step, 1/20 s",
        "observations": len(audit.observations),
        "observation_ages": list(AGES),
        "noise_seed": NOISE_SEED,
    }
    path = write_receipt(options.receipt, "known mistakes in closed loop, libero_spatial", results, config)
    console.print(table(results["mistakes"]))
    console.print(f"wrote {path} and {draw_mistakes(results, options.picture)}")


def run_of(options: Options, mistake: Mistake, scenes: SceneSource) -> EvalConfig:
    """The evaluation of one mistake."""
    source = MistakenSource(options.checkpoint, mistake.name, options.policy)
    shown = FrozenScenes(scenes, mistake.frozen_ticks, REPLAN) if mistake.frozen_ticks else scenes
    return options.run(mistake.name, source, shown, REPLAN)


def observations(options: Options, scenes: SceneSource) -> Observations:
    """The looks on which errors are measured, recorded if they are not there yet."""
    path = options.out / OBSERVATIONS
    if not path.is_file():
        source = MistakenSource(options.checkpoint, UNBROKEN, options.policy)
        recording = Recording(source, scenes, options.suite, options.tasks, options.seed, options.per_task)
        record(recording, options.workers).save(path)
    return Observations.load(path)


class Audit:
    """Measures errors of mistakes, each once: the result is kept in the mistake's directory."""

    def __init__(self, options: Options, seen: Observations) -> None:
        self.options = options
        self.observations = seen
        self._loaded: dict[str, Policy] = {}

    @cached_property
    def _right(self) -> Any:
        policy = self._policy(MISTAKES[UNBROKEN])
        return answers(policy, self.observations, policy.transforms.actions)

    def measure(self, mistake: Mistake) -> None:
        """Write the errors of one mistake. Raises ValueError if it has no effect."""
        path = self.options.out / mistake.name / AUDIT
        if path.is_file():
            return
        right = self._policy(MISTAKES[UNBROKEN]).transforms.actions
        found = answers(mistake.apply(self._policy(mistake)), self.observations, right, mistake.frozen_ticks)
        values = errors(found, self._right, mistake.in_velocity)
        if mistake.where != "none" and not (values["relative_error"] or 0.0) > EFFECT:
            raise ValueError(
                f"the mistake {mistake.name!r} does not change the actions under engine {self.options.engine!r}, which "
                "does not run the stage where it is made; use --engine eager, and another --out"
            )
        write_json(path, values)

    def _policy(self, mistake: Mistake) -> Policy:
        """The good policy, loaded as the mistake needs it."""
        checkpoint = MistakenSource(self.options.checkpoint, mistake.name, self.options.policy).checkpoint
        if mistake.in_reference:
            return checkpoint.load()  # an engine that captures must not have run before
        key = json.dumps(dict(checkpoint.options), sort_keys=True)
        if key not in self._loaded:
            torch.set_num_threads(max(self.options.threads, 2))
            self._loaded[key] = checkpoint.load()
        return self._loaded[key]


def collect(options: Options) -> dict[str, Any]:
    """All mistakes whose episodes are complete and whose error is known."""
    rows = []
    for mistake in MISTAKES.values():
        directory = options.out / mistake.name
        if not is_complete(directory, options.episodes) or not (directory / AUDIT).is_file():
            continue
        about = {"name": mistake.name, "title": mistake.title, "where": mistake.where}
        audit = json.loads((directory / AUDIT).read_text())
        rows.append({**about, **row(options.out / UNBROKEN, directory, options.minimum), "audit": audit})
    return {"reference": UNBROKEN, "mistakes": rows, "noise": noise_threshold(rows)}


def noise_threshold(rows: list[dict[str, Any]], significance: float = 0.05) -> dict[str, float | None]:
    """Which relative sizes of white noise cost success: the smallest that shows, and the largest below it."""
    ladder = sorted(
        (r["audit"]["relative_error"], r["p_value"], r["difference"]) for r in rows if r["where"] == "noise"
    )
    costly = next((size for size, p, change in ladder if p < significance and change < 0), None)
    free = [size for size, _, _ in ladder if costly is None or size < costly]
    return {"smallest_costly": costly, "largest_without_shown_cost": max(free, default=None)}


def table(rows: list[dict[str, Any]]) -> Table:
    """Success and error, a row a mistake."""
    columns = ("mistake", "success", "95 % interval", "p", "rate", "relative error", "first step", "cosine", "max")
    shown = Table(*columns, title="planted mistakes")
    for result in rows:
        audit = result["audit"]
        first = audit["first_step_relative_error"]
        shown.add_row(
            result["title"],
            *success_cells(result),
            percent(result["rate"]),
            f"{audit['relative_error']:.1e}",
            "" if first is None else f"{first:.1e}",
            f"{audit['cosine']:.4f}",
            f"{audit['max_error']:.2g}",
        )
    return shown


if __name__ == "__main__":
    main()
