"""Demonstrations from the scripted expert on random resets, with perturbed rollouts that the expert relabels.

The official initial states are never used. What is executed is the expert's action plus noise and short bursts of
displacement, or a policy's action; what is recorded at every tick is the expert's clean answer to the state it finds
itself in, so that the data shows how to recover. In half of the scenes that have another task's bowl too, the prompt
asks for that one: otherwise the scene alone would tell what to do, and language would not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ..sim.expert import SpatialExpert
from ..sim.libero import LiberoEnv, load_task
from ..sim.other_bowl import GOAL, OTHER, SUITE, TARGET, TASKS, other_prompts
from ..transforms import resize_with_pad
from .episodes import Episode, save_episode

PLACED_CM = 3.0
HOLD_TICKS = 4
"""Ticks recorded after success: the policy must learn to let go and stay away."""


@dataclass(frozen=True)
class DemoConfig:
    """What to generate.

    Attributes:
        out: directory of the episode files.
        episodes: per task.
        tasks: indices in libero_spatial.
        processes: simulations at a time.
        image_size: of the stored frames, the model's.
        first_seed: episode e of task t is reset with seed first_seed + 1000·e + t.
        noise: largest standard deviation of noise on the executed action; each episode draws its own.
        bursts: chance per tick that a displacement starts.
        other_bowl: share of episodes, where the scene allows, that ask for the other bowl.
        checkpoint: a policy that acts instead of the expert in `policy_share` of the ticks (relabelling its mistakes).
        policy_share: see `checkpoint`.
    """

    out: Path
    episodes: int = 100
    tasks: tuple[int, ...] = tuple(range(TASKS))
    processes: int = 2
    image_size: int = 112
    first_seed: int = 1_000_000
    noise: float = 0.3
    bursts: float = 0.02
    other_bowl: float = 0.3
    checkpoint: Path | None = None
    policy_share: float = 0.7

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.processes < 1:
            raise ValueError(f"need at least one episode and process, got {self.episodes} and {self.processes}")
        unknown = [t for t in self.tasks if not 0 <= t < TASKS]
        if unknown:
            raise ValueError(f"{SUITE} has tasks 0..{TASKS - 1}, got {unknown}")


def generate(config: DemoConfig) -> Iterator[tuple[int, bool]]:
    """Make the episodes that are not there yet; yields (task, whether it was kept) as they end.

    An episode that the expert does not finish within the task's step limit is not kept.
    """
    jobs = [(task, config.first_seed + 1000 * e + task) for e in range(config.episodes) for task in config.tasks]
    todo = [(task, seed) for task, seed in jobs if not _file(config, task, seed).exists()]
    with ProcessPoolExecutor(config.processes, mp_context=get_context("spawn")) as pool:
        pending = [pool.submit(make_episode, config, task, seed) for task, seed in todo]
        for future in as_completed(pending):
            yield future.result()


def _file(config: DemoConfig, task: int, seed: int) -> Path:
    return config.out / f"task{task}_seed{seed}.npz"


@cache
def _env(index: int) -> LiberoEnv:
    """One simulation per task and process: making one takes seconds."""
    return LiberoEnv(load_task(SUITE, index))


@cache
def _policy(checkpoint: Path) -> Any:
    from ..policy import load_policy

    return load_policy(checkpoint)


def make_episode(config: DemoConfig, index: int, seed: int) -> tuple[int, bool]:
    """Generate one episode and write it if it succeeds. Returns the task and whether it was written."""
    rng = np.random.default_rng(seed)
    env = _env(index)
    env.reset(seed=seed)
    other = index in other_prompts() and rng.random() < config.other_bowl
    prompt = other_prompts()[index] if other else env.task.prompt
    recorder = _Recorder(config, env, prompt, OTHER if other else TARGET, rng)
    if not recorder.run():
        return index, False
    meta = {"prompt": prompt, "task": index, "seed": seed, "other_bowl": other, "noise": recorder.noise}
    save_episode(_file(config, index, seed), recorder.episode(meta))
    return index, True


class _Recorder:
    """One episode in the making."""

    def __init__(self, config: DemoConfig, env: LiberoEnv, prompt: str, target: str, rng: np.random.Generator) -> None:
        self.config, self.env, self.prompt, self.target, self.rng = config, env, prompt, target, rng
        self.noise = float(rng.uniform(0, config.noise))
        self.expert = SpatialExpert(env, target, GOAL)
        self.frames: list[np.ndarray] = []
        self.states: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.burst: tuple[int, np.ndarray] = (0, np.zeros(6))
        self.chunk: list[np.ndarray] = []

    def run(self) -> bool:
        """Act until the bowl stands on the plate, and a little longer; False if that takes too long."""
        after = 0
        for _ in range(self.env.task.step_limit):
            clean = np.clip(self.expert.act(), -1.0, 1.0)
            self._record(clean)
            self.env.step(self._executed(clean))
            after = after + 1 if self._placed() else 0
            if after > HOLD_TICKS:
                return True
        return False

    def episode(self, meta: dict[str, Any]) -> Episode:
        """What was recorded."""
        return Episode(np.stack(self.frames), np.stack(self.states), np.stack(self.actions), meta)

    def _record(self, clean: np.ndarray) -> None:
        observation = self.env.observe()
        self.seen = {**observation, "prompt": self.prompt}
        names = ("observation/image", "observation/wrist_image")
        self.frames.append(np.stack([resize_with_pad(observation[n], self.config.image_size, n) for n in names]))
        self.states.append(observation["observation/state"].astype(np.float32))
        self.actions.append(clean.astype(np.float32))

    def _executed(self, clean: np.ndarray) -> np.ndarray:
        action = clean.copy()
        if self.config.checkpoint is not None and self.rng.random() < self.config.policy_share:
            if not self.chunk:
                self.chunk = list(_policy(self.config.checkpoint).infer(self.seen)["actions"][:5])
            action = np.asarray(self.chunk.pop(0), float)
        left, push = self.burst
        if left == 0 and self.rng.random() < self.config.bursts:
            direction = self.rng.normal(size=6) * [1, 1, 1, 0.3, 0.3, 0.3]
            left, push = int(self.rng.integers(3, 9)), 0.7 * direction / np.linalg.norm(direction)
        if left:
            action[:6] += push
        self.burst = (max(left - 1, 0), push)
        action[:6] += self.noise * self.rng.normal(size=6) * [1, 1, 1, 0.3, 0.3, 0.3]
        return np.clip(action, -1.0, 1.0)

    def _placed(self) -> bool:
        """Whether the wanted bowl stands on the plate and the hand has let go."""
        if self.target == TARGET:
            return self.env.success
        poses = self.env.poses()
        apart = poses[self.target][0] - poses[GOAL][0]
        fingers = self.env.state[6:8]
        centred = 100 * float(np.hypot(*apart[:2])) < PLACED_CM
        return bool(centred and abs(apart[2]) < 0.05 and abs(fingers[0] - fingers[1]) > 0.06)


def kept_per_task(results: Sequence[tuple[int, bool]]) -> dict[int, tuple[int, int]]:
    """Task -> (episodes kept, episodes tried)."""
    counts: dict[int, tuple[int, int]] = {}
    for task, kept in results:
        before = counts.get(task, (0, 0))
        counts[task] = (before[0] + kept, before[1] + 1)
    return dict(sorted(counts.items()))
