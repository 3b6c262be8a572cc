"""Success rates in closed loop: many episodes in parallel, each written down as it ends, to be continued after a kill.

An episode's outcome depends on the configuration, the suite, the task, the initial state and the seed, never on which
worker plays it or when. Two runs with the same seed therefore meet the same scenes with the same noise: pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .episodes_file import EpisodeRecord, RunDirectory, write_json
from .pool import Pool
from .sources import PolicySource
from .summary import SUMMARY_FILE, summarize
from .workers import Job, Ready, SceneSource, WorkerPlan

DEFAULT_MINIMUM = 50
EpisodeCallback = Callable[[EpisodeRecord], None]


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate, and how.

    Attributes:
        out: the run's directory; one that holds part of this very run is continued, also with more trials.
        source: of the policy.
        scenes: of the simulations.
        suite: LIBERO suite.
        tasks: indices in the suite.
        trials: episodes per task, from official initial states 0 to trials - 1.
        seed: with suite, task and initial state, the origin of an episode's noise.
        replan: actions executed before the next inference.
        threads: of torch on the CPU in each worker.
        workers: processes.
        film: (task, initial state) of the episodes to film.
        minimum: episodes below which no verdict is given.
        episode_timeout_s: seconds after which a worker that says nothing is replaced.
    """

    out: Path
    source: PolicySource
    scenes: SceneSource
    suite: str = "libero_spatial"
    tasks: tuple[int, ...] = tuple(range(10))
    trials: int = 20
    seed: int = 0
    replan: int = 5
    threads: int = 1
    workers: int = 2
    film: frozenset[tuple[int, int]] = frozenset()
    minimum: int = DEFAULT_MINIMUM
    episode_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("trials", "replan", "threads", "workers", "minimum"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"EvalConfig.{name} must be a positive integer, got {value!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"EvalConfig.seed must be a non-negative integer, got {self.seed!r}")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"EvalConfig.tasks must name at least one task, and each once, got {self.tasks!r}")
        if not self.episode_timeout_s > 0:
            raise ValueError(f"EvalConfig.episode_timeout_s must be positive, got {self.episode_timeout_s!r}")
        stray = sorted(f"{t}:{s}" for t, s in self.film if t not in self.tasks or not 0 <= s < self.trials)
        if stray:
            raise ValueError(
                f"episodes to film that are not evaluated: {', '.join(stray)} (task:initial state); "
                f"tasks are {', '.join(map(str, self.tasks))}, initial states 0 to {self.trials - 1}"
            )

    def identity(self) -> dict[str, Any]:
        """All that decides outcomes, as JSON values; raises what the sources raise when they cannot be used."""
        return {
            "suite": self.suite,
            "tasks": list(self.tasks),
            "trials": self.trials,
            "seed": self.seed,
            "replan": self.replan,
            "threads": self.threads,
            "source": self.source.describe(),
            "scenes": self.scenes.prepare(self.suite, self.tasks, self.trials),
        }

    @property
    def episodes(self) -> int:
        """How many there are in all."""
        return len(self.tasks) * self.trials


def evaluate(
    config: EvalConfig,
    on_start: Callable[[list[EpisodeRecord]], None] | None = None,
    on_episode: EpisodeCallback | None = None,
) -> dict[str, Any]:
    """Play the episodes that `config.out` does not hold yet, and summarise all of them.

    Args:
        config: what to evaluate.
        on_start: called with the episodes that are there already.
        on_episode: called after each episode, when it is on the disk.

    Returns:
        The summary, which is also in `config.out`; see `summarize`. "errors" lists episodes without an outcome: they
        are played again when the run is continued.

    Raises:
        ValueError: a configuration that cannot be run or that the directory is not for, or a policy that breaks its
            contract (NaN, too short a chunk, another robot); says which.
        ImportError, OSError: what is missing here.
        WorkersError: workers die before they can play.
    """
    identity = config.identity()
    with RunDirectory(config.out, identity) as run:
        done = {record.key for record in run.records if record.error is None}
        jobs = [
            Job(task, state, (task, state) in config.film)
            for state in range(config.trials)
            for task in config.tasks
            if (config.suite, task, state, config.seed) not in done
        ]
        if on_start is not None:
            on_start([record for record in run.records if record.error is None])
        plan = WorkerPlan(
            source=config.source,
            scenes=config.scenes,
            suite=config.suite,
            seed=config.seed,
            replan=config.replan,
            threads=config.threads,
            out=config.out,
        )
        for message in Pool(plan, config.workers, config.episode_timeout_s).run(jobs):
            if isinstance(message, Ready):
                run.confirm_policy(message.description)
                continue
            run.append(message)
            if on_episode is not None:
                on_episode(message)
        summary = summarize(run.records, config.minimum)
        write_json(config.out / SUMMARY_FILE, summary)
    return summary
