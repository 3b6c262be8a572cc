"""The PrefixCache that turbo hands out, and how caches from elsewhere come into its static tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...model import PrefixCache
from ..reuse import LentCache
from .arena import Arena
from .buffers import Buffers


@dataclass(frozen=True)
class TurboCache(LentCache):
    """A PrefixCache of views into an arena's keys and values, as long as nothing is computed over them.

    That is until the next tick, the next `prefill`, or the next `denoise` of another engine's cache, of the same batch
    size. Clone the tensors into a plain `PrefixCache` to keep them longer.

    Attributes:
        bucket: whose layout the views have.
        generation: of the arena's contents; a later one means that these are gone.
        original: keys, values, lengths and valid as they were handed out.
    """

    buffers: Buffers
    generation: int
    original: tuple[object, ...]

    @property
    def unchanged(self) -> bool:
        """Whether nobody has put anything else into it."""
        now = self.keys, self.values, self.lengths, self.valid
        return all(a is b for a, b in zip(now, self.original, strict=True))


def hand_out(arena: Arena, buffers: Buffers, lengths: np.ndarray, generation: int) -> TurboCache:
    """The cache that `buffers` of `arena` hold; lengths (B,) int32."""
    device, longest, valid = arena.device, int(lengths.max()), None
    if int(lengths.min()) == longest:
        # Filled on the device: a copy of pageable memory would be waited for.
        on_device = torch.full(lengths.shape, longest, dtype=torch.int64, device=device)
    else:
        on_device = torch.from_numpy(lengths.astype(np.int64)).to(device)
        valid = torch.arange(longest, device=device) < on_device[:, None]
    parts = *arena.cut(buffers, longest), on_device, valid
    return TurboCache(*parts, buffers, generation, parts)


def check_foreign(cache: PrefixCache) -> None:
    """Raise ValueError unless each sample has as many valid tokens as its length says: positions and slots are one."""
    counted = cache.visible.sum(dim=1)
    if not torch.equal(counted, cache.lengths.to(counted)):
        raise ValueError(
            f"the PrefixCache has {counted.tolist()} valid tokens but lengths {cache.lengths.tolist()}: the turbo "
            "engine keeps no mask, so both must agree; use the engine 'eager' for such a cache"
        )


def copy_in(cache: PrefixCache, buffers: Buffers) -> None:
    """Another engine's keys and values into the static tensors, the valid tokens of each sample first."""
    order = None
    if cache.valid is not None:
        order = torch.argsort((~cache.valid).to(torch.int8), dim=1, stable=True)[:, None, :, None]
    length = min(cache.keys[0].shape[2], buffers.rows)
    for sources, target in ((cache.keys, buffers.prefill.keys), (cache.values, buffers.prefill.values)):
        for source, layer in zip(sources, target, strict=True):
            packed = source if order is None else torch.take_along_dim(source, order, dim=2)
            layer[:, :, :length].copy_(packed[:, :, :length])
