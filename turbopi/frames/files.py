"""Observations in .npz files: one a file, as `turbo-pi infer` and the server's recordings have it, or many in one.

A file of many has the robot's keys with a first axis of N, and a prompt for each or one for all. Raw LIBERO frames
("agentview" and "wrist" as the simulator draws them, upside down) are read too.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..errors import InputError
from ..transforms import Robot

Observation = dict[str, Any]
LIBERO_CAMERAS = {"observation/image": "agentview", "observation/wrist_image": "wrist"}
"""The policy's keys, and those of raw frames."""


def read_frames(path: str | Path, robot: Robot) -> list[Observation]:
    """The observations in an .npz file, or in all .npz files of a directory in the order of their names.

    Raises FileNotFoundError, or InputError that names the file and what is wrong with it.
    """
    place = Path(path)
    if not place.is_dir():
        return _read_file(place, robot)
    files = sorted(place.glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"no .npz files in {place}; record some with `turbo-pi serve --record {place}`")
    return [frame for file in files for frame in _read_file(file, robot)]


def _read_file(file: Path, robot: Robot) -> list[Observation]:
    values = _read_arrays(file)
    if set(LIBERO_CAMERAS.values()) <= set(values):
        values = _raw_libero(values, file)
    if not _holds_many(values, robot, file):
        return [_grouped(values, robot.image_group)]
    keys = [key for key in values if values[key].ndim > 0]
    counts = {key: len(values[key]) for key in keys}
    if len(set(counts.values())) != 1:
        raise InputError(f"{file} holds arrays of different lengths: {counts}; every key needs one entry a frame")
    frames = next(iter(counts.values()))
    return [
        _grouped({key: value[i] if key in keys else value for key, value in values.items()}, robot.image_group)
        for i in range(frames)
    ]


def _raw_libero(values: Mapping[str, np.ndarray], file: Path) -> dict[str, np.ndarray]:
    missing = [key for key in ("state", "prompt") if key not in values]
    if missing:
        raise InputError(f"{file} holds raw LIBERO frames without {' and '.join(missing)}; a policy needs both")
    for raw in LIBERO_CAMERAS.values():
        if values[raw].ndim not in (3, 4):
            raise InputError(
                f"{file}: {raw} has shape {values[raw].shape}, expected (H,W,3), or (N,H,W,3) for N frames"
            )
    turned = {key: values[raw][..., ::-1, ::-1, :] for key, raw in LIBERO_CAMERAS.items()}
    return {**turned, "observation/state": values["state"], "prompt": values["prompt"]}


def _holds_many(values: Mapping[str, np.ndarray], robot: Robot, file: Path) -> bool:
    """Whether a state has an axis more than one moment's. Raises InputError where there is no state."""
    parts = [part for part in robot.state if part.key in values]
    if not parts:
        keys = ", ".join(part.key for part in robot.state)
        raise InputError(
            f"{file} has no {keys}, which robot {robot.name!r} sends; it has {', '.join(sorted(values)[:12])}: are the "
            "frames of another robot?"
        )
    return values[parts[0].key].ndim > (0 if parts[0].size == 1 and values[parts[0].key].ndim == 0 else 1)


def _grouped(values: Mapping[str, np.ndarray], group: str | None) -> Observation:
    """Keys below `group` become a map of their own, text arrays become text."""
    observation: Observation = {}
    for key, value in values.items():
        text = np.ndim(value) == 0 and np.asarray(value).dtype.kind in "US"
        plain: Any = np.asarray(value).item() if text else value
        if group is not None and key.startswith(f"{group}/"):
            observation.setdefault(group, {})[key.removeprefix(f"{group}/")] = plain
        else:
            observation[key] = plain
    return observation


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"no observation at {path}; write one with numpy.savez(path, **observation)")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise InputError(f"{path} holds a single array; write the observation with numpy.savez")
        with file:
            return {key: file[key] for key in file.files}
    except InputError:
        raise
    except (ValueError, OSError, EOFError, BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is not an .npz file of plain arrays ({error}); write it with numpy.savez") from error


def read_observation(path: Path, group: str | None = None) -> Observation:
    """The one observation in an .npz file; keys below `group` become a map of their own, text arrays become text.

    Raises InputError if the file is not an .npz of plain arrays, FileNotFoundError if it is not there.
    """
    return _grouped(_read_arrays(path), group)
