"""What every engine offers: the three stages, and the facts that a receipt needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ..config import ModelConfig
from ..model import Pi0, PrefixCache

Precision = Literal["fp32", "bf16"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def precision_dtype(precision: str) -> torch.dtype:
    """The weights' dtype of a precision; raises ValueError that lists the known ones."""
    if precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(get_args(Precision))}")
    return DTYPES[precision]


class Engine(Protocol):
    """A way to run the three stages. Same inputs, same noise: bit-identical actions.

    Shapes are those of `turbopi.model.Pi0`; inputs may be on the CPU, results are on `device`.
    """

    name: str
    precision: Precision
    config: ModelConfig
    device: torch.device

    def encode_images(self, images: Tensor, image_mask: Tensor) -> Tensor:
        """Stage 1: (B,cameras,3,S,S) float32, (B,cameras) bool -> image tokens."""

    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Stage 2: image tokens and the prompt (B,T) int64, (B,T) bool -> PrefixCache."""

    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Stage 3: (B,32) and (B,H,32) float32 -> normalised actions (B,H,32) float32."""

    def synchronize(self) -> None:
        """Wait until everything asked for so far has been computed."""


EngineFactory = Callable[[Pi0, Precision], Engine]
_FACTORIES: dict[str, EngineFactory] = {}


def register_engine(name: str) -> Callable[[EngineFactory], EngineFactory]:
    """Make an engine known under a name: a decorator for its class or factory."""

    def add(factory: EngineFactory) -> EngineFactory:
        _FACTORIES[name] = factory
        return factory

    return add


def create_engine(name: str, model: Pi0, precision: Precision) -> Engine:
    """An engine by name over a loaded model; raises ValueError that lists the known ones."""
    if name not in _FACTORIES:
        raise ValueError(f"unknown engine {name!r}; known: {', '.join(sorted(_FACTORIES))}")
    return _FACTORIES[name](model, precision)
