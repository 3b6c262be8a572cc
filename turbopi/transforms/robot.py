"""What a robot is to a policy: its observation's keys, its cameras' slots, its state and its actions (SPEC 2.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import ModelKind
from ..errors import InputError
from .images import ImageLayout
from .prompt import parse_prompt

SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""openpi's camera slots, in the model's order."""

Vector = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Camera:
    """One camera: the observation's key (inside `Robot.image_group`, if that is set) and the slot it fills."""

    key: str
    slot: str
    required: bool = True


@dataclass(frozen=True)
class StatePart:
    """A piece of the state: `size` numbers under `key`; a bare number will do for one."""

    key: str
    size: int


@dataclass(frozen=True)
class KindDefaults:
    """What openpi's published models of one kind assume about this robot.

    Attributes:
        horizon: actions per chunk, a hint for checkpoints that do not say.
        asset_id: directory of the norm stats under CHECKPOINT/assets, if there is a customary one.
        state_in_prompt: whether the prompt spells the state.
        absolute_mask: dimensions whose actions are relative to the state; None: none are.
    """

    horizon: int
    asset_id: str | None = None
    state_in_prompt: bool = False
    absolute_mask: tuple[bool, ...] | None = None


def _same(values: np.ndarray) -> np.ndarray:
    return values


@dataclass(frozen=True)
class RobotSpace:
    """Maps between a robot's own joint space and the one the model was trained in. Each pair is mutually inverse.

    All take and give (..., dims) arrays. The default is the identity.
    """

    state_to_model: Vector = _same
    state_to_robot: Vector = _same
    actions_to_robot: Vector = _same
    actions_to_model: Vector = _same


@dataclass(frozen=True)
class Robot:
    """A robot, as data.

    Attributes:
        name: as users write it.
        cameras: in the order of the model's slots; slots beyond them are missing cameras.
        state: the pieces that make up the state, in order.
        action_dim: numbers per action.
        defaults: per model kind.
        image_group: key of the mapping that holds the images; None: they are in the observation itself.
        ignored_cameras: keys of `image_group` that may be sent and are not used.
        image_layout: "chw" where frames come as 3 × height × width, otherwise either way.
        prompt_keys: keys of the task, the first one present counts.
        space: to and from the model's joint space.
        missing_last: put missing cameras after the present ones (lerobot, trap 44) instead of leaving their slot empty.
        metadata: what the server tells a client when it connects.
    """

    name: str
    cameras: tuple[Camera, ...]
    state: tuple[StatePart, ...]
    action_dim: int
    defaults: Mapping[ModelKind, KindDefaults]
    image_group: str | None = None
    ignored_cameras: tuple[str, ...] = ()
    image_layout: ImageLayout = "auto"
    prompt_keys: tuple[str, ...] = ("prompt",)
    space: RobotSpace = RobotSpace()
    missing_last: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state_dim(self) -> int:
        """Numbers in the state."""
        return sum(part.size for part in self.state)

    def image_name(self, camera: Camera) -> str:
        """The camera's key as a user would look for it."""
        return camera.key if self.image_group is None else f"{self.image_group}/{camera.key}"

    def default(self, kind: ModelKind) -> KindDefaults:
        """What a model kind assumes about this robot; ValueError if the robot is not made for that kind."""
        if kind not in self.defaults:
            raise ValueError(f"robot {self.name!r} is described for {', '.join(self.defaults)} only, not for {kind!r}")
        return self.defaults[kind]

    def read_state(self, observation: Mapping[str, Any]) -> np.ndarray:
        """Collect the state from an observation.

        Returns:
            (state_dim,) in the model's joint space and un-normalised, of numpy's promoted dtype.

        Raises:
            InputError: a missing key, a wrong length or dtype, NaN or infinite values.
        """
        parts = [_read_part(observation, part) for part in self.state]
        return self.space.state_to_model(np.concatenate(parts))

    def read_images(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The frames that are present, by camera key, unchecked.

        Raises:
            InputError: a required camera, or every camera, is missing; the group is absent, or holds unknown cameras.
        """
        images = observation
        if self.image_group is not None:
            images = _require(observation, self.image_group)
            if not isinstance(images, Mapping):
                raise InputError(f"{self.image_group} is a {type(images).__name__}, expected a map of camera → frame")
            known = {camera.key for camera in self.cameras} | set(self.ignored_cameras)
            unknown = sorted(str(key) for key in images if key not in known)
            if unknown:
                raise InputError(
                    f"{self.image_group} has unknown cameras {', '.join(unknown)}; send only {', '.join(sorted(known))}"
                )
        missing = [self.image_name(camera) for camera in self.cameras if camera.required and camera.key not in images]
        present = {camera.key: images[camera.key] for camera in self.cameras if camera.key in images}
        if missing or not present:
            expected = ", ".join(missing or map(self.image_name, self.cameras))
            raise InputError(
                f"the observation has no {'' if missing else 'camera frame, expected one of '}{expected}; "
                f"it has {_keys(images)}; send the frame under that key"
            )
        return present

    def read_prompt(self, observation: Mapping[str, Any], default: str | None) -> str:
        """The task, or the default where the observation has none.

        Raises:
            InputError: neither is there, or it is not text.
        """
        for key in self.prompt_keys:
            if key in observation:
                return parse_prompt(observation[key], key)
        if default is None:
            keys = " or ".join(self.prompt_keys)
            raise InputError(f"the observation has no {keys} and the policy no default prompt; send the task as text")
        return default


def _read_part(observation: Mapping[str, Any], part: StatePart) -> np.ndarray:
    values = np.asarray(_require(observation, part.key))
    if values.dtype.kind not in "fiu":
        raise InputError(f"{part.key} has dtype {values.dtype}, expected real numbers (float32 or float64)")
    if values.ndim == 0 and part.size == 1:
        values = values[None]
    if values.shape != (part.size,):
        raise InputError(
            f"{part.key} has shape {values.shape}, expected ({part.size},); send the state of one moment, not batched"
        )
    if not np.isfinite(values).all():
        raise InputError(f"{part.key} has NaN or infinite values: {values.tolist()}; send finite numbers")
    return values


def _require(observation: Mapping[str, Any], key: str) -> Any:
    if key not in observation:
        raise InputError(f"the observation has no {key}; it has {_keys(observation)}; send it under that key")
    return observation[key]


def _keys(observation: Mapping[str, Any]) -> str:
    return ", ".join(sorted(str(key) for key in observation)[:20]) or "nothing"
