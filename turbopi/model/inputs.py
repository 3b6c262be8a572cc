"""What goes into the model, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError


def _require(name: str, value: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype) -> None:
    expected = f"({', '.join('any' if s is None else str(s) for s in shape)}) {str(dtype).removeprefix('torch.')}"
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}, expected a torch tensor of {expected}")
    fits = value.ndim == len(shape) and all(s is None or s == n for s, n in zip(shape, value.shape, strict=True))
    if not fits or value.dtype != dtype:
        got = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        raise InputError(f"{name} is {got}, expected {expected}")


def _require_finite(name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"{name} holds NaN or infinite values; every value must be finite")


@dataclass(frozen=True)
class ModelInput:
    """A batch of observations in the model's own terms.

    Attributes:
        images: (B,cameras,3,S,S) float32 in [-1,1], RGB.
        image_mask: (B,cameras) bool, False where the camera is missing.
        tokens: (B,T) int64 prompt token ids, T up to any length.
        token_mask: (B,T) bool, False for padding.
        state: (B,32) float32, normalised and padded with zeros. π0.5 does not read it.
    """

    images: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor

    def check(self, config: ModelConfig) -> None:
        """Raise InputError if shapes, dtypes or values do not fit the model; the message names the field."""
        size = config.vision.image_size
        _require("images", self.images, (None, config.cameras, 3, size, size), torch.float32)
        batch = self.images.shape[0]
        _require("image_mask", self.image_mask, (batch, config.cameras), torch.bool)
        _require("tokens", self.tokens, (batch, None), torch.int64)
        _require("token_mask", self.token_mask, tuple(self.tokens.shape), torch.bool)
        _require("state", self.state, (batch, config.state_dim), torch.float32)
        _require_finite("images", self.images)
        _require_finite("state", self.state)
        if self.images.numel() and float(self.images.abs().max()) > 1.0:
            raise InputError("images reach beyond [-1, 1]; scale uint8 frames by x / 255 * 2 - 1")
        if self.tokens.numel() and not 0 <= int(self.tokens.min()) <= int(self.tokens.max()) < config.vocab_size:
            raise InputError(f"tokens hold ids outside 0..{config.vocab_size - 1}; the tokenizer is not this model's")
        if not bool((self.image_mask.any(dim=1) | self.token_mask.any(dim=1)).all()):
            raise InputError("a sample has neither a camera nor a prompt token; at least one must be valid")

    def to(self, device: torch.device | str) -> ModelInput:
        """The same input on another device."""
        return ModelInput(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def check_noise(noise: Tensor, batch: int, config: ModelConfig) -> None:
    """Raise InputError unless noise is finite float32 of (batch, horizon, action_dim)."""
    _require("noise", noise, (batch, config.horizon, config.action_dim), torch.float32)
    _require_finite("noise", noise)
