"""The turbo engine with twins on the CPU, and what tests on both devices share."""

import dataclasses

import torch
from torch import Tensor

from turbopi import ModelInput, Pi0
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo.ops import twin_ops
from turbopi.model import PrefixCache

STAGE_TOLERANCE = 1e-5


def twins(model: Pi0) -> TurboEngine:
    return TurboEngine(model, "fp32", twin_ops(), None)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).norm() / b.norm())


def with_gaps(x: ModelInput) -> ModelInput:
    """Padding between valid tokens, not only behind them."""
    mask = x.token_mask.clone()
    mask[:, 1] = False
    return dataclasses.replace(x, token_mask=mask)


def cloned(cache: PrefixCache) -> PrefixCache:
    """A cache that belongs to nobody."""
    return PrefixCache(
        tuple(k.clone() for k in cache.keys), tuple(v.clone() for v in cache.values), cache.lengths, cache.valid
    )


def uint8_input(x: ModelInput) -> tuple[ModelInput, ModelInput]:
    """The input with images of whole grey levels: as uint8, and scaled on the host."""
    grey = ((x.images + 1) / 2 * 255).round().to(torch.uint8)
    scaled = grey.float() / 255 * 2 - 1
    return dataclasses.replace(x, images=grey), dataclasses.replace(x, images=scaled)


def valid_part(cache: PrefixCache) -> list[Tensor]:
    """Keys and values of valid tokens only."""
    seen = cache.visible[:, None, :, None].cpu()
    return [t.cpu().float() * seen for t in (*cache.keys, *cache.values)]


def model_like(reference: Pi0, **changes: object) -> Pi0:
    """A model with the same weights and another configuration."""
    other = Pi0(dataclasses.replace(reference.config, **changes))  # type: ignore[arg-type]
    other.load_state_dict(reference.state_dict())
    return other
