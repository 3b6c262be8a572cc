"""NVFP4: E2M1 values in blocks of 16, an E4M3 scale a block, a float32 scale a tensor.

As NVIDIA describes it for Blackwell ("Pretraining Large Language Models with NVFP4", 2025): the tensor's scale puts its
largest magnitude at 448 · 6, a block's scale puts that of the block at 6. Here it is computed on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .e4m3 import E4M3_MAX, to_e4m3

BLOCK = 16
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By code; bit 3 of a code is the sign."""
E2M1_MAX = E2M1_VALUES[-1]
_SIGN = 8
_SMALLEST_SCALE = 2.0**-120


@dataclass(frozen=True, eq=False)
class Nvfp4:
    """A matrix (rows, width).

    Attributes:
        packed: (rows, width / 2) uint8, E2M1 codes; an even column in the low half of the byte.
        block_scale: (rows, width / 16) float8_e4m3fn.
        tensor_scale: () float32.
    """

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor

    def dequantised(self) -> Tensor:
        """(rows, width) float32."""
        pairs = _pairs(self.packed.device).index_select(0, self.packed.flatten().int())
        values = pairs.view(torch.float32).view(len(self.packed), -1)
        scale = self.block_scale.float() * self.tensor_scale
        return (values.unflatten(1, (-1, BLOCK)) * scale[:, :, None]).flatten(1)


@cache
def _pairs(device: torch.device) -> Tensor:
    """(256,) int64, each the two float32 values of a byte: one gather of 8 bytes is many times faster than two of 4.

    Kept, since no table may be copied to a GPU while it captures.
    """
    values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
    codes = torch.arange(256)
    return torch.stack((values[codes & 0xF], values[codes >> 4]), dim=1).view(torch.int64).flatten().to(device)


def nvfp4_tensor_scale(amax: Tensor) -> Tensor:
    """The float32 scale of a tensor with magnitudes up to `amax`; tiny and positive where `amax` is 0."""
    return (amax.float() / (E4M3_MAX * E2M1_MAX)).clamp_min(_SMALLEST_SCALE)


def round_e2m1(x: Tensor) -> Tensor:
    """x rounded to the nearest E2M1 value, half to even, saturated; float32. NaN stays NaN."""
    magnitude = x.float().abs().clamp_max(E2M1_MAX)
    # Values are 0.5 apart below 2, 1 apart below 4, then 2; the even multiple of the step is the even mantissa.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round() * step, x.float())


def _rounded_blocks(x: Tensor, tensor_scale: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 values (rows, blocks, 16) float32, and their blocks' scales (rows, blocks) float8_e4m3fn."""
    if x.shape[1] % BLOCK:
        raise ValueError(
            f"nvfp4 needs a width that is a multiple of {BLOCK}, got {x.shape[1]}; leave the product in bf16 by an "
            "exception in the precision plan"
        )
    blocks = x.float().unflatten(1, (-1, BLOCK))
    block_scale = to_e4m3(blocks.abs().amax(dim=2) / E2M1_MAX, tensor_scale)
    scale = (block_scale.float() * tensor_scale)[:, :, None]
    # A block whose scale rounds to zero is zero.
    return round_e2m1(torch.where(scale > 0, blocks / scale, torch.zeros_like(blocks))), block_scale


def to_nvfp4(x: Tensor, tensor_scale: Tensor) -> Nvfp4:
    """Round a matrix (rows, width) against a tensor scale, and pack it.

    Raises ValueError if 16 does not divide the width.
    """
    values, block_scale = _rounded_blocks(x, tensor_scale)
    magnitudes = torch.tensor(E2M1_VALUES, device=x.device)
    codes = (torch.bucketize(values.abs(), magnitudes) + _SIGN * torch.signbit(values)).to(torch.uint8).flatten(1)
    return Nvfp4(codes[:, 0::2] | (codes[:, 1::2] << 4), block_scale, tensor_scale)


def through_nvfp4(x: Tensor, tensor_scale: Tensor) -> Tensor:
    """What `to_nvfp4` holds of x, float32, without packing it. Raises ValueError as it does."""
    values, block_scale = _rounded_blocks(x, tensor_scale)
    return (values * (block_scale.float() * tensor_scale)[:, :, None]).flatten(1)
