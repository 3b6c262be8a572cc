"""The reference model as an engine: no approximation, no preparation, any device."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from ..model import Pi0, PrefixCache
from ..model.prefix import drop_invalid
from ..quant import Quantisation, quantisation_details, quantised
from .base import Precision, register_engine
from .integrate import EulerStep, Steering, integrate_model
from .partial import OldRows, PartialCache, prefill_model


@register_engine("eager", get_args(Precision))
class EagerEngine:
    """Runs `Pi0` as it is, or with its products quantised; see `quantised`."""

    name = "eager"

    def __init__(self, model: Pi0, precision: Precision, quantisation: Quantisation | None = None) -> None:
        self.model = model if quantisation is None else quantised(model, quantisation)
        self._details = {} if quantisation is None else quantisation_details(self.model, quantisation)
        self.precision = precision
        self.config = model.config
        self.device = next(model.parameters()).device

    def describe(self) -> dict[str, Any]:
        """How the products are computed, where they are quantised."""
        return dict(self._details)

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

    @torch.no_grad()
    def integrate(
        self,
        cache: PrefixCache,
        state: Tensor,
        noise: Tensor,
        steps: tuple[EulerStep, ...],
        steering: Steering | None = None,
    ) -> Tensor:
        """Stage 3 with times and steering of every kind; see `IntegratingEngine`."""
        here = None if steering is None else steering.to(self.device)
        return integrate_model(self.model, cache, state.to(self.device), noise.to(self.device), steps, here)

    @torch.no_grad()
    def prefill_partial(
        self,
        image_tokens: Tensor,
        image_mask: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        layers: int,
        old: OldRows | None = None,
    ) -> PartialCache:
        """Stage 2 over some rows; see `PartialEngine`."""
        image_tokens, image_mask = image_tokens.to(self.device), image_mask.to(self.device)
        tokens, token_mask = tokens.to(self.device), token_mask.to(self.device)
        return prefill_model(self.model, image_tokens, image_mask, tokens, token_mask, layers, old)

    @torch.no_grad()
    def embed_prompt(self, tokens: Tensor) -> Tensor:
        """The prompt's part of stage 2 that depends on nothing else: (B,T) int64 -> (B,T,width)."""
        return self.model.vlm.embed(tokens.to(self.device))

    @torch.no_grad()
    def prefill_embedded(
        self, image_tokens: Tensor, image_mask: Tensor, prompt: Tensor, token_mask: Tensor
    ) -> PrefixCache:
        """Stage 2 from `embed_prompt`'s answer; otherwise as `prefill`, to the bit."""
        image_tokens, image_mask, token_mask = (t.to(self.device) for t in (image_tokens, image_mask, token_mask))
        embs = torch.cat((image_tokens.flatten(1, 2), prompt), dim=1)
        valid: Tensor | None
        valid = torch.cat((image_mask.repeat_interleave(image_tokens.shape[2], dim=1), token_mask), dim=1)
        if self.config.invalid_tokens == "dropped":
            embs, valid = drop_invalid(embs, valid)
        return self.model.vlm(embs, valid)

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
