"""The shipped policy in the real simulator, software-rendered: it must finish its task."""

from pathlib import Path

import pytest

pytest.importorskip("libero")

from turbopi import load_policy
from turbopi.sim.libero import LiberoEnv, load_task
from turbopi.sim.rollout import EpisodeSpec, run_episode

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "pi05-libero-small"
FIXTURES = 7


@pytest.mark.parametrize("task", [2, 5])
def test_the_shipped_policy_finishes_its_task(task: int) -> None:
    policy = load_policy(CHECKPOINT, device="cpu")
    with LiberoEnv(load_task("libero_spatial", task)) as env:
        result = run_episode(env, policy, EpisodeSpec("libero_spatial", task, 0, FIXTURES), replan=5)
    assert result.success
    assert result.steps < 140
    assert result.inferences == -(-result.steps // 5)
