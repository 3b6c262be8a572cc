"""E4M3 by E4M3 for the kernel of `denoise.cu`: its matrices, how they are packed, and what its lanes compute.

Half the bytes of bf16 for the ring to carry, and for what CTAs tell each other of a product's input. Hopper multiplies
E4M3 only by a warpgroup's instruction, which wants 64 rows of weights at once. The kernel's lanes make f16 of E4M3, an
exact conversion, and add up in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._fp8 import E4M3, store_ref

STEP = 32
"""Of K, as in denoise.cu."""


@dataclass(frozen=True, eq=False)
class ScaledMatrix:
    """A matrix (rows, K) in E4M3, for inputs in E4M3; stands in a `Layer` for one in bfloat16.

    Attributes:
        values: (rows, K) float8_e4m3fn.
        scale: (rows,) float32, by which the sums are multiplied.
        inverse: by which inputs are multiplied before they are rounded.
    """

    values: Tensor
    scale: Tensor
    inverse: float

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream beside it."""
        return torch.bfloat16

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.values.device

    def product(self, x: Tensor) -> Tensor:
        """x (N, K) float32, rounded here, by the matrix -> (N, rows) float32."""
        rounded = torch.empty_like(x, dtype=E4M3)
        store_ref(x, rounded, self.inverse)
        return rounded.float() @ self.values.float().T * self.scale


def pack_e4m3(values: Tensor, tiles: int, parts: int = 1) -> Tensor:
    """`denoise.pack` for E4M3: weight rows in the order in which the kernel's lanes consume them.

    A lane takes 16 bytes a tile and step in one load, its 8 values of each half of the step.

    Args:
        values: (rows, K) float8_e4m3fn, rows already in tile order.
        tiles: 16-row tiles that a unit computes at once.
        parts: units in a row that share their rows and divide K.

    Returns:
        (units, K/32/parts steps, tiles, 32 lanes, 16) uint8, contiguous: 512 bytes a tile and step.

    Raises:
        ValueError: another dtype; sizes that are not whole units and steps.
    """
    if values.dtype != E4M3:
        raise ValueError(f"values are {values.dtype}, expected {E4M3}")
    rows, k = values.shape
    if rows % (16 * tiles) or k % (STEP * parts):
        raise ValueError(f"values are {rows} x {k}, expected multiples of {16 * tiles} and {STEP * parts}")
    steps = k // STEP // parts
    view = values.view(torch.uint8).reshape(rows // (16 * tiles), tiles, 2, 8, parts, steps, 4, 2, 2, 2)
    # group, tile, upper/lower row, g, part, step, t, half, pair, element -> consumption order
    packed = view.permute(0, 4, 5, 1, 3, 6, 7, 8, 2, 9)
    return packed.reshape(-1, steps, tiles, 32, 16).contiguous()
