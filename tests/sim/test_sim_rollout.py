from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from turbopi.errors import InputError
from turbopi.sim.rollout import EpisodeSpec, run_episode

SPEC = EpisodeSpec("libero_spatial", 3, 7, seed=11)


class CountingEnv:
    """Reaches its goal after `goal` steps, and remembers what was asked of it."""

    def __init__(self, goal: int = 10_000, unstable: int = 10_000) -> None:
        self.task = SimpleNamespace(suite="libero_spatial", index=3, prompt="p", step_limit=12)
        self.goal, self.unstable = goal, unstable
        self.looked: list[int] = []
        self.drawn: list[int] = []
        self.actions: list[np.ndarray] = []
        self.resets: list[tuple[int, int]] = []

    @property
    def steps(self) -> int:
        return len(self.actions)

    @property
    def state(self) -> np.ndarray:
        return np.full(8, np.nan if self.steps >= self.unstable else 0.0)

    def reset(self, initial_state: int, *, seed: int) -> None:
        self.resets.append((initial_state, seed))
        self.actions.clear()

    def observe(self) -> dict[str, Any]:
        self.looked.append(self.steps)
        return {"prompt": "p"}

    def frames(self) -> tuple[str, int]:
        self.drawn.append(self.steps)
        return "frame", self.steps

    def step(self, action: np.ndarray) -> bool:
        self.actions.append(action)
        return self.steps >= self.goal


class ChunkPolicy:
    """Chunk n is n + row/10 in every column, or whatever `reply` says."""

    def __init__(self, reply: Any = None) -> None:
        self.reply = reply
        self.calls = self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def infer(self, observation: dict[str, Any]) -> Any:
        self.calls += 1
        if self.reply is not None:
            return self.reply
        return {"actions": np.repeat(self.calls + np.arange(10)[:, None] / 10, 7, axis=1).astype(np.float32)}


class Film:
    def __init__(self) -> None:
        self.frames: list[int] = []
        self.closed = False

    def add(self, agentview: str, number: int) -> None:
        self.frames.append(number)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(("replan", "looked"), [(5, [0, 5, 10]), (1, list(range(12))), (10, [0, 10])])
def test_looks_only_when_it_replans(replan: int, looked: list[int]) -> None:
    env, policy = CountingEnv(), ChunkPolicy()
    result = run_episode(env, policy, SPEC, replan=replan)
    assert env.looked == looked
    assert env.drawn == []
    assert env.resets == [(7, 11)]
    assert policy.resets == 1
    played = [1 + i // replan + i % replan / 10 for i in range(12)]
    np.testing.assert_allclose([a[0] for a in env.actions], played, atol=1e-6)
    assert (result.success, result.steps, result.inferences, result.error) == (False, 12, len(looked), None)
    assert len(result.infer_ms) == len(looked)


def test_stops_at_success() -> None:
    env = CountingEnv(goal=7)
    result = run_episode(env, ChunkPolicy(), SPEC)
    assert (result.success, result.steps, result.inferences) == (True, 7, 2)


def test_a_film_has_every_frame() -> None:
    env, film = CountingEnv(goal=3), Film()
    run_episode(env, ChunkPolicy(), SPEC, video=film)
    assert film.frames == [0, 1, 2, 3]
    assert film.closed


def test_a_simulation_that_explodes_is_a_failure() -> None:
    result = run_episode(CountingEnv(unstable=2), ChunkPolicy(), SPEC)
    assert (result.success, result.steps) == (False, 2)
    assert "unstable at step 2" in str(result.error)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"actions": np.full((10, 7), np.nan)}, "70 actions that are NaN.*row 0, column 0"),
        ({"actions": np.where(np.arange(70).reshape(10, 7) == 15, np.inf, 0)}, "1 actions that.*row 2, column 1"),
        ({"actions": np.zeros((4, 7))}, "horizon of 4 actions, fewer than replan 5"),
        ({"actions": np.zeros((10, 14))}, r"\(10, 14\).*expected \(H, 7\).*LIBERO policy"),
        ({"actions": np.zeros((1, 10, 7))}, r"\(1, 10, 7\)"),
        ({"actions": [["a"] * 7] * 10}, r"\(10, 7\) <U1"),
        ({"action": 1}, r"\['action'\] without 'actions'"),
        ([1], "list without 'actions'"),
    ],
)
def test_bad_replies(reply: Any, message: str) -> None:
    film = Film()
    with pytest.raises(InputError, match=message):
        run_episode(CountingEnv(), ChunkPolicy(reply), SPEC, video=film)
    assert film.closed


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match="replan is 0"):
        run_episode(CountingEnv(), ChunkPolicy(), SPEC, replan=0)
    with pytest.raises(ValueError, match=r"libero_spatial task 3.*task 4"):
        run_episode(CountingEnv(), ChunkPolicy(), EpisodeSpec("libero_spatial", 4, 0, 0))
