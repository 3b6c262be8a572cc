"""The prefix: image and prompt tokens through the Gemma tower into a PrefixCache (SPEC 1.2, 1.3, 1.6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import GemmaConfig
from .gemma import GemmaTower, RotaryEmbedding, attention_bias
from .taps import Tap


@dataclass(frozen=True)
class PrefixCache:
    """Per-layer keys and values of the prefix, all that the denoise stage needs of it.

    Attributes:
        keys, values: one (B,kv_heads,P,head_dim) tensor a layer, keys after rotation, in the model's dtype.
        lengths: (B,) int64, valid tokens of each sample; the suffix's positions start there.
        valid: (B,P) bool, or None if every token of every sample is valid.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: Tensor
    valid: Tensor | None

    @property
    def visible(self) -> Tensor:
        """(B,P) bool, which prefix tokens the suffix may read."""
        if self.valid is not None:
            return self.valid
        keys = self.keys[0]
        return torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)


def drop_invalid(embs: Tensor, valid: Tensor) -> tuple[Tensor, Tensor | None]:
    """Move the valid tokens of each sample to the front, in order, and cut what lies behind the longest.

    embs (B,P,D), valid (B,P) bool -> packed (B,L,D), and (B,L) bool, or None where no sample is shorter than L.
    """
    lengths = valid.sum(dim=1)
    longest = int(lengths.max())
    order = torch.argsort(~valid, dim=1, stable=True)[:, :longest]
    packed = torch.take_along_dim(embs, order[:, :, None], dim=1)
    still_valid = torch.arange(longest, device=embs.device) < lengths[:, None]
    return packed, None if bool(still_valid.all()) else still_valid


class PrefixTower(GemmaTower):
    """Gemma over images and prompt: bidirectional among valid tokens."""

    def __init__(self, config: GemmaConfig, vocab_size: int, rope: RotaryEmbedding, *, round_scale: bool) -> None:
        super().__init__(config, vocab_size=vocab_size)
        self.width = config.width
        self.rope = rope
        self.round_scale = round_scale

    def embed(self, tokens: Tensor) -> Tensor:
        """(B,T) int64 -> (B,T,width): table rows times sqrt(width). Image tokens are never scaled."""
        rows = self.embed_tokens(tokens)
        scale = math.sqrt(self.width)
        return rows * (torch.tensor(scale, dtype=rows.dtype, device=rows.device) if self.round_scale else scale)

    def forward(self, embs: Tensor, valid: Tensor | None, tap: Tap | None = None) -> PrefixCache:
        """embs (B,P,width), valid (B,P) bool or None for all -> cache. Invalid tokens do not advance positions."""
        cells = torch.ones(embs.shape[:2], dtype=torch.bool, device=embs.device) if valid is None else valid
        positions = cells.cumsum(dim=1) - 1
        if tap:
            tap("embs", embs)
            tap("pad_mask", cells)
            tap("position_ids", positions)
        bias = None if valid is None else attention_bias(valid[:, None, :] & valid[:, :, None])
        h = embs.to(self.dtype)
        cos, sin = self.rope(positions, self.dtype)
        keys, values = [], []
        for layer, block in enumerate(self.blocks):
            normed, gate, k, v = block.attention_inputs(h, cos, sin)
            keys.append(k)
            values.append(v)
            if tap:
                tap(f"k{layer:02d}", k)
                tap(f"v{layer:02d}", v)
            elif layer == len(self.layers) - 1:
                break  # nothing reads the last layer's output; only a tap wants to see it
            h = block.finish(h, gate, block.self_attn(normed, cos, sin, k, v, bias))
            if tap:
                tap(f"hidden{layer:02d}", h)
        if tap:
            tap("out", self.norm(h)[0])
        return PrefixCache(tuple(keys), tuple(values), cells.sum(dim=1), valid)
