"""A robot from a lerobot checkpoint's own description: whatever features its config.json lists (SPEC 3, trap 44)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .robot import Camera, KindDefaults, Robot, StatePart

_STATE = "observation.state"
_IMAGES = "observation.images"


def robot_from_lerobot(config: Mapping[str, Any], name: str = "lerobot") -> Robot:
    """Describe the robot of a lerobot π0 or π0.5 checkpoint.

    Observations use lerobot's keys: each "observation.images.…" frame, "observation.state", and "task" (or "prompt").
    At least one camera must be sent; missing ones go after those present, as lerobot orders them.

    Args:
        config: the checkpoint's config.json.
        name: for the robot.

    Raises:
        ValueError: names the missing or malformed field.
    """
    kind = config.get("type")
    if kind not in ("pi0", "pi05"):
        raise ValueError(f"lerobot config.json has type {kind!r}, expected 'pi0' or 'pi05'")
    inputs, outputs = (_mapping(config, field) for field in ("input_features", "output_features"))
    cameras = [key for key, feature in inputs.items() if _type(feature) == "VISUAL"]
    # lerobot adds these when it loads a config; a config saved earlier may not list them yet.
    empty = config.get("empty_cameras") or 0
    if not isinstance(empty, int) or empty < 0:
        raise ValueError(f"lerobot config.json has empty_cameras {empty!r}, expected a number of cameras")
    padding = (f"{_IMAGES}.empty_camera_{i}" for i in range(empty))
    cameras += [key for key in padding if key not in cameras]
    if not cameras:
        raise ValueError("lerobot config.json lists no VISUAL feature in input_features; a π model needs a camera")
    action_dim = _length(outputs, "action", "output_features")
    horizon = config.get("chunk_size")
    if not isinstance(horizon, int) or horizon < 1:
        raise ValueError(f"lerobot config.json has chunk_size {horizon!r}, expected the number of actions per chunk")
    mask = _relative_mask(config, action_dim) if config.get("use_relative_actions") else None
    defaults = KindDefaults(horizon=horizon, state_in_prompt=kind == "pi05", absolute_mask=mask)
    return Robot(
        name=name,
        cameras=tuple(Camera(key, key.removeprefix(f"{_IMAGES}."), required=False) for key in cameras),
        state=(StatePart(_STATE, _length(inputs, _STATE, "input_features")),),
        action_dim=action_dim,
        defaults={kind: defaults},
        prompt_keys=("task", "prompt"),
        missing_last=True,
    )


def _mapping(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = config.get(field)
    if not isinstance(value, Mapping):
        raise ValueError(f"lerobot config.json has no {field}; it does not say what the robot sends and takes")
    return value


def _type(feature: Any) -> Any:
    return feature.get("type") if isinstance(feature, Mapping) else None


def _length(features: Mapping[str, Any], key: str, field: str) -> int:
    shape = features[key].get("shape") if isinstance(features.get(key), Mapping) else None
    if not isinstance(shape, Sequence) or len(shape) != 1 or not isinstance(shape[0], int) or shape[0] < 1:
        raise ValueError(f"lerobot config.json has {field}[{key!r}] with shape {shape!r}, expected one length, [n]")
    return shape[0]


def _relative_mask(config: Mapping[str, Any], action_dim: int) -> tuple[bool, ...]:
    """lerobot keeps a dimension absolute if its name contains an excluded word; unnamed dimensions are relative."""
    excluded = [str(word).lower() for word in config.get("relative_exclude_joints") or () if word]
    names = [str(name).lower() for name in config.get("action_feature_names") or ()][:action_dim]
    named = [not any(word in name for word in excluded) for name in names]
    return tuple(named + [True] * (action_dim - len(named)))
