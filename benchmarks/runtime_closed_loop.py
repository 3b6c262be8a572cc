"""What the runtime's settings cost in success: steps, reuse, gates, modalities, delays, in closed loop and in pairs.

    python benchmarks/runtime_closed_loop.py --out build/runtime --workers 15 --at-once 5 --list
    python benchmarks/runtime_closed_loop.py --out build/runtime --workers 15 --at-once 5 --only reuse
    python benchmarks/runtime_closed_loop.py --out build/runtime --workers 15 --at-once 5 --only delays modes --rows 6

Every setting plays the same episodes from the same noise as the reference (10 steps, everything at every inference,
replan 5); McNemar's exact test compares them. The same command continues a run that was stopped. Rows stand in the
order of what they can tell: with --rows only the first so many of each group are played. Groups:

    reuse       steps x recompute at every n-th inference
    thresholds  reuse while image tokens agree to a threshold
    modes       which part of the prefix is old; synchronised against staggered parts of the same ages (eager only)
    delays      inference that takes 0-8 control ticks, with and without real-time chunking
    presets     safe, balanced, fast

The receipt, benchmarks/results/runtime_closed_loop.json, holds the settings whose episodes are complete; those of it
whose runs are not in --out stay, if the reference ended as theirs did. benchmarks/runtime_docs.py makes the tables and
plots of docs/runtime.md from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import tyro
from doc_tables import RESULTS
from paired_runs import RunOptions, is_complete, joined, row, run_all, success_cells, wide_console
from rich.table import Table

from turbopi import RuntimeConfig
from turbopi.bench import write_receipt
from turbopi.runtime import ChunkingConfig, ReuseConfig, RtcConfig, SimilarityGate
from turbopi.runtime.config import ReuseMode
from turbopi.runtime.presets import RECOMMENDED
from turbopi.sim.episodes_file import EpisodeRecord, read_records
from turbopi.sim.evaluate import EvalConfig
from turbopi.sim.simulations import LiberoScenes
from turbopi.sim.summary import latest

Group = Literal["reuse", "thresholds", "modes", "delays", "presets"]
GROUPS: tuple[Group, ...] = ("reuse", "thresholds", "modes", "delays", "presets")
STEPS, EVERY = (1, 2, 3, 5, 10), (1, 2, 3, 4, 5)
BEST_FIRST = ((5, 1), (3, 1), (1, 1), (2, 1), (10, 2), (10, 3), (5, 2), (3, 2), (1, 2), (10, 5), (10, 4), (5, 3))
THRESHOLDS = (0.985, 0.99, 0.95, 0.995, 0.98, 0.999, 0.97, 1.0)
MODE_THRESHOLDS = (0.985, 0.95)
PARTS: tuple[ReuseMode, ...] = ("vision_only", "state_only")
DELAYS = (2, 4, 1, 5, 3, 8, 6, 7, 0)
REPLAN = 5
STAND_STILL = (0.0,) * 6 + (None,)
"""LIBERO's actions are motions: without a plan the arm stands, and the gripper stays."""


@dataclass(frozen=True)
class Setting:
    """One row: its directory's name, its group, and the runtime."""

    name: str
    group: str
    runtime: RuntimeConfig


REFERENCE = Setting("reference", "reference", RuntimeConfig())


@dataclass(frozen=True)
class Options(RunOptions):
    """What to measure."""

    only: tuple[Group, ...] = GROUPS
    """Groups to play."""
    rows: int | None = None
    """Of each group, the first so many. Default: all."""
    named: tuple[str, ...] = ()
    """Of those, the ones with these names. Default: all."""
    replan: int = REPLAN
    """Actions between inferences, where the runtime does not play the chunks; a row's name says another than 5."""
    list: bool = False
    """Only say which rows there are, and which are complete."""
    receipt: Path = RESULTS / "runtime_closed_loop.json"
    """The receipt."""


def main() -> None:
    """Play what is missing, write the receipt, show the table."""
    options = tyro.cli(Options, description=__doc__)
    console = wide_console()
    wanted = [s for s in chosen(options) if runs_on(s, options.engine)]
    if options.list:
        for setting in wanted:
            done = is_complete(options.out / run_name(setting, options), options.episodes)
            console.print(f"{'complete' if done else 'missing '}  {setting.group:10}  {run_name(setting, options)}")
        return
    if options.play:
        run_all({run_name(s, options): run_of(options, s) for s in wanted}, options.at_once, console)
    reference = run_name(REFERENCE, options)
    rows = joined(options.receipt, "settings", "name", reference, collect(options))
    results = {"reference": reference, "settings": in_order(rows, options)}
    config = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    path = write_receipt(options.receipt, f"the runtime in closed loop, {options.suite}", results, config)
    console.print(table(results["settings"]))
    console.print(f"wrote {path}")


def chosen(options: Options) -> list[Setting]:
    """The reference, and the rows asked for, in the order in which they are worth playing."""
    rows = [setting for group in options.only for setting in list(SETTINGS[group]())[: options.rows]]
    if unknown := set(options.named) - {setting.name for setting in rows}:
        raise ValueError(f"no row named {', '.join(sorted(unknown))} among those asked for; --list shows their names")
    return [REFERENCE, *(setting for setting in rows if not options.named or setting.name in options.named)]


def run_name(setting: Setting, options: Options) -> str:
    """The run's directory."""
    plays = setting.runtime.chunking is not None
    return setting.name if options.replan == REPLAN or plays else f"{setting.name}_replan{options.replan}"


def runs_on(setting: Setting, engine: str) -> bool:
    """Whether the engine can do what the setting asks: part of a prefix and a true Jacobian are eager's alone."""
    reuse, rtc = setting.runtime.reuse, setting.runtime.rtc
    whole = reuse is None or (reuse.mode == "full" and reuse.synchronised)
    guided = rtc is None or (engine == "turbo" and rtc.method == "guided")
    return engine == "eager" or (whole and guided)


def reuse_settings() -> Iterator[Setting]:
    """Steps x frequency."""
    rest = [(steps, every) for every in EVERY for steps in reversed(STEPS)]
    for steps, every in dict.fromkeys((*BEST_FIRST, *rest)):
        if (steps, every) != (10, 1):
            reuse = None if every == 1 else ReuseConfig(every=every)
            yield Setting(f"steps{steps}_every{every}", "reuse", RuntimeConfig(steps, reuse=reuse))


def threshold_settings() -> Iterator[Setting]:
    """Image tokens' similarity, falling."""
    for threshold in THRESHOLDS:
        reuse = ReuseConfig(gate=SimilarityGate(threshold), max_age=20)
        yield Setting(f"tokens{threshold:g}", "thresholds", RuntimeConfig(reuse=reuse))


def mode_settings() -> Iterator[Setting]:
    """Synchronised against mixed parts of the same ages; one part old; then each mode at the notes' thresholds."""
    for every in (2, 4):
        for synchronised in (True, False):
            name = f"{'synchronised' if synchronised else 'mixed'}_every{every}"
            yield Setting(name, "modes", RuntimeConfig(reuse=ReuseConfig(every=every, synchronised=synchronised)))
    for mode in PARTS:
        yield Setting(f"{mode}_every2", "modes", RuntimeConfig(reuse=ReuseConfig(mode, every=2)))
    for threshold in MODE_THRESHOLDS:
        for mode in get_args(ReuseMode):
            layers = 3 if mode == "layer_wise" else None
            reuse = ReuseConfig(mode, gate=SimilarityGate(threshold), layers=layers)
            yield Setting(f"{mode}_{threshold:g}", "modes", RuntimeConfig(reuse=reuse))


def delay_settings() -> Iterator[Setting]:
    """Each delay with the chunk simply swapped and guided as LeRobot does it; two less or more than that."""
    for delay in DELAYS:
        chunking = ChunkingConfig(replan=REPLAN, delay=delay, hold=STAND_STILL)
        yield Setting(f"delay{delay}", "delays", RuntimeConfig(chunking=chunking))
        yield Setting(f"delay{delay}_rtc", "delays", RuntimeConfig(chunking=chunking, rtc=RtcConfig()))
    for delay in (2, 4):
        chunking = ChunkingConfig(replan=REPLAN, delay=delay, hold=STAND_STILL)
        # Pulls nothing but what will have been executed: the rest of the old plan is free to change.
        yield Setting(f"delay{delay}_short", "delays", RuntimeConfig(chunking=chunking, rtc=RtcConfig(horizon=delay)))
        yield Setting(f"delay{delay}_vjp", "delays", RuntimeConfig(chunking=chunking, rtc=RtcConfig("guided_vjp")))


def preset_settings() -> Iterator[Setting]:
    """The recommended ones' runtimes, on whatever engine is asked for."""
    for name, preset in RECOMMENDED.items():
        yield Setting(f"preset_{name}", "presets", preset.runtime)


SETTINGS = {
    "reuse": reuse_settings,
    "thresholds": threshold_settings,
    "modes": mode_settings,
    "delays": delay_settings,
    "presets": preset_settings,
}


def run_of(options: Options, setting: Setting) -> EvalConfig:
    """The evaluation of one setting."""
    source = replace(options.source, options={**options.policy, "runtime": setting.runtime})
    return options.run(run_name(setting, options), source, LiberoScenes(), options.replan)


def everything(options: Options) -> list[Setting]:
    """Every row there is."""
    return chosen(replace(options, only=GROUPS, rows=None, named=()))


def in_order(rows: list[dict[str, Any]], options: Options) -> list[dict[str, Any]]:
    """Rows in the order in which they are worth playing; unknown ones, of another replan, behind them."""
    order = {run_name(setting, options): place for place, setting in enumerate(everything(options))}
    return sorted(rows, key=lambda found: order.get(found["name"], len(order)))


def collect(options: Options) -> list[dict[str, Any]]:
    """All settings whose episodes are complete, of this call or an earlier one."""
    reference = options.out / run_name(REFERENCE, options)
    return [
        {
            "name": run_name(setting, options),
            "group": setting.group,
            "runtime": setting.runtime.to_dict(),
            **row(reference, options.out / run_name(setting, options), options.minimum),
            **ticks(options.out / run_name(setting, options)),
        }
        for setting in everything(options)
        if is_complete(options.out / run_name(setting, options), options.episodes)
    ]


def ticks(directory: Path) -> dict[str, Any]:
    """What the runtime did, over all episodes: reuse rate, ages, held ticks, jerk, control ticks."""
    records = [record for record in latest(read_records(directory)) if record.error is None]
    reports = [record.runtime for record in records if record.runtime is not None]
    total = sum(report["ticks"] for report in reports)
    full = sum(report["kinds"].get("full", 0) for report in reports)
    ages: dict[str, int] = {}
    for report in reports:
        for age, count in report["ages"].items():
            ages[age] = ages.get(age, 0) + count
    jerks = [record.jerk for record in records if record.jerk is not None]
    return {
        "reuse_rate": 1 - full / total if total else None,
        "ages": dict(sorted(ages.items(), key=lambda item: int(item[0]))),
        "held_ticks": sum(report.get("held", 0) for report in reports),
        "control_ticks": sum(record.steps for record in records),
        "jerk": statistics.fmean(jerks) if jerks else None,
        "jerk_of_successes": _mean_jerk([record for record in records if record.success]),
    }


def _mean_jerk(records: list[EpisodeRecord]) -> float | None:
    jerks = [record.jerk for record in records if record.jerk is not None]
    return statistics.fmean(jerks) if jerks else None


def table(rows: list[dict[str, Any]]) -> Table:
    """Success, reuse, jerk and latency, a row a setting."""
    columns = ("setting", "success", "95 % interval", "p", "reuse rate", "held", "jerk", "inference p50, ms", "p99")
    shown = Table(*columns, title="the runtime in closed loop")
    for result in rows:
        rate, jerk = result["reuse_rate"], result["jerk"]
        shown.add_row(
            result["name"],
            *success_cells(result),
            "" if rate is None else f"{100 * rate:.0f} %",
            str(result["held_ticks"]),
            "" if jerk is None else f"{jerk:.3f}",
            f"{result['latency']['p50_ms']:.1f}",
            f"{result['latency']['p99_ms']:.1f}",
        )
    return shown


if __name__ == "__main__":
    main()
