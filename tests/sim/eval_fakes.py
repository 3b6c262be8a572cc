"""A simulation and policies of a few lines, for evaluations in real worker processes.

`python eval_fakes.py OUT STEP_SECONDS` evaluates them as `turbo-pi eval` would, to be killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from turbopi.sim.evaluate import EvalConfig, evaluate

TASKS, TRIALS = (0, 1, 2), 4


class FakeEnv:
    """Succeeds once the actions' sum passes what task and initial state ask for."""

    def __init__(self, suite: str, task: int, step_s: float) -> None:
        self.task = SimpleNamespace(suite=suite, index=task, name=f"t{task}", prompt=f"do {task}", step_limit=8)
        self.step_s = step_s
        self.asked: bool | None = None

    def reset(self, initial_state: int | None = None, *, seed: int | None = None, idle_steps: int = 10) -> None:
        self.initial_state = initial_state or 0
        self.total, self.steps, self.success = 0.0, 0, False

    def step(self, action: np.ndarray) -> bool:
        time.sleep(self.step_s)
        self.steps += 1
        self.total += float(action[0])
        self.success = self.total > 4 + self.task.index + self.initial_state
        return self.success

    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        frame = np.full((32, 32, 3), 20 * self.steps % 256, np.uint8)
        return frame, frame

    @property
    def state(self) -> np.ndarray:
        return np.array([self.task.index, self.initial_state, self.steps, 0, 0, 0, 0, 0], float)

    def observe(self, image_size: int = 224) -> dict[str, Any]:
        image, wrist = self.frames()
        return {
            "observation/image": image,
            "observation/wrist_image": wrist,
            "observation/state": self.state,
            "prompt": self.task.prompt,
        }

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class FakeScenes:
    step_s: float = 0.0

    def prepare(self, suite: str, tasks: tuple[int, ...], trials: int) -> dict[str, Any]:
        return {"simulator": "fake"}

    def open(self, suite: str, task: int) -> FakeEnv:
        return FakeEnv(suite, task, self.step_s)


class FakePolicy:
    """Acts with its strength plus noise from the episode's seed."""

    def __init__(self, source: FakeSource) -> None:
        self.source = source
        self.rng = np.random.default_rng(0)
        self.seed = 0

    def describe(self) -> dict[str, Any]:
        return {"strength": self.source.strength}

    def episode(self, noise_seed: int) -> FakePolicy:
        self.seed = noise_seed
        return self

    def reset(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        where = tuple(int(v) for v in observation["observation/state"][:2])
        if where == self.source.at:
            return self._mischief()
        return {"actions": self.source.strength + 0.1 * self.rng.standard_normal((10, 7))}

    def _mischief(self) -> dict[str, Any]:
        kind, mark = self.source.mischief, Path(self.source.mark)
        if kind == "once":
            if mark.exists():
                return {"actions": np.full((10, 7), self.source.strength)}
            mark.touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "always":
            with mark.open("a") as file:
                file.write("x")
            os._exit(7)
        if kind == "raise":
            raise RuntimeError("the arm fell off")
        if kind == "hang":
            time.sleep(600)
        if kind == "nan":
            return {"actions": np.full((10, 7), np.nan)}
        if kind == "short":
            return {"actions": np.zeros((2, 7))}
        raise AssertionError(kind)


@dataclass(frozen=True)
class FakeSource:
    strength: float = 1.0
    mischief: str = ""
    at: tuple[int, int] = (-1, -1)
    mark: str = ""

    def describe(self) -> dict[str, Any]:
        return {"strength": self.strength, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}

    def open(self) -> FakePolicy:
        if self.mischief == "stillborn":
            print("no memory for the weights", flush=True)
            os._exit(3)
        if self.mischief == "misfit":
            raise ValueError("the checkpoint is for robot 'aloha'")
        return FakePolicy(self)


def fake_config(out: Path, step_s: float = 0.0, **changes: Any) -> EvalConfig:
    options = {"source": FakeSource(), "scenes": FakeScenes(step_s), "suite": "fake", "tasks": TASKS, "trials": TRIALS}
    return EvalConfig(out, **{**options, **changes})


def main() -> None:
    evaluate(fake_config(Path(sys.argv[1]), float(sys.argv[2])))


if __name__ == "__main__":
    # Under its own name, so that workers find what they are sent.
    import eval_fakes

    eval_fakes.main()
