"""`turbo-pi init`: a fresh checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

Preset = Literal["pi0", "pi05", "pi0-small", "pi05-small", "pi05-libero-small", "pi0-tiny", "pi05-tiny"]


def init(
    directory: Annotated[Path, tyro.conf.Positional],
    preset: Preset = "pi05-small",
    weights: Literal["random", "hash"] = "random",
    seed: int = 0,
    robot: str = "libero",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> int:
    """Write a valid openpi checkpoint with weights that know nothing: to time, to test, to train from.

    Args:
        directory: to write; must not exist.
        preset: sizes. pi0 and pi05 are the published 3.3 billion parameters.
        weights: random (normal), or hash (the golden fixtures' function of name and index).
        seed: of either.
        robot: whose norm stats to write.
        dtype: of the stored weights.
    """
    import torch

    from ..checkpoint import init_checkpoint

    console = Console()
    with console.status(f"writing {preset}"):
        path = init_checkpoint(directory, preset, weights=weights, seed=seed, robot=robot, dtype=getattr(torch, dtype))
    console.print(f"wrote {path}")
    return 0
