"""`turbo-pi eval`: success rates in LIBERO, in closed loop."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .options import PolicyOptions
from .serve import API_KEY_VARIABLE

if TYPE_CHECKING:
    from ..sim.evaluate import EvalConfig
    from ..sim.sources import PolicySource

NO_CHECKPOINT = Path("none")
_NO_POLICY = PolicyOptions(NO_CHECKPOINT)
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class EpisodeOptions:
    """Which episodes to play.

    Attributes:
        suite: libero_spatial, libero_object, libero_goal or libero_10.
        tasks: indices in the suite, such as 0-9 or 0,3,5-7.
        trials: episodes per task, from the official initial states 0 to trials - 1.
        replan: actions executed before the next inference; a runtime with chunking has its own.
        prompts: own, or other-bowl: ask for the scene's other bowl (libero_spatial), to see whether language matters;
            success stays that of the task's own goal.
        videos: how many episodes to film, or which, as task:state,task:state.
        camera_px: side of the frames that the simulator draws.
    """

    suite: str = "libero_spatial"
    tasks: str = "0-9"
    trials: int = 20
    replan: int = 5
    prompts: Literal["own", "other-bowl"] = "own"
    videos: str = "0"
    camera_px: int = 256


_ALL_EPISODES = EpisodeOptions()


def eval_(
    out: Path,
    policy: Annotated[PolicyOptions, tyro.conf.arg(name="")] = _NO_POLICY,
    episodes: Annotated[EpisodeOptions, tyro.conf.arg(name="")] = _ALL_EPISODES,
    remote: str | None = None,
    workers: int | None = None,
    threads: int = 1,
    minimum: int = 50,
    episode_timeout_s: float = 1800.0,
) -> int:
    """Evaluate a policy in LIBERO. The same command continues a run that was stopped, or one that had fewer trials.

    Give --checkpoint, or --remote with a server that TURBO_PI_API_KEY may hold the key of. Writes config.json,
    episodes.jsonl, summary.json and report.html. Exit status 1 if episodes ended in an error.

    Args:
        out: directory of the run.
        policy: which policy, and how to run it. The noise of an episode depends on --seed, suite, task and state alone.
        episodes: which episodes.
        remote: host:port or ws://host:port of a policy server, to be driven instead of a checkpoint.
        workers: processes, 1 to 2 GB each. Default: one per core.
        threads: of torch on the CPU in each worker.
        minimum: episodes below which no verdict is given.
        episode_timeout_s: seconds after which a worker that says nothing is replaced.
    """
    from ..report import write_eval_report
    from ..sim.evaluate import EvalConfig, evaluate
    from ..sim.simulations import LiberoScenes

    indices = parse_tasks(episodes.tasks)
    config = EvalConfig(
        out=out,
        source=_source(policy, remote),
        scenes=LiberoScenes(camera_px=episodes.camera_px, prompts=episodes.prompts),
        suite=episodes.suite,
        tasks=indices,
        trials=episodes.trials,
        seed=policy.seed or 0,
        replan=episodes.replan,
        threads=threads,
        workers=workers or os.cpu_count() or 1,
        film=parse_videos(episodes.videos, indices, episodes.trials),
        minimum=minimum,
        episode_timeout_s=episode_timeout_s,
    )
    console = Console(soft_wrap=True)
    try:
        summary = _with_progress(evaluate, config, console)
    except KeyboardInterrupt:
        console.print(f"stopped; the same command continues what is in {out}")
        return INTERRUPTED
    console.print(success_table(summary, str(out)))
    for line in _closing_lines(summary):
        console.print(line, markup=False, highlight=False)
    console.print(f"wrote {write_eval_report(out)}")
    return 1 if summary["errors"] else 0


def parse_tasks(text: str) -> tuple[int, ...]:
    """Indices of "0-9" or "0,3,5-7". Raises ValueError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"--tasks {text!r}: {part!r} is no index or range; write 0-9 or 0,3,5-7")
        found += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(found))


def parse_videos(text: str, tasks: tuple[int, ...], trials: int) -> frozenset[tuple[int, int]]:
    """(task, initial state) of the episodes to film: "3" is one of each of the first 3 tasks, or "0:4,7:0" names them.

    Raises ValueError for anything else.
    """
    if text.strip().isdecimal():
        return frozenset([(task, state) for state in range(trials) for task in tasks][: int(text)])
    pairs = [part.strip().partition(":") for part in text.split(",")]
    if not all(task.isdecimal() and state.isdecimal() for task, _, state in pairs):
        raise ValueError(f"--videos {text!r}: write how many, or which as task:state,task:state")
    return frozenset((int(task), int(state)) for task, _, state in pairs)


def success_table(summary: dict[str, Any], title: str) -> Table:
    """Success per task and in all."""
    table = Table("task", "prompt", "successes", "rate", "95 % interval", title=title)
    for task in summary["tasks"]:
        table.add_row(str(task["task"]), task["prompt"], *_success_cells(task))
    table.add_row("all", "", *_success_cells(summary["total"]), style="bold")
    return table


def _success_cells(success: dict[str, Any]) -> tuple[str, str, str]:
    counts = f"{success['successes']}/{success['episodes']}"
    if success["rate"] is None:
        return counts, "", ""
    low, high = success["interval"]
    return counts, f"{100 * success['rate']:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %"


def _closing_lines(summary: dict[str, Any]) -> list[str]:
    lines = []
    if summary["latency"] is not None:
        ms, rate = summary["latency"], summary["control"]
        lines.append(
            f"inference p50 {ms['p50_ms']:.1f}, p95 {ms['p95_ms']:.1f}, p99 {ms['p99_ms']:.1f} ms; control at "
            f"{rate['effective_hz']:.1f} of 20 Hz, if the robot waits for each inference "
            f"(inference alone would allow {rate['ceiling_hz']:.0f} Hz)"
        )
    for error in summary["errors"]:
        place = f"{error['suite']} task {error['task']}, initial state {error['initial_state']}"
        lines.append(f"error: {place}: {error['error']}")
    total = summary["total"]
    if total["asked"] is not None:
        lines.append(f"prompts asked for something else: done in {total['asked']} of {total['episodes']} episodes")
    return [*lines, summary["verdict"]]


def _source(policy: PolicyOptions, remote: str | None) -> PolicySource:
    if (remote is None) == (policy.checkpoint == NO_CHECKPOINT):
        raise ValueError("give either --checkpoint or --remote: the policy to evaluate, here or behind a server")
    if remote is not None:
        from ..sim.remote import RemoteSource

        given = [f.name for f in dataclasses.fields(policy) if getattr(policy, f.name) != getattr(_NO_POLICY, f.name)]
        unheard = [f"--{name.replace('_', '-')}" for name in given if name != "seed"]
        if unheard:
            raise ValueError(
                f"{', '.join(unheard)} with --remote: the server has its own policy; give them to the server"
            )
        return RemoteSource(remote, os.environ.get(API_KEY_VARIABLE))
    from ..sim.sources import CheckpointSource

    return CheckpointSource(policy.checkpoint, policy.keywords())


def _with_progress(evaluate: Any, config: EvalConfig, console: Console) -> dict[str, Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    successes = played = 0
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("episodes", total=config.episodes)

        def count(records: list[Any]) -> None:
            nonlocal successes, played
            successes += sum(record.success for record in records)
            played += len(records)
            progress.update(bar, completed=played, description=f"{successes}/{played} succeeded")

        return dict(evaluate(config, on_start=count, on_episode=lambda record: count([record])))
