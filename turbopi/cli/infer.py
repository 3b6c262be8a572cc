"""`turbo-pi infer`: one observation from a file, one chunk of actions into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console

from ..errors import InputError
from .options import PolicyOptions


def infer(
    policy: Annotated[PolicyOptions, tyro.conf.arg(name="")],
    observation: Path,
    out: Path,
    noise: Path | None = None,
) -> int:
    """Run one observation through a policy.

    Args:
        policy: which policy, and how to run it.
        observation: .npz file with the robot's keys; a nested map is written as "images/cam_high".
        out: .npz file to write: "actions" (horizon, dims), and the timing of each stage in milliseconds.
        noise: .npy file (horizon, 32) float32 to start from instead of the seeded noise.
    """
    from .tables import action_table, timing_table

    loaded = policy.load()
    values = read_observation(observation, loaded.transforms.robot.image_group)
    result = loaded.infer(values, None if noise is None else _read_noise(noise))
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, actions=result["actions"], **result["policy_timing"])
    console = Console()
    console.print(action_table(result["actions"]))
    console.print(timing_table([result["policy_timing"]]))
    console.print(f"wrote {out}")
    return 0


def read_observation(path: Path, group: str | None = None) -> dict[str, Any]:
    """The observation in an .npz file; keys below `group` become a map of their own, text arrays become text.

    Raises InputError if the file is not an .npz of plain arrays, FileNotFoundError if it is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no observation at {path}; write one with numpy.savez(path, **observation)")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise InputError(f"{path} holds a single array; write the observation with numpy.savez")
        with file:
            arrays = {key: file[key] for key in file.files}
    except InputError:
        raise
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is not an .npz file of plain arrays ({error}); write it with numpy.savez") from error
    observation: dict[str, Any] = {}
    for key, value in arrays.items():
        plain = value.item() if value.ndim == 0 and value.dtype.kind in "US" else value
        if group is not None and key.startswith(f"{group}/"):
            observation.setdefault(group, {})[key.removeprefix(f"{group}/")] = plain
        else:
            observation[key] = plain
    return observation


def _read_noise(path: Path) -> np.ndarray:
    try:
        noise = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is not an .npy file of numbers ({error}); write it with numpy.save") from error
    if not isinstance(noise, np.ndarray):
        raise InputError(f"{path} is an archive, expected a single array; write it with numpy.save")
    return noise
