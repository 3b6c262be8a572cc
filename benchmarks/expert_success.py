"""How often the scripted expert does libero_spatial's tasks, how long it takes and how smoothly it moves.

    python benchmarks/expert_success.py --processes 16
    python benchmarks/expert_success.py --condition takeover --states 0:10

Official initial states (or random placements), 10 idle steps, the suite's limit of 220 steps, 20 Hz. No camera is
drawn. `noise` adds Gaussian noise to the executed motion; `takeover` moves the robot at random for a while at a random
moment, gripper included, and then asks a fresh expert to go on. What is disturbed is decided by task and state alone.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from turbopi.bench import write_receipt
from turbopi.sim.expert import SpatialExpert
from turbopi.sim.libero import LiberoEnv, load_task

SUITE = "libero_spatial"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    tasks: str = "0:10"
    """Task numbers, `a,b` or `first:end`."""
    states: str = "0:50"
    """Numbers of initial states, or seeds of random placements."""
    random: bool = False
    """Place the objects at random instead of as in the official states."""
    condition: Literal["clean", "noise", "takeover"] = "clean"
    """How the episode is disturbed."""
    noise: float = 0.2
    """Standard deviation of the noise on the six motion numbers."""
    takeover_steps: int = 15
    """Length of the random motion."""
    takeover_turn: float = 0.3
    """How much of a full turn command it may contain; 1 twists the wrist against its joints' limits."""
    takeover_before: int = 80
    """It begins at a step below this, drawn at random."""
    target: str = "akita_black_bowl_1"
    """The bowl to carry."""
    processes: int = 1
    """Simulations at a time."""
    out: Path | None = None
    """The receipt; the default name says what was measured."""


@dataclass(frozen=True)
class Episode:
    """What became of one episode."""

    task: int
    state: int
    success: bool
    steps: int
    change: float  # mean |a_t - a_(t-1)| of the expert's six motion numbers
    gripper_changes: int
    phase: str  # at the end
    act_ms: float


def main() -> None:
    """Run, print a table, write the receipt."""
    options = tyro.cli(Options, description=__doc__)
    tasks, states = numbers(options.tasks), numbers(options.states)
    jobs = [(options, task, states[i : i + 5]) for i in range(0, len(states), 5) for task in tasks]
    start = time.perf_counter()
    episodes: list[Episode] = []
    # Simulations share nothing, and one thread each is what they use.
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for batch in pool.imap_unordered(run_job, jobs):
            episodes += batch
            print(
                f"{len(episodes)}/{len(tasks) * len(states)}, {sum(e.success for e in episodes)} succeeded", flush=True
            )
    episodes.sort(key=lambda e: (e.task, e.state))
    seconds = time.perf_counter() - start
    show(options, episodes, seconds)
    name = f"expert_{options.condition}{'_random' if options.random else ''}_{options.target}.json"
    out = options.out or Path(__file__).parent / "results" / name
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    print("receipt:", write_receipt(out, "scripted expert, libero_spatial", results(episodes, seconds), settings))


def numbers(text: str) -> list[int]:
    """`0:3` and `0,1,2` are [0, 1, 2]."""
    if ":" in text:
        first, end = text.split(":")
        return list(range(int(first), int(end)))
    return [int(part) for part in text.split(",")]


def run_job(job: tuple[Options, int, list[int]]) -> list[Episode]:
    """Some episodes of one task in one simulation."""
    options, task, states = job
    with LiberoEnv(load_task(SUITE, task), cameras=False) as env:
        return [run_episode(env, options, state) for state in states]


def run_episode(env: LiberoEnv, options: Options, state: int) -> Episode:
    """One episode of the expert."""
    env.reset(None if options.random else state, seed=state if options.random else None)
    rng = np.random.default_rng([env.task.index, state])
    begin = int(rng.integers(options.takeover_before)) if options.condition == "takeover" else env.task.step_limit
    push = np.append(rng.uniform(-1, 1, 6), rng.choice([-1.0, 1.0]))
    push[3:6] *= options.takeover_turn
    expert = SpatialExpert(env, target=options.target)
    chosen, seconds = [], 0.0
    while env.steps < env.task.step_limit and not expert.done:
        if begin <= env.steps < begin + options.takeover_steps:
            env.step(np.clip(push + np.append(rng.normal(0, 0.2, 6), 0.0), -1, 1))
            expert.replan()
            continue
        start = time.perf_counter()
        action = expert.act()
        seconds += time.perf_counter() - start
        chosen.append(action)
        if options.condition == "noise":
            action = np.clip(action + np.append(rng.normal(0, options.noise, 6), 0.0), -1, 1)
        env.step(action)
    change = np.abs(np.diff(np.array(chosen), axis=0)) if len(chosen) > 1 else np.zeros((1, 7))
    return Episode(
        task=env.task.index,
        state=state,
        success=expert.done,
        steps=env.steps,
        change=float(change[:, :6].mean()),
        gripper_changes=int((change[:, 6] > 1).sum()),
        phase=expert.phase,
        act_ms=1e3 * seconds / max(1, len(chosen)),
    )


def results(episodes: list[Episode], seconds: float) -> dict[str, Any]:
    """Totals, a line per task, every failure."""
    return {
        "total": line(episodes),
        "tasks": {
            str(task): line(e for e in episodes if e.task == task) for task in sorted({e.task for e in episodes})
        },
        "failures": [asdict(e) for e in episodes if not e.success],
        "seconds": seconds,
    }


def line(episodes: Iterable[Episode]) -> dict[str, Any]:
    """Successes and means over some episodes; steps over the successful ones."""
    some = list(episodes)
    steps = [e.steps for e in some if e.success]
    return {
        "episodes": len(some),
        "successes": sum(e.success for e in some),
        "steps_median": float(np.median(steps)) if steps else None,
        "steps_most": max(steps, default=None),
        "action_change": float(np.mean([e.change for e in some])),
        "gripper_changes": float(np.mean([e.gripper_changes for e in some])),
        "act_ms": float(np.mean([e.act_ms for e in some])),
    }


def show(options: Options, episodes: list[Episode], seconds: float) -> None:
    """The table."""
    columns = ("task", "success", "steps, median", "most", "mean |Δa|", "gripper changes", "failed states")
    table = Table(*columns, title=f"scripted expert, {options.condition}, {options.target}, {seconds:.0f} s")
    for task in [*sorted({e.task for e in episodes}), None]:
        some = [e for e in episodes if task is None or e.task == task]
        row = line(some)
        failed = [str(e.state) for e in some if not e.success] if task is not None else []
        table.add_row(
            "all" if task is None else str(task),
            f"{row['successes']}/{row['episodes']}",
            str(row["steps_median"]),
            str(row["steps_most"]),
            f"{row['action_change']:.3f}",
            f"{row['gripper_changes']:.2f}",
            ",".join(failed),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
