"""The only verdict on tasks: the candidate and the reference play the same episodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..sim.compare import compare
from ..sim.evaluate import DEFAULT_MINIMUM, EvalConfig, evaluate
from ..sim.simulations import LiberoScenes
from ..sim.sources import PolicySource
from ..sim.workers import SceneSource

TASKS = 10
NO_VERDICT = (
    "No verdict on tasks was made: no episode was played. Small errors of tensors do not show that a policy still does "
    "its tasks; give --episodes to find out."
)


@dataclass(frozen=True)
class ClosedLoop:
    """Which episodes both policies play.

    Attributes:
        reference, candidate: the policies.
        out: directory for the two runs; one that is there already is continued.
        suite: of LIBERO.
        episodes: of each policy, spread over ten tasks; a multiple of ten.
        workers: processes.
        minimum: pairs below which there is no verdict.
        scenes: of the simulations; None: LIBERO's.
    """

    reference: PolicySource
    candidate: PolicySource
    out: Path
    suite: str
    episodes: int
    workers: int = 1
    minimum: int = DEFAULT_MINIMUM
    scenes: SceneSource | None = None

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.episodes % TASKS:
            raise ValueError(f"--episodes {self.episodes}: give a multiple of {TASKS}, one or more for each task")


def play(loop: ClosedLoop, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Play the episodes with both and compare pair by pair; see `turbopi.sim.compare.compare`.

    Raises what `evaluate` raises: missing packages, an unknown suite, a policy of another robot.
    """
    for name, source in (("reference", loop.reference), ("candidate", loop.candidate)):
        done = 0

        def count(_: Any, name: str = name) -> None:
            nonlocal done
            done += 1
            progress(f"{name}: episode {done} of {loop.episodes}")

        config = EvalConfig(
            out=loop.out / name,
            source=source,
            scenes=loop.scenes or LiberoScenes(),
            suite=loop.suite,
            tasks=tuple(range(TASKS)),
            trials=loop.episodes // TASKS,
            workers=loop.workers,
            minimum=loop.minimum,
        )
        evaluate(config, on_episode=count)
    return compare(loop.out / "reference", loop.out / "candidate", loop.minimum)
