"""ALOHA: two ViperX arms, up to four cameras sent channels first, 14 joints (SPEC 2.3).

The π models were trained with some joints turned the other way, and with grippers measured as motor angles where
ALOHA reports how far the fingers are apart. `to_model` maps below go into that space, `to_robot` maps come back.
"""

from __future__ import annotations

import numpy as np

from .actions import action_mask
from .robot import SLOTS, Camera, KindDefaults, Robot, RobotSpace, StatePart

_FLIP = np.array([1, -1, -1, 1, 1, 1, 1] * 2)
_GRIPPERS = [6, 13]

# Finger position of the open and closed gripper, and the crank that moves it (metres).
_FINGER = (0.01844, 0.05800)
_HORN, _ARM = 0.022, 0.036
# Motor angles (radians) that the models' state calls 0 and 1, and those that ALOHA's commands call 0 and 1.
_MODEL_ANGLE = (0.5476, 1.6296)
_COMMAND_ANGLE = (-0.6213, 1.4910)


def _to_unit(x: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    return (x - span[0]) / (span[1] - span[0])


def _from_unit(x: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    return x * (span[1] - span[0]) + span[0]


def _with_grippers(values: np.ndarray, grippers: np.ndarray) -> np.ndarray:
    """Flip the joints and put the grippers in; the flips are their own inverse."""
    flipped: np.ndarray = _FLIP * values
    # Whole numbers cannot hold an angle: it would be cut to one.
    flipped = flipped.astype(np.result_type(flipped, grippers), copy=False)
    flipped[..., _GRIPPERS] = grippers
    return flipped


def state_to_model(state: np.ndarray) -> np.ndarray:
    """(..., 14) ALOHA state to the model's: joints flipped, gripper opening to motor angle, both as 0..1.

    Openings that the crank cannot reach are clipped to its end.
    """
    finger = _from_unit(state[..., _GRIPPERS], _FINGER)
    with np.errstate(divide="ignore"):  # a finger at exactly 0 is beyond the crank: ±inf, then clipped
        sine = (_HORN**2 + finger**2 - _ARM**2) / (2 * _HORN * finger)
    return _with_grippers(state, _to_unit(np.arcsin(np.clip(sine, -1.0, 1.0)), _MODEL_ANGLE))


def state_to_robot(state: np.ndarray) -> np.ndarray:
    """The inverse of `state_to_model`, for openings that the crank can reach."""
    reach = _HORN * np.sin(_from_unit(state[..., _GRIPPERS], _MODEL_ANGLE))
    finger = reach + np.sqrt(reach**2 + _ARM**2 - _HORN**2)
    return _with_grippers(state, _to_unit(finger, _FINGER))


def actions_to_robot(actions: np.ndarray) -> np.ndarray:
    """(..., 14) model actions to ALOHA's: joints flipped, gripper angle to a command in 0..1."""
    return _with_grippers(actions, _to_unit(actions[..., _GRIPPERS] + _MODEL_ANGLE[0], _COMMAND_ANGLE))


def actions_to_model(actions: np.ndarray) -> np.ndarray:
    """The inverse of `actions_to_robot`."""
    return _with_grippers(actions, _from_unit(actions[..., _GRIPPERS], _COMMAND_ANGLE) - _MODEL_ANGLE[0])


_MASK = action_mask(6, -1, 6, -1)

ALOHA = Robot(
    name="aloha",
    cameras=(
        Camera("cam_high", SLOTS[0]),
        Camera("cam_left_wrist", SLOTS[1], required=False),
        Camera("cam_right_wrist", SLOTS[2], required=False),
    ),
    state=(StatePart("state", 14),),
    action_dim=14,
    defaults={
        "pi0": KindDefaults(horizon=50, asset_id="trossen", absolute_mask=_MASK),
        "pi05": KindDefaults(horizon=50, asset_id="trossen", state_in_prompt=True, absolute_mask=_MASK),
    },
    image_group="images",
    ignored_cameras=("cam_low",),
    image_layout="chw",
    space=RobotSpace(state_to_model, state_to_robot, actions_to_robot, actions_to_model),
    metadata={"reset_pose": [0, -1.5, 1.5, 0, 0, 0]},
)
