"""Symmetric int8, -127 to 127: -128 has no opposite and is not used."""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127
_SMALLEST_SCALE = 2.0**-120


def int8_scale(amax: Tensor) -> Tensor:
    """What magnitudes up to `amax` are divided by to fill the range, float32; tiny and positive where `amax` is 0."""
    return (amax.float() / INT8_MAX).clamp_min(_SMALLEST_SCALE)


def to_int8(x: Tensor, scale: Tensor | float) -> Tensor:
    """x / scale rounded half to even and saturated, int8. The division is done in float32; `scale` broadcasts."""
    return (x.float() / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
