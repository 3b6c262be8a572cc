"""What a policy sees in LIBERO while it acts: looks spread over its own episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..policy import Policy
from ..sim.libero import FIXTURE_SEED, initial_states, load_task
from ..sim.rollout import EpisodeSpec, run_episode
from ..sim.simulations import LiberoScenes
from ..sim.sources import check_robot, noise_seed
from .files import Observation

TASKS = 10
LOOKS = 4
REPLAN = 5


@dataclass(frozen=True)
class Rollouts:
    """Which episodes to watch.

    Episodes go round the tasks. They start from the last official initial states, which evaluations reach last.

    Attributes:
        suite: of LIBERO.
        episodes: how many in all.
        looks: observations kept of each, evenly spread over it.
        camera_px: side of the frames that are drawn.
    """

    suite: str
    episodes: int = TASKS
    looks: int = LOOKS
    camera_px: int = 256

    def __post_init__(self) -> None:
        for name in ("episodes", "looks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class _Watching:
    """A policy that keeps what it is shown."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.seen: list[Observation] = []

    def infer(self, observation: dict[str, Any], /) -> Mapping[str, Any]:
        self.seen.append(dict(observation))
        return self._policy.infer(observation)

    def reset(self) -> None:
        self._policy.reset()


def rollout_frames(
    policy: Policy, rollouts: Rollouts, on_episode: Callable[[int, bool], None] | None = None
) -> Iterator[Observation]:
    """Play the episodes, one after the other, and give the looks of each.

    `on_episode` is told how many steps an episode took and whether it succeeded.

    Raises:
        ValueError: a policy of another robot, an unknown suite.
        ImportError, RendererError: packages or OpenGL are missing.
    """
    check_robot(policy.transforms.robot, "the checkpoint")
    scenes = LiberoScenes(camera_px=rollouts.camera_px)
    scenes.prepare(rollouts.suite, tuple(range(min(TASKS, rollouts.episodes))), 1)
    for number in range(rollouts.episodes):
        task = number % TASKS
        state = len(initial_states(load_task(rollouts.suite, task))) - 1 - number // TASKS
        runtime = replace(policy.runtime, seed=noise_seed(FIXTURE_SEED, rollouts.suite, task, state))
        watching = _Watching(Policy(policy.transforms, policy.engine, runtime))
        with scenes.open(rollouts.suite, task) as env:
            spec = EpisodeSpec(rollouts.suite, task, state, FIXTURE_SEED)
            result = run_episode(env, watching, spec, replan=REPLAN)
        if on_episode is not None:
            on_episode(result.steps, result.success)
        for index in np.linspace(0, len(watching.seen) - 1, min(rollouts.looks, len(watching.seen))):
            yield watching.seen[round(index)]
