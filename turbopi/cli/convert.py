"""`turbo-pi convert`: a checkpoint from one format into another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console


def convert(
    source: Annotated[Path, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    to: Literal["openpi", "lerobot", "jax"],
    asset_id: str | None = None,
) -> int:
    """Convert a checkpoint losslessly. The target directory must not exist.

    Args:
        source: directory of an openpi, lerobot or JAX checkpoint.
        target: directory to write.
        to: format to write.
        asset_id: which norm stats to carry over, where the source has several and the target holds one.
    """
    from ..checkpoint import convert as run

    console = Console()
    with console.status(f"converting {source}"):
        conversion = run(source, target, to, asset_id=asset_id)
    for note in conversion.notes:
        console.print(f"note: {note}")
    console.print(f"wrote {target}")
    return 0
