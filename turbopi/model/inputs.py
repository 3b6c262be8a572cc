"""What goes into the model, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError


def _require(name: str, value: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}, expected a torch tensor of {_words(shape, dtype)}")
    fits = value.ndim == len(shape) and all(s is None or s == n for s, n in zip(shape, value.shape, strict=True))
    if not fits or value.dtype != dtype:
        raise InputError(f"{name} is {_words(value.shape, value.dtype)}, expected {_words(shape, dtype)}")


def _words(shape: Sequence[int | None], dtype: torch.dtype) -> str:
    sizes = ", ".join("any" if s is None else str(s) for s in shape)
    return f"({sizes}{',' if len(shape) == 1 else ''}) {str(dtype).removeprefix('torch.')}"


def _require_finite(name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"{name} holds NaN or infinite values; every value must be finite")


@dataclass(frozen=True)
class ModelInput:
    """A batch of observations in the model's own terms.

    Attributes:
        images: (B,cameras,3,S,S) float32 in [-1,1], RGB. For an engine that says so also uint8, 0 to 255.
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

    def check(self, config: ModelConfig, *, uint8_images: bool = False) -> None:
        """Raise InputError if shapes, dtypes or values do not fit the model; the message names the field.

        `uint8_images` lets images be uint8 instead, for an engine that scales them itself.
        """
        self.check_shapes(config, uint8_images=uint8_images)
        scaled = self.images.dtype == torch.float32
        if scaled:
            _require_finite("images", self.images)
        _require_finite("state", self.state)
        if scaled and self.images.numel() and float(self.images.abs().max()) > 1.0:
            raise InputError("images reach beyond [-1, 1]; scale uint8 frames by x / 255 * 2 - 1")
        if self.tokens.numel() and not 0 <= int(self.tokens.min()) <= int(self.tokens.max()) < config.vocab_size:
            raise InputError(f"tokens hold ids outside 0..{config.vocab_size - 1}; the tokenizer is not this model's")
        if not bool((self.image_mask.any(dim=1) | self.token_mask.any(dim=1)).all()):
            raise InputError("a sample has neither a camera nor a prompt token; at least one must be valid")

    def check_shapes(self, config: ModelConfig, *, uint8_images: bool = False) -> None:
        """The part of `check` that looks at no value."""
        size = config.vision.image_size
        dtype = torch.uint8 if uint8_images and self._holds_uint8() else torch.float32
        _require("images", self.images, (None, config.cameras, 3, size, size), dtype)
        batch = self.images.shape[0]
        _require("image_mask", self.image_mask, (batch, config.cameras), torch.bool)
        _require("tokens", self.tokens, (batch, None), torch.int64)
        _require("token_mask", self.token_mask, tuple(self.tokens.shape), torch.bool)
        _require("state", self.state, (batch, config.state_dim), torch.float32)

    def _holds_uint8(self) -> bool:
        return isinstance(self.images, Tensor) and self.images.dtype == torch.uint8

    def to(self, device: torch.device | str) -> ModelInput:
        """The same input on another device."""
        return ModelInput(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def check_noise(noise: Tensor, batch: int, config: ModelConfig) -> None:
    """Raise InputError unless noise is finite float32 of (batch, horizon, action_dim)."""
    _require("noise", noise, (batch, config.horizon, config.action_dim), torch.float32)
    _require_finite("noise", noise)
