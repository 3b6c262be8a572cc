"""LIBERO: a simulated Franka arm, two cameras, end-effector actions (SPEC 2.3)."""

from __future__ import annotations

from .actions import action_mask
from .robot import SLOTS, Camera, KindDefaults, Robot, StatePart

_ASSET = "physical-intelligence/libero"

LIBERO = Robot(
    name="libero",
    cameras=(Camera("observation/image", SLOTS[0]), Camera("observation/wrist_image", SLOTS[1])),
    # End-effector position (3), axis-angle (3), the two gripper joints.
    state=(StatePart("observation/state", 8),),
    # Position and rotation (6), gripper.
    action_dim=7,
    defaults={
        "pi0": KindDefaults(horizon=50, asset_id=_ASSET, absolute_mask=action_mask(6, -1)),
        # openpi trains pi05_libero without the state in the prompt, and on actions as they are (traps 38 and 40).
        "pi05": KindDefaults(horizon=10, asset_id=_ASSET, state_in_prompt=False),
    },
)
