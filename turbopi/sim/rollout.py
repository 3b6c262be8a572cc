"""One episode: a policy looks, plays a few actions of its chunk, looks again, until the goal holds or time is up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..errors import InputError
from .libero import ACTION_DIM, LiberoEnv
from .sources import ActingPolicy
from .video import VideoRecorder


class RolloutPolicy(Protocol):
    """What an episode asks of a policy; local policies and websocket clients both do."""

    def infer(self, observation: dict[str, Any], /) -> Mapping[str, Any]:
        """Return {"actions": (H,7), …} for an observation in openpi's LIBERO keys."""

    def reset(self) -> None:
        """Forget the episode before."""


@dataclass(frozen=True)
class EpisodeSpec:
    """Which episode: an official initial state of a task. `seed` decides where its fixtures stand within 1 cm.

    openpi's seed is 7.
    """

    suite: str
    task: int
    initial_state: int
    seed: int


@dataclass(frozen=True)
class EpisodeResult:
    """What became of an episode.

    Attributes:
        spec: the episode.
        success: whether the goal held after some step.
        steps: actions carried out, the idle ones not counted.
        inferences: chunks asked for.
        infer_ms: time of each, in milliseconds, as the control loop sees it.
        error: why the simulation could not go on, which counts as a failure; None if it could.
        jerk: of the executed actions, see `jerk`.
        runtime: what the policy reported of the episode, as JSON values; None if it reports nothing.
    """

    spec: EpisodeSpec
    success: bool
    steps: int
    inferences: int
    infer_ms: list[float] = field(default_factory=list)
    error: str | None = None
    jerk: float | None = None
    runtime: dict[str, Any] | None = None


def run_episode(
    env: LiberoEnv,
    policy: RolloutPolicy | ActingPolicy,
    spec: EpisodeSpec,
    *,
    replan: int = 5,
    video: VideoRecorder | None = None,
) -> EpisodeResult:
    """Play one episode from its official initial state.

    Draws only at the ticks where the policy looks, unless a video is wanted. The policy is reset first, its noise
    stream included.

    Args:
        env: a simulation of the spec's task.
        policy: gets the observation of `LiberoEnv.observe`. One that acts plays its chunks itself.
        spec: the episode.
        replan: actions executed before the next inference; of no account for a policy that acts.
        video: takes a frame before every step and the last; closed at the end, also after an error.

    Raises:
        InputError: the policy returned no actions, NaN, wrong dimensions, or a chunk shorter than `replan`.
        ValueError: replan below 1, another task's simulation, no such initial state.
    """
    if replan < 1:
        raise ValueError(f"replan is {replan}; at least 1 action must be executed between inferences")
    if (env.task.suite, env.task.index) != (spec.suite, spec.task):
        raise ValueError(
            f"the simulation is of {env.task.suite} task {env.task.index}, the episode of {spec.suite} task "
            f"{spec.task}; make the environment from load_task({spec.suite!r}, {spec.task})"
        )
    try:
        return _play(env, policy, spec, replan, video)
    finally:
        if video is not None:
            video.close()


def _play(
    env: LiberoEnv, policy: RolloutPolicy | ActingPolicy, spec: EpisodeSpec, replan: int, video: VideoRecorder | None
) -> EpisodeResult:
    env.reset(spec.initial_state, seed=spec.seed)
    policy.reset()
    player = _Acting(env, policy) if isinstance(policy, ActingPolicy) else _Chunks(env, policy, replan)
    actions: list[np.ndarray] = []
    success, error = False, None
    while env.steps < env.task.step_limit and not success:
        if not np.isfinite(env.state).all():
            error = f"the simulation became unstable at step {env.steps}: the robot's state is {env.state}"
            break
        action = player.next()
        if video is not None:
            video.add(*env.frames())
        success = env.step(action)
        actions.append(action)
    if video is not None and error is None:
        video.add(*env.frames())
    report = getattr(policy, "report", None)
    return EpisodeResult(
        spec,
        success,
        env.steps,
        len(player.infer_ms),
        player.infer_ms,
        error,
        jerk(np.array(actions)),
        None if report is None else report(),
    )


class _Chunks:
    """Plays `replan` actions of each chunk."""

    def __init__(self, env: LiberoEnv, policy: RolloutPolicy, replan: int) -> None:
        self.infer_ms: list[float] = []
        self._env, self._policy, self._replan = env, policy, replan
        self._chunk, self._used = np.empty((0, ACTION_DIM)), replan

    def next(self) -> np.ndarray:
        """The next action; looks and infers where the chunk is used up."""
        if self._used == self._replan:
            observation = self._env.observe()
            start = time.perf_counter()
            reply = self._policy.infer(observation)
            self.infer_ms.append(1e3 * (time.perf_counter() - start))
            self._chunk, self._used = check_chunk(reply, self._replan), 0
        self._used += 1
        return self._chunk[self._used - 1]


class _Acting:
    """Lets the policy decide at every tick."""

    def __init__(self, env: LiberoEnv, policy: ActingPolicy) -> None:
        self.infer_ms: list[float] = []
        self._env, self._policy = env, policy

    def next(self) -> np.ndarray:
        """The policy's action for this tick."""
        act = self._policy.act(self._env.observe)
        if act.inferred_ms is not None:
            self.infer_ms.append(act.inferred_ms)
        return check_chunk({"actions": act.action[None]}, 1)[0]


def jerk(actions: np.ndarray) -> float | None:
    """How roughly the arm was driven: root-mean-square second difference of the executed motions.

    (n,7) relative motions, the last the gripper's, which is left out: LIBERO's actions are velocities in the
    controller's units, so their second difference is a jerk, in units a tick squared. None for fewer than three.
    """
    if len(actions) < 3:
        return None
    bends = np.diff(actions[:, :-1], n=2, axis=0)
    return float(np.sqrt(np.mean(np.sum(np.square(bends), axis=1))))


def check_chunk(reply: Mapping[str, Any], replan: int) -> np.ndarray:
    """The actions of a policy's reply, (H,7) float64 with H at least `replan`, all finite.

    Raises:
        InputError: says what the policy returned and what was expected.
    """
    expected = f"expected (H, {ACTION_DIM}) with H at least {replan} (replan)"
    if not isinstance(reply, Mapping) or "actions" not in reply:
        found = sorted(map(str, reply)) if isinstance(reply, Mapping) else type(reply).__name__
        raise InputError(f"the policy returned {found} without 'actions'; {expected}")
    actions = np.asarray(reply["actions"])
    if actions.ndim != 2 or actions.shape[1] != ACTION_DIM or actions.dtype.kind not in "fiu":
        raise InputError(
            f"the policy returned actions {actions.shape} {actions.dtype}; {expected}: is it a LIBERO policy?"
        )
    if len(actions) < replan:
        raise InputError(
            f"the policy returned a horizon of {len(actions)} actions, fewer than replan {replan}; lower replan"
        )
    bad = np.argwhere(~np.isfinite(actions))
    if len(bad):
        row, column = bad[0]
        raise InputError(
            f"the policy returned {len(bad)} actions that are NaN or infinite (first: row {row}, column {column}); "
            "check its weights, norm stats and precision"
        )
    return actions.astype(np.float64)
