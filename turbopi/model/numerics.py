"""Named numerics profiles: the roundings in which the published ports of π0 differ (SPEC 1.7 and 5).

In float32 the profiles differ only in how time is counted and embedded. In bfloat16 they also differ in which parts
stay float32. `exact` is what to deploy: bf16 where both ports use it, but rotary frequencies in float32 as in the JAX
original. `openpi` and `lerobot` reproduce the two PyTorch ports with their shared defect, frequencies rounded to bf16.
`jax` reproduces the original in float32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from ..config import NumericsName


@dataclass(frozen=True)
class Numerics:
    """One profile.

    Attributes:
        time: "accumulated" adds dt in float32, as openpi; "indexed" rounds 1 + s·dt once, as lerobot.
        bf16_rope_frequencies: round the rotary frequencies to bf16 when the model is bf16.
        embed_scale_in_model_dtype: round sqrt(width) to the embedding's dtype before multiplying.
        float32_vision: keep SigLIP and the projector in float32 when the model is bf16.
        float32_time_angles: compute the angles of the time embedding in float32 instead of float64.
        bf16: whether the profile describes a bf16 model at all.
    """

    time: Literal["accumulated", "indexed"] = "accumulated"
    bf16_rope_frequencies: bool = False
    embed_scale_in_model_dtype: bool = False
    float32_vision: bool = False
    float32_time_angles: bool = False
    bf16: bool = True


PROFILES: dict[NumericsName, Numerics] = {
    "exact": Numerics(),
    "openpi": Numerics(bf16_rope_frequencies=True),
    "lerobot": Numerics(
        time="indexed", bf16_rope_frequencies=True, embed_scale_in_model_dtype=True, float32_vision=True
    ),
    # The original keeps norms and projections in bf16 too and rounds elsewhere; that is not reproduced.
    "jax": Numerics(float32_time_angles=True, bf16=False),
}

MODEL_DTYPES = (torch.float32, torch.bfloat16)

_ALWAYS_FLOAT32 = re.compile(
    r"vision\.embeddings\."
    r"|(vlm|expert)\.(layers\.\d+\.(input|post_attention)_layernorm|norm)\."
    r"|(action_in|action_out|state|time_mlp_in|time_mlp_out|action_time_mlp_in|action_time_mlp_out)(_proj)?\."
)


def parameter_dtype(name: str, numerics: NumericsName, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the parameter `name` of `Pi0` is held when the model runs in `dtype` (SPEC 1.7).

    Raises ValueError if `dtype` is neither float32 nor bfloat16, or if the profile has no bf16 form.
    """
    if dtype not in MODEL_DTYPES:
        raise ValueError(f"the reference runs in float32 or bfloat16, not {dtype}")
    if dtype == torch.bfloat16 and not PROFILES[numerics].bf16:
        raise ValueError(f"the numerics profile {numerics!r} describes float32 only; use 'exact' for bfloat16")
    if _ALWAYS_FLOAT32.match(name):
        return torch.float32
    if PROFILES[numerics].float32_vision and name.startswith(("vision.", "projector.")):
        return torch.float32
    return dtype
