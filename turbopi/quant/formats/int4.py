"""Weights in int4, -7 to 7, with a bf16 scale for every group of input channels, two in a byte."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INT4_MAX = 7
GROUPS = (128, 64, 32, 16)
_OFFSET = 8
_SMALLEST_SCALE = 2.0**-120


@dataclass(frozen=True, eq=False)
class Int4Groups:
    """A weight (out, in).

    Attributes:
        packed: (out, in / 2) uint8; an even channel in the low half of the byte, the next in the high half, plus 8.
        scale: (out, groups) bf16.
    """

    packed: Tensor
    scale: Tensor

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(out, in): each value times its group's scale, float32, or bfloat16 rounded once: both factors are exact."""
        values = unpack_int4(self.packed).to(dtype).unflatten(1, (self.scale.shape[1], -1))
        return (values * self.scale.to(dtype)[:, :, None]).flatten(1)


def group_size(width: int) -> int:
    """Input channels that share a scale: 128, or less where the width asks it.

    Raises ValueError if 16 does not divide the width.
    """
    for size in GROUPS:
        if width % size == 0:
            return size
    raise ValueError(
        f"w4a16 needs a width that is a multiple of {GROUPS[-1]}, got {width}; leave the product in bf16 or w8a16 by "
        "an exception in the precision plan"
    )


def to_int4(weight: Tensor) -> Int4Groups:
    """Round a weight (out, in). The scale is rounded first, and the values against the rounded scale.

    Raises ValueError as `group_size`.
    """
    groups = weight.float().unflatten(1, (-1, group_size(weight.shape[1])))
    scale = (groups.abs().amax(dim=2) / INT4_MAX).clamp_min(_SMALLEST_SCALE).to(torch.bfloat16)
    values = (groups / scale.float()[:, :, None]).round().clamp(-INT4_MAX, INT4_MAX).to(torch.int8)
    return Int4Groups(pack_int4(values.flatten(1)), scale)


def pack_int4(values: Tensor) -> Tensor:
    """(out, in) int8 from -8 to 7, `in` even -> (out, in / 2) uint8."""
    offset = (values + _OFFSET).to(torch.uint8)
    return offset[:, 0::2] | (offset[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: (out, in / 2) uint8 -> (out, in) int8."""
    halves = torch.stack((packed & 0xF, packed >> 4), dim=2).flatten(1)
    return halves.to(torch.int8) - _OFFSET
