"""How far a broken policy's actions are from the right ones, on observations of the unbroken policy's own episodes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mistakes import CAMERA_KEYS, FROZEN_TICKS, STATE_KEY, EngineAround, FrozenEnv, with_engine
from torch import Tensor

from turbopi.model import PrefixCache
from turbopi.policy import Policy
from turbopi.sim.rollout import EpisodeSpec, run_episode
from turbopi.sim.sources import PolicySource, noise_seed
from turbopi.sim.workers import SceneSource
from turbopi.transforms import Normalizer

AGES = (0, *FROZEN_TICKS)
REPLAN = 5
NOISE_SEED = 20_000


@dataclass(frozen=True, eq=False)
class Observations:
    """N looks of the unbroken policy, each with the pictures of now and of some ticks before.

    Attributes:
        pictures: (N, ages, 2, S, S, 3) uint8, ages as in `AGES`, both cameras.
        state: (N, 8) float64.
        prompts: N texts.
        places: (N, 3) int64: task, initial state, tick.
    """

    pictures: np.ndarray
    state: np.ndarray
    prompts: tuple[str, ...]
    places: np.ndarray

    def __len__(self) -> int:
        """How many there are."""
        return len(self.prompts)

    def observation(self, index: int, age: int = 0) -> dict[str, Any]:
        """What the policy was shown, with pictures `age` ticks old."""
        pictures = dict(zip(CAMERA_KEYS, self.pictures[index, AGES.index(age)], strict=True))
        return {**pictures, STATE_KEY: self.state[index], "prompt": self.prompts[index]}

    def save(self, path: Path) -> None:
        """Write an .npz; the file appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            values = {"pictures": self.pictures, "state": self.state, "places": self.places}
            np.savez_compressed(file, prompts=np.array(self.prompts), **values)
        partial.rename(path)

    @classmethod
    def load(cls, path: Path) -> Observations:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            prompts = tuple(str(prompt) for prompt in file["prompts"])
            return cls(file["pictures"], file["state"], prompts, file["places"])


def joined(parts: Sequence[Observations]) -> Observations:
    """Several sets as one."""
    pictures, state, places = (np.concatenate([getattr(p, n) for p in parts]) for n in ("pictures", "state", "places"))
    return Observations(pictures, state, tuple(prompt for part in parts for prompt in part.prompts), places)


@dataclass(frozen=True)
class Recording:
    """Which looks to record: `per_task`, evenly spread over the episode from one initial state of each task."""

    source: PolicySource
    scenes: SceneSource
    suite: str
    tasks: tuple[int, ...]
    seed: int
    per_task: int = 5
    initial_state: int = 0
    threads: int = 1


def record(recording: Recording, processes: int) -> Observations:
    """Play an episode of every task and keep some of the looks."""
    with ProcessPoolExecutor(min(processes, len(recording.tasks)), mp_context=get_context("spawn")) as pool:
        return joined(list(pool.map(record_task, [recording] * len(recording.tasks), recording.tasks)))


def record_task(recording: Recording, task: int) -> Observations:
    """The looks of one task. Raises ValueError if its episode was too short to look back `max(AGES)` ticks."""
    torch.set_num_threads(recording.threads)
    place = (recording.suite, task, recording.initial_state)
    policy = recording.source.open().episode(noise_seed(recording.seed, *place))
    env: Any = FrozenEnv(recording.scenes.open(recording.suite, task), AGES, REPLAN)
    states: dict[int, np.ndarray] = {}
    try:
        run_episode(env, _Watching(policy, env, states), EpisodeSpec(*place, recording.seed), replan=REPLAN)
    finally:
        env.close()
    looks = [tick for tick in states if tick >= max(AGES)]
    if len(looks) < recording.per_task:
        raise ValueError(f"task {task} was done after {len(states)} looks, too few to choose {recording.per_task} from")
    chosen = [looks[round(i)] for i in np.linspace(0, len(looks) - 1, recording.per_task)]
    pictures = np.array([[[env.seen[t - age][key] for key in CAMERA_KEYS] for age in AGES] for t in chosen])
    return Observations(
        pictures=pictures,
        state=np.stack([states[t] for t in chosen]),
        prompts=(env.task.prompt,) * len(chosen),
        places=np.array([(task, recording.initial_state, t) for t in chosen]),
    )


class _Watching:
    """Notes the state at every look."""

    def __init__(self, policy: Any, env: FrozenEnv, states: dict[int, np.ndarray]) -> None:
        self.policy, self.env, self.states = policy, env, states

    def reset(self) -> None:
        self.policy.reset()

    def infer(self, observation: dict[str, Any]) -> Any:
        self.states[self.env.steps] = observation[STATE_KEY]
        return self.policy.infer(observation)


class _VelocityHeard(EngineAround):
    """Also evaluates the flow field once, at the noise, and keeps the answer."""

    velocity: Tensor

    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        one_step = super().denoise(cache, state, noise, 1)
        self.velocity = noise.to(one_step) - one_step
        return super().denoise(cache, state, noise, steps)


@dataclass(frozen=True, eq=False)
class Answers:
    """A policy's answers to N observations.

    Attributes:
        actions: (N, H, dims) float64: what the robot gets, normalised with the right statistics.
        velocity: (N, H, dims) float64: the flow field's first value.
    """

    actions: np.ndarray
    velocity: np.ndarray


def answers(policy: Policy, observations: Observations, right: Normalizer, age: int = 0) -> Answers:
    """Ask a policy about every observation; the noise of each is always the same.

    Args:
        policy: broken or not.
        observations: to show it, with pictures `age` ticks old.
        right: the unbroken policy's normalisation of actions.
        age: one of `AGES`.
    """
    engine = _VelocityHeard(policy.engine)
    heard = with_engine(policy, lambda _: engine)
    dims = policy.transforms.robot.action_dim
    actions, velocities = [], []
    for index in range(len(observations)):
        shape = (policy.engine.config.horizon, policy.engine.config.action_dim)
        noise = np.random.default_rng(NOISE_SEED + index).standard_normal(shape).astype(np.float32)
        reply = heard.infer(observations.observation(index, age), noise)
        actions.append(right.normalize(np.asarray(reply["actions"], np.float64)))
        velocities.append(engine.velocity[0, :, :dims].double().cpu().numpy())
    return Answers(np.stack(actions), np.stack(velocities))


def errors(broken: Answers, right: Answers, in_velocity: bool) -> dict[str, float | None]:
    """How far off the answers are.

    Returns:
        "relative_error": ||a - r|| / ||r|| over all observations together; "median_" and "worst_relative_error": of one
        observation; "cosine" and "worst_cosine": mean and smallest over observations; "max_error": largest of one
        number, normalised; "first_step_relative_error": of the flow field's first value, None where the mistake is
        made elsewhere.
    """
    each = _norms(broken.actions - right.actions) / _norms(right.actions)
    dots = np.einsum("nhd,nhd->n", broken.actions, right.actions)
    cosine = dots / (_norms(broken.actions) * _norms(right.actions))
    return {
        "relative_error": _relative(broken.actions, right.actions),
        "median_relative_error": float(np.median(each)),
        "worst_relative_error": float(each.max()),
        "cosine": float(cosine.mean()),
        "worst_cosine": float(cosine.min()),
        "max_error": float(np.abs(broken.actions - right.actions).max()),
        "first_step_relative_error": _relative(broken.velocity, right.velocity) if in_velocity else None,
    }


def _norms(values: np.ndarray) -> np.ndarray:
    return np.linalg.norm(values.reshape(len(values), -1), axis=1)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
