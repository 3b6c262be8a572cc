"""Frames of the policy's own episodes, for calibration."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("libero")

from turbopi import load_policy
from turbopi.checkpoint import init_checkpoint
from turbopi.frames.rollouts import Rollouts, rollout_frames
from turbopi.sim import libero

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "pi05-libero-small"


def test_looks_are_spread_over_an_episode_and_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(libero.STEP_LIMITS, "libero_spatial", 6)
    policy = load_policy(CHECKPOINT, device="cpu", steps=2)
    told: list[tuple[int, bool]] = []
    rollouts = Rollouts("libero_spatial", episodes=1, looks=2, camera_px=64)
    frames = list(rollout_frames(policy, rollouts, lambda steps, success: told.append((steps, success))))
    assert told == [(6, False)]
    assert len(frames) == 2
    assert not np.array_equal(frames[0]["observation/state"], frames[1]["observation/state"])
    assert policy.infer(frames[1])["actions"].shape == (10, 7)


def test_what_cannot_be_played(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="looks must be at least 1"):
        Rollouts("libero_spatial", looks=0)
    droid = load_policy(init_checkpoint(tmp_path / "ck", "pi05-tiny", weights="hash", robot="droid"), device="cpu")
    with pytest.raises(ValueError, match="the checkpoint is for robot 'droid'"):
        list(rollout_frames(droid, Rollouts("libero_spatial")))
