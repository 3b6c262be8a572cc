"""What an engine may offer so that a PrefixCache outlives its tick. Ask here, not for an engine's kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..model import PrefixCache
from .base import Engine, TickEngine
from .integrate import EulerStep, IntegratingEngine


@dataclass(frozen=True)
class LentCache(PrefixCache):
    """A PrefixCache that lies in an engine's own memory until something is computed over it; see `HoldingEngine`."""


@runtime_checkable
class HoldingEngine(Engine, Protocol):
    """An engine whose caches lie in its own memory, and are gone when something is computed over them."""

    def holds(self, cache: PrefixCache) -> bool:
        """Whether `denoise` could still take this cache. False for a cache that is not the engine's own."""


@runtime_checkable
class AgainEngine(TickEngine, HoldingEngine, Protocol):
    """A whole-tick engine that can run stage 3 again: a fast tick, from host memory to host memory."""

    def last_cache(self, batch: int = 1) -> PrefixCache:
        """The cache that the latest `sample_actions` of this batch size has left. RuntimeError if there is none."""

    def sample_again(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Stage 3 over `cache`, as `sample_actions`: the engine's own where it still holds it, else copied in.

        state (B,32), noise (B,H,32) float32 on the CPU -> normalised actions (B,H,32) float32 on the CPU. Raises
        NonFiniteActionsError where the actions hold NaN or infinite values.
        """

    def warm_up_again(self, cameras: int, steps: int, batch: int = 1) -> None:
        """Prepare `sample_again` for prompts of any length with `cameras` valid cameras."""


@runtime_checkable
class SteppingEngine(IntegratingEngine, Protocol):
    """An engine that prepares its stages one by one, the last as `integrate`."""

    def warm_up_stages(
        self, cameras: int, images: torch.dtype, steps: tuple[EulerStep, ...], limit: float | None, batch: int = 1
    ) -> None:
        """Prepare every stage for prompts of any length; stage 3 with these steps and guidance of this limit, or none.

        images: dtype of the frames. limit None: unguided. No steps: stages 1 and 2 alone.
        """


@runtime_checkable
class PromptEngine(Engine, Protocol):
    """An engine that can start stage 2 from an embedded prompt, so that the embedding can be kept."""

    def embed_prompt(self, tokens: Tensor) -> Tensor:
        """What of stage 2 depends on the prompt alone: (B,T) int64 -> (B,T,width)."""

    def prefill_embedded(
        self, image_tokens: Tensor, image_mask: Tensor, prompt: Tensor, token_mask: Tensor
    ) -> PrefixCache:
        """`prefill` from the answer of `embed_prompt`, to the bit."""


def copied(cache: PrefixCache) -> PrefixCache:
    """A cache in memory of its own, for one that lies in an engine's. One copy for all keys and one for all values."""
    keys, values = torch.stack(cache.keys), torch.stack(cache.values)
    valid = None if cache.valid is None else cache.valid.clone()
    return PrefixCache(keys.unbind(), values.unbind(), cache.lengths.clone(), valid)
