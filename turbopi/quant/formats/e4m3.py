"""E4M3, the FP8 of Hopper and later: four exponent bits, three of mantissa, no infinities, largest value 448."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
_SMALLEST_SCALE = 2.0**-120


def e4m3_scale(amax: Tensor) -> Tensor:
    """What magnitudes up to `amax` are divided by to fill the range, float32; tiny and positive where `amax` is 0."""
    return (amax.float() / E4M3_MAX).clamp_min(_SMALLEST_SCALE)


def to_e4m3(x: Tensor, scale: Tensor | float) -> Tensor:
    """x / scale as `torch.float8_e4m3fn`, saturated. NaN stays NaN.

    The division is done in float32. `scale` broadcasts against x.
    """
    # Clamped first: what a cast makes of values beyond the range differs between torch versions and devices.
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
