"""Everything that the turbo engine reads and never writes, in one place on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import ModelConfig
from ...model import Pi0
from ...model.gemma import ROPE_BASE
from ...quant.fold import FoldedExpert, FoldedPrefix, FoldedVision, fold_expert, fold_prefix, fold_vision


@dataclass(frozen=True, eq=False)
class TurboWeights:
    """Folded weights and the rotary table.

    Attributes:
        cos, sin: (positions, head_dim/2) float32, for every position that a prefix and a suffix can take.
        dtype, vision_dtype: of the residual streams.
    """

    vision: FoldedVision
    prefix: FoldedPrefix
    expert: FoldedExpert
    cos: Tensor
    sin: Tensor
    dtype: torch.dtype
    vision_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.cos.device


def rotary_table(model: Pi0, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (positions, head_dim/2) float32, with the frequencies of the model's numerics profile."""
    device = model.action_in_proj.weight.device
    rope = model.vlm.rope
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.float32, device=device) / rope.head_dim
    frequencies = 1.0 / ROPE_BASE**exponents
    if rope.bf16_frequencies and model.vlm.dtype == torch.bfloat16:
        frequencies = frequencies.to(torch.bfloat16).float()
    angles = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def longest_sequence(config: ModelConfig) -> int:
    """Prefix and suffix rows of one sample at most."""
    return config.prefix_slots + config.suffix_tokens


@torch.no_grad()
def fold_model(model: Pi0) -> TurboWeights:
    """Fold layer by layer, next to the model, which stays as it is and shares its token embedding."""
    cos, sin = rotary_table(model, longest_sequence(model.config))
    return TurboWeights(
        vision=fold_vision(model),
        prefix=fold_prefix(model),
        expert=fold_expert(model),
        cos=cos,
        sin=sin,
        dtype=model.vlm.dtype,
        vision_dtype=model.vision.dtype,
    )
