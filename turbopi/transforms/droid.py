"""DROID: a Franka arm with one outside and one wrist camera, joint actions (SPEC 2.3)."""

from __future__ import annotations

from .robot import SLOTS, Camera, KindDefaults, Robot, StatePart

DROID = Robot(
    name="droid",
    cameras=(
        Camera("observation/exterior_image_1_left", SLOTS[0]),
        Camera("observation/wrist_image_left", SLOTS[1]),
    ),
    state=(StatePart("observation/joint_position", 7), StatePart("observation/gripper_position", 1)),
    action_dim=8,
    defaults={
        "pi0": KindDefaults(horizon=10, asset_id="droid"),
        "pi05": KindDefaults(horizon=15, asset_id="droid", state_in_prompt=True),
    },
)
