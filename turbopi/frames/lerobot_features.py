"""Which feature of a LeRobot dataset is which key of a robot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..transforms import Robot

_IMAGES = ("image", "video")


@dataclass(frozen=True)
class Matched:
    """Features by the robot's keys: cameras' (inside the robot's image group), and the parts of the state."""

    cameras: Mapping[str, str]
    state: Mapping[str, str]


def match_features(features: Mapping[str, Mapping[str, Any]], robot: Robot, given: Mapping[str, str]) -> Matched:
    """Find the robot's cameras and state among a dataset's features.

    A feature belongs to the key of the same name, else to that with the same last part: "observation.images.wrist" to
    "observation/wrist".

    Args:
        features: of meta/info.json.
        robot: whose keys to find.
        given: features by key, where the user says so.

    Raises:
        InputError: a key without a feature, lengths that differ, unknown names in `given`; lists what there is.
    """
    pictures = [name for name, feature in features.items() if feature.get("dtype") in _IMAGES]
    numbers = [name for name, feature in features.items() if feature.get("dtype") not in _IMAGES]
    keys = {robot.image_name(camera) for camera in robot.cameras} | {part.key for part in robot.state}
    stray = [f"{key}={name}" for key, name in given.items() if key not in keys or name not in features]
    if stray:
        raise InputError(
            f"--features names {', '.join(stray)}; robot {robot.name!r} has the keys {', '.join(sorted(keys))}, the "
            f"dataset the features {', '.join(features)}"
        )
    cameras = {}
    for camera in robot.cameras:
        feature = _find(robot.image_name(camera), pictures, given, robot, required=camera.required)
        if feature is not None:
            cameras[camera.key] = feature
    if not cameras:
        _find(robot.image_name(robot.cameras[0]), pictures, given, robot, required=True)
    state = {}
    for part in robot.state:
        feature = _find(part.key, numbers, given, robot, required=True)
        assert feature is not None
        shape = tuple(features[feature].get("shape", ()))
        if shape not in ((part.size,), () if part.size == 1 else None):
            raise InputError(
                f"the dataset's {feature} has shape {shape}, robot {robot.name!r} sends {part.size} numbers as "
                f"{part.key}: is it a dataset of another robot?"
            )
        state[part.key] = feature
    return Matched(cameras, state)


def _find(key: str, names: list[str], given: Mapping[str, str], robot: Robot, *, required: bool) -> str | None:
    if key in given:
        return given[key]
    if key in names:
        return key
    alike = [name for name in names if _last(name) == _last(key)]
    if len(alike) == 1:
        return alike[0]
    if not required and not alike:
        return None
    found = "more than one feature" if alike else "no feature"
    raise InputError(
        f"the dataset has {found} for {key} of robot {robot.name!r}; it has "
        f"{', '.join(names) or 'none of that kind'}: say which with --features {key}=FEATURE"
    )


def _last(name: str) -> str:
    return re.split(r"[./]", name)[-1]
