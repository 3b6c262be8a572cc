"""E4M3 weights for the kernel of `denoise.cu`: packing, and in plain torch what its lanes are to do with them.

Half the bytes of bf16 for the ring to carry. A lane takes 16 bytes a tile and step in one load, its 8 values of each
half of the step, where bf16 takes two loads of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._fp8 import E4M3

STEP = 32
"""Of K, as in denoise.cu."""
BF16_SHIFT = 120
"""E4M3's bits in bf16's places are a number 2^-120 as large: the difference of the exponents' biases, 127 and 7."""


@dataclass(frozen=True, eq=False)
class ScaledMatrix:
    """A matrix (rows, K) in E4M3 and what its rows are multiplied by; stands in a `Layer` for `denoise_ref`.

    Attributes:
        values: (rows, K) float8_e4m3fn.
        scale: (rows,) float32.
    """

    values: Tensor
    scale: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream beside it."""
        return torch.bfloat16

    def float(self) -> Tensor:
        """(rows, K) float32, exact: E4M3 times a float32 that the product is multiplied by anyway."""
        return self.values.float() * self.scale[:, None]


def pack_e4m3(values: Tensor, tiles: int, parts: int = 1, *, native: bool = False) -> Tensor:
    """`denoise.pack` for E4M3: weight rows in the order in which the kernel's lanes consume them.

    Args:
        values: (rows, K) float8_e4m3fn, rows already in tile order.
        tiles: 16-row tiles that a unit computes at once.
        parts: units in a row that share their rows and divide K.
        native: for m16n8k32 of E4M3 by E4M3, whose lanes take 4 neighbours of a row at once, instead of for m16n8k16 of
            what is made of the weights in registers, whose lanes take 2.

    Returns:
        (units, K/32/parts steps, tiles, 32 lanes, 16) uint8, contiguous: 512 bytes a tile and step.
    """
    if values.dtype != E4M3:
        raise ValueError(f"values are {values.dtype}, expected {E4M3}")
    rows, k = values.shape
    if rows % (16 * tiles) or k % (STEP * parts):
        raise ValueError(f"values are {rows} x {k}, expected multiples of {16 * tiles} and {STEP * parts}")
    steps = k // STEP // parts
    view = values.view(torch.uint8).reshape(rows // (16 * tiles), tiles, 2, 8, parts, steps, 4, 2, 2, 2)
    # group, tile, upper/lower row, g, part, step, t, half, pair, element -> consumption order
    within = (7, 2, 8, 9) if native else (7, 8, 2, 9)
    packed = view.permute(0, 4, 5, 1, 3, 6, *within)
    return packed.reshape(-1, steps, tiles, 32, 16).contiguous()


def order_scale(scale: Tensor, order: Tensor, tiles: int) -> Tensor:
    """(rows,) float32 of a matrix as it came -> (units, tiles * 16), as `pack` puts the rows with this `order`."""
    return scale[order].reshape(-1, tiles * 16).contiguous()


def fold_scales(modulation: Tensor, out: list[Tensor], down: list[Tensor]) -> Tensor:
    """The modulations with the scales of every layer's `out` and `down` in their gates: no work for the kernel.

    modulation (steps, 2·depth+1, 3, width) float32, scales (width,) a layer -> a new table of the same shape.
    """
    folded = modulation.clone()
    for layer, scales in enumerate(zip(out, down, strict=True)):
        for norm, scale in enumerate(scales):
            folded[:, 2 * layer + norm, 2] *= scale
    return folded


def bf16_bits(codes: Tensor) -> Tensor:
    """What a lane makes of E4M3 codes (uint8) by two masks and a shift: bf16, 2^-120 times the number.

    A product with 2^120, which bf16 holds exactly, gives the number itself, subnormal ones too. NaN (codes 127 and 255)
    becomes 480: weights hold none.
    """
    wide = codes.to(torch.int32)
    bits = (wide & 0x80) << 8 | (wide & 0x7F) << 4
    return (bits - ((bits & 0x8000) << 1)).to(torch.int16).view(torch.bfloat16)


def product_ref(x: Tensor, matrix: ScaledMatrix) -> Tensor:
    """x (N, K) bf16 by the matrix (rows, K) -> (N, rows) float32, scaled after the sum as the kernel does."""
    return x.float() @ matrix.values.float().T * matrix.scale
