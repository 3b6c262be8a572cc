"""The Gemma block that prefix and action expert share (SPEC 1.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import GemmaConfig

RMS_EPS = 1e-6
ROPE_BASE = 10000.0
# Finite, so that a row with nothing to see becomes a uniform softmax and not NaN.
HIDDEN_LOGIT = -2.3819763e38


def attention_bias(visible: Tensor) -> Tensor:
    """(B,Q,K) bool, True where query sees key -> (B,1,Q,K) float32 added to the logits."""
    return torch.where(visible[:, None], 0.0, HIDDEN_LOGIT)


class RotaryEmbedding:
    """Cosines and sines of SPEC 1.3: half-split pairs, angles in float32, result in the model's dtype."""

    def __init__(self, head_dim: int, bf16_frequencies: bool) -> None:
        self.head_dim = head_dim
        self.bf16_frequencies = bf16_frequencies

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B,N) integer positions -> cos, sin, each (B,1,N,head_dim)."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device) / self.head_dim
        frequencies = 1.0 / ROPE_BASE**exponents
        if self.bf16_frequencies and dtype == torch.bfloat16:
            frequencies = frequencies.to(torch.bfloat16).float()
        angles = positions[:, None, :, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to (B,heads,N,head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _normalise(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)


class RMSNorm(nn.Module):
    """Root-mean-square norm with weight 1 + w; no gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, None]:
        """(B,N,width) -> normed in x's dtype, and no gate. `cond` is not used."""
        return (_normalise(x) * (1.0 + self.weight.float())).to(x.dtype), None


class AdaRMSNorm(nn.Module):
    """RMS norm whose scale, shift and residual gate come from a condition (π0.5's expert)."""

    def __init__(self, width: int, cond_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(cond_dim, 3 * width)
        # Scale, shift and gate start at zero, as in openpi: a fresh block is the identity.
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """(B,N,width), (B,cond_dim) -> normed (B,N,width) and gate (B,1,width), both in x's dtype."""
        scale, shift, gate = self.dense(cond)[:, None].chunk(3, dim=-1)
        normed = _normalise(x) * (1.0 + scale.float()) + shift.float()
        return normed.to(x.dtype), gate.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, in explicit steps."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.group = config.heads // config.kv_heads
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(B,N,width) -> rotated keys and values, each (B,kv_heads,N,head_dim)."""
        k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        return rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Queries of x (B,N,width) over keys and values (B,kv_heads,K,head_dim) -> (B,N,width)."""
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2), cos, sin)
        keys, values = (t.repeat_interleave(self.group, dim=1) for t in (keys, values))
        logits = q @ keys.transpose(2, 3) * self.head_dim**-0.5
        if bias is not None:
            logits = logits + bias
        weights = logits.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        return self.o_proj((weights @ values).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated MLP: tanh-GELU on the gate."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,width) -> (B,N,width)."""
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def gated_residual(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    """x + update, the update first scaled by the gate where there is one."""
    return x + update if gate is None else x + update * gate


def make_norm(width: int, cond_dim: int | None) -> RMSNorm | AdaRMSNorm:
    """RMSNorm, or adaRMS when the tower is conditioned."""
    return RMSNorm(width) if cond_dim is None else AdaRMSNorm(width, cond_dim)


class Block(nn.Module):
    """One layer. Its keys and values are made separately, because they outlive the layer in the PrefixCache."""

    def __init__(self, config: GemmaConfig, cond_dim: int | None) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config.width, cond_dim)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config.width, cond_dim)
        self.mlp = MLP(config)

    def attention_inputs(
        self, x: Tensor, cos: Tensor, sin: Tensor, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Normed x, its residual gate, and this layer's own keys and values."""
        normed, gate = self.input_layernorm(x, cond)
        return normed, gate, *self.self_attn.keys_values(normed, cos, sin)

    def finish(self, x: Tensor, gate: Tensor | None, attended: Tensor, cond: Tensor | None = None) -> Tensor:
        """Close the attention residual and run the MLP."""
        x = gated_residual(x, attended, gate)
        normed, gate = self.post_attention_layernorm(x, cond)
        return gated_residual(x, self.mlp(normed), gate)


class GemmaTower(nn.Module):
    """A stack of blocks and the final norm; the prefix tower also embeds tokens.

    `cond_dim` makes every norm an adaRMS of that condition; `vocab_size` adds the token embedding.
    """

    def __init__(self, config: GemmaConfig, *, cond_dim: int | None = None, vocab_size: int | None = None) -> None:
        super().__init__()
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, config.width)
            # The embedding is multiplied by sqrt(width): this makes tokens O(1).
            nn.init.normal_(self.embed_tokens.weight, std=config.width**-0.5)
        self.layers = nn.ModuleList(Block(config, cond_dim) for _ in range(config.depth))
        self.norm = make_norm(config.width, cond_dim)

    @property
    def blocks(self) -> Sequence[Block]:
        """The layers, as what they are."""
        return cast("Sequence[Block]", self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""
        return self.blocks[0].self_attn.q_proj.weight.dtype
