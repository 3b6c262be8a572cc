"""How the products of a SigLIP block are cut for some numbers of rows: entries of the tuned file of the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .tiled_linear import LinearTiling, tiling_obstacles
from .tuning import entries, key

OP = "tiled_vision"


@dataclass(frozen=True)
class VisionTilings:
    """Of the products of a block, and of the projector.

    Attributes:
        qkv, out, fc1, fc2: in the format of the blocks.
        projector: in bfloat16, also where the blocks are not.
        grey: patches of uint8 images are multiplied as grey levels in bfloat16, by a weight in three parts.
        early_attention: attention is launched before qkv has ended.
    """

    qkv: LinearTiling
    out: LinearTiling
    fc1: LinearTiling
    fc2: LinearTiling
    projector: LinearTiling
    grey: bool = False
    early_attention: bool = False

    @staticmethod
    def read(entry: Mapping[str, Any]) -> VisionTilings:
        """Of an entry of a tuned file."""
        values: dict[str, Any] = {
            name: LinearTiling(**value) if isinstance(value, Mapping) else value for name, value in entry.items()
        }
        return VisionTilings(**values)

    def obstacles(self, width: int, hidden: int, projected: int, e4m3: bool = False) -> list[str]:
        """Why a tower of such widths, its blocks in E4M3 or in bfloat16, is not cut so; empty if it can be."""
        of_out, of_fc2 = (max(width // t.columns, 1) for t in (self.out, self.fc2))
        return [
            *tiling_obstacles(self.qkv, 3 * width, width, 0 if e4m3 else of_fc2, False, e4m3),
            *tiling_obstacles(self.out, width, width, 0, not e4m3, e4m3),
            *tiling_obstacles(self.fc1, hidden, width, 0 if e4m3 else of_out, False, e4m3),
            *tiling_obstacles(self.fc2, width, hidden, 0, True, e4m3),
            *tiling_obstacles(self.projector, projected, width, of_fc2),
        ]


def vision_tilings(fc2: Tensor, rows: int) -> VisionTilings | None:
    """With which so many rows were measured to be faster than kernel by kernel; None where they were not.

    `fc2` (width, hidden) is a block's weight, in bfloat16 or E4M3, on its GPU. The rows are those of an entry exactly.
    """
    entry = entries(OP, fc2).get(key(fc2.dtype, (rows, *fc2.shape)))
    return None if entry is None else VisionTilings.read(entry)
