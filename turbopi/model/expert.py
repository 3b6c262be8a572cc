"""The action expert: suffix tokens through a Gemma tower that also reads the prefix's keys and values (SPEC 1.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ModelConfig
from .gemma import GemmaTower, RotaryEmbedding, attention_bias
from .prefix import PrefixCache
from .taps import Tap


def suffix_visibility(config: ModelConfig, prefix_visible: Tensor) -> Tensor:
    """Which keys each suffix token sees.

    prefix_visible (B,P) bool -> (B,N,P+N) bool. Every suffix token sees the valid prefix; actions see the whole
    suffix, in both directions; of the suffix, π0's state token sees only itself.
    """
    batch, n = prefix_visible.shape[0], config.suffix_tokens
    own = torch.ones(n, n, dtype=torch.bool, device=prefix_visible.device)
    if config.kind == "pi0":
        own[0, 1:] = False
    return torch.cat((prefix_visible[:, None].expand(-1, n, -1), own.expand(batch, -1, -1)), dim=-1)


class ActionExpert(GemmaTower):
    """The smaller Gemma tower. π0.5's norms are conditioned on the time, π0's are plain."""

    def __init__(self, config: ModelConfig, rope: RotaryEmbedding) -> None:
        super().__init__(config.expert, cond_dim=config.expert.width if config.kind == "pi05" else None)
        self.config = config
        self.rope = rope

    def forward(self, cache: PrefixCache, embs: Tensor, cond: Tensor | None, tap: Tap | None = None) -> Tensor:
        """embs (B,N,width) float32, cond (B,width) or None -> (B,N,width) in the tower's dtype."""
        n = self.config.suffix_tokens
        positions = cache.lengths[:, None] + torch.arange(n, device=embs.device)
        # π0.5 with nothing invalid in the cache: every query sees every key, so there is no mask.
        everything = cache.valid is None and self.config.kind == "pi05"
        bias = None if everything else attention_bias(suffix_visibility(self.config, cache.visible))
        h = embs.to(self.dtype)
        cos, sin = self.rope(positions, self.dtype)
        for layer, block in enumerate(self.blocks):
            normed, gate, k, v = block.attention_inputs(h, cos, sin, cond)
            k = torch.cat((cache.keys[layer], k), dim=2)
            v = torch.cat((cache.values[layer], v), dim=2)
            h = block.finish(h, gate, block.self_attn(normed, cos, sin, k, v, bias), cond)
            if tap:
                tap(f"hidden{layer:02d}", h)
        return self.norm(h, cond)[0]
