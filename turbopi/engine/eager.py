"""The reference model as an engine: no approximation, no preparation, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model import Pi0, PrefixCache
from .base import Precision, register_engine


@register_engine("eager")
class EagerEngine:
    """Runs `Pi0` as it is."""

    name = "eager"

    def __init__(self, model: Pi0, precision: Precision) -> None:
        self.model = model
        self.precision = precision
        self.config = model.config
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def encode_images(self, images: Tensor, image_mask: Tensor) -> Tensor:
        """Stage 1; see `Engine`."""
        return self.model.encode_images(images.to(self.device), image_mask.to(self.device))

    @torch.no_grad()
    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Stage 2; see `Engine`."""
        return self.model.prefill(*(t.to(self.device) for t in (image_tokens, image_mask, tokens, token_mask)))

    @torch.no_grad()
    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Stage 3; see `Engine`."""
        return self.model.denoise(cache, state.to(self.device), noise.to(self.device), steps)

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
