"""Stage 2 over some rows: the rest of the prefix is taken from an earlier tick, wholly or up to a layer.

A prefix row whose token has not changed enough keeps the keys and values that it had; only the other rows run through
the tower, and they see the old keys beside their own. With every row fresh this is `PrefixTower.forward`, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..model import Pi0, PrefixCache
from .base import Engine


@dataclass(frozen=True, eq=False)
class PartialCache(PrefixCache):
    """A PrefixCache of one observation that other ticks may take rows of.

    Attributes:
        hidden: (1,P,width), the residual stream of every row where layer `layers` begins. None if that is behind the
            last layer, whose output nobody reads.
        layers: of which rows can be taken over.
    """

    hidden: Tensor | None
    layers: int


@dataclass(frozen=True, eq=False)
class OldRows:
    """What is taken over: of `cache`, up to `cache.layers`, the rows where `reused` (P,) bool on the CPU is set.

    A row is taken over in its place, since keys know their position. P is the new prefix's length; the old one may be
    shorter or longer behind its last row that is reused.
    """

    cache: PartialCache
    reused: Tensor


@runtime_checkable
class PartialEngine(Engine, Protocol):
    """An engine that recomputes part of a prefix. One observation at a time."""

    def prefill_partial(
        self,
        image_tokens: Tensor,
        image_mask: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        layers: int,
        old: OldRows | None = None,
    ) -> PartialCache:
        """Stage 2 with the rows of `old` taken over; None computes all. Arguments as of `prefill`, B = 1.

        image_tokens of reused cameras are not read. The new cache can itself be taken rows of, up to `layers`.
        Raises ValueError for more than one observation, masked invalid tokens, or rows that do not fit.
        """


def prefill_model(
    model: Pi0,
    image_tokens: Tensor,
    image_mask: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    layers: int,
    old: OldRows | None,
) -> PartialCache:
    """`PartialEngine.prefill_partial` over the reference; tensors on its device."""
    depth = len(model.vlm.layers)
    _check(model, len(tokens), depth, layers, old)
    valid = torch.cat((image_mask.repeat_interleave(image_tokens.shape[2], dim=1), token_mask), dim=1)
    embs = torch.cat((image_tokens.flatten(1, 2), model.vlm.embed(tokens)), dim=1)[:, valid[0]]
    rows = embs.shape[1]
    if old is not None and (len(old.reused) != rows or bool(old.reused[old.cache.keys[0].shape[2] :].any())):
        raise ValueError(
            f"{int(old.reused.sum())} of {len(old.reused)} prefix rows are to be taken from an old cache of "
            f"{old.cache.keys[0].shape[2]}, but this observation has {rows}: compute all of it"
        )
    fresh = torch.arange(rows) if old is None else torch.nonzero(~old.reused).flatten()
    everything = _Rows(fresh.to(embs.device), rows)
    return _run(model, embs[:, everything.index], everything, layers, None if old is None else old.cache)


def _check(model: Pi0, batch: int, depth: int, layers: int, old: OldRows | None) -> None:
    if batch != 1 or model.config.invalid_tokens != "dropped":
        raise ValueError(
            f"part of a prefix can be recomputed for one observation with invalid_tokens='dropped', not for {batch} "
            f"with {model.config.invalid_tokens!r}; recompute all of it"
        )
    if not 0 <= layers <= depth:
        raise ValueError(f"layers is {layers}; the prefix has {depth}, so 0 to {depth} can be taken over")
    if old is not None and old.cache.layers != layers:
        raise ValueError(f"the old cache was kept for {old.cache.layers} layers, {layers} were asked for")


@dataclass(frozen=True, eq=False)
class _Rows:
    """The fresh rows' places (n,) int64 among `total`."""

    index: Tensor
    total: int

    def into(self, old: Tensor, fresh: Tensor, dim: int) -> Tensor:
        """The old rows with the fresh ones in their places."""
        places = torch.arange(self.total, device=old.device).clamp_(max=old.shape[dim] - 1)
        return old.index_select(dim, places).index_copy_(dim, self.index, fresh)


def _run(model: Pi0, h: Tensor, rows: _Rows, layers: int, old: PartialCache | None) -> PartialCache:
    vlm, depth = model.vlm, len(model.vlm.layers)
    h = h.to(vlm.dtype)
    all_rows = torch.arange(rows.total, device=h.device)
    cos, sin = vlm.rope(all_rows[None], vlm.dtype)
    all_cos, all_sin = cos, sin
    cos, sin = cos[:, :, rows.index], sin[:, :, rows.index]
    keys, values, hidden = [], [], None
    for layer, block in enumerate(vlm.blocks):
        if layer == layers:
            hidden = h if old is None or old.hidden is None else rows.into(old.hidden, h, 1)
            h, cos, sin = hidden, all_cos, all_sin
        normed, gate, k, v = block.attention_inputs(h, cos, sin)
        if old is not None and layer < layers:
            k, v = rows.into(old.keys[layer], k, 2), rows.into(old.values[layer], v, 2)
        keys.append(k)
        values.append(v)
        if layer == depth - 1:
            break
        h = block.finish(h, gate, block.self_attn(normed, cos, sin, k, v, None))
    lengths = torch.tensor([rows.total], device=h.device)
    return PartialCache(tuple(keys), tuple(values), lengths, None, hidden, layers)
