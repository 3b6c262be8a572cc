"""Balancing before int8: channels of the input that are large are divided, and the weights multiplied by the same.

As in "SmoothQuant" (Xiao et al. 2023). In exact arithmetic nothing changes: (x / s)(s W)ᵀ = x Wᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH = 0.5
_LEAST = 1e-5


def balance(channel_amax: Tensor, weight_amax: Tensor, strength: float = STRENGTH) -> Tensor:
    """The divisor s of every input channel, (in,) float32, all positive.

    Args:
        channel_amax: (in,) largest magnitude of each input channel.
        weight_amax: (in,) largest magnitude of each column of the weight; of all weights that read this input.
        strength: 0 leaves the input as it is, 1 makes all its channels alike.

    A channel that is always zero, or that no weight reads, is left as it is. Raises ValueError for a strength outside
    0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength of the balancing must be from 0 to 1, got {strength}")
    dead = (channel_amax <= 0) | (weight_amax <= 0)
    divisor = channel_amax.float().clamp_min(_LEAST) ** strength / weight_amax.float().clamp_min(_LEAST) ** (
        1 - strength
    )
    return torch.where(dead, torch.ones_like(divisor), divisor.clamp_min(_LEAST))
