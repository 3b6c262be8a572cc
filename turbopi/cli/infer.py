"""`turbo-pi infer`: one observation from a file, one chunk of actions into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console

from ..errors import InputError
from ..frames import read_observation
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
    if out.suffix != ".npz":
        out = out.with_name(f"{out.name}.npz")  # as numpy would, so that the path told is the file's
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, actions=result["actions"], **result["policy_timing"])
    console = Console()
    console.print(action_table(result["actions"]))
    console.print(timing_table([result["policy_timing"]]))
    console.print(f"wrote {out}")
    return 0


def _read_noise(path: Path) -> np.ndarray:
    try:
        noise = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is not an .npy file of numbers ({error}); write it with numpy.save") from error
    if not isinstance(noise, np.ndarray):
        raise InputError(f"{path} is an archive, expected a single array; write it with numpy.save")
    return noise
