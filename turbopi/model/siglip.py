"""SigLIP vision tower and the projector's input (SPEC 1.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import VisionConfig
from .taps import Tap

LAYER_NORM_EPS = 1e-6


class PatchEmbeddings(nn.Module):
    """Non-overlapping patches, row-major, plus a learned position each. Always float32."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.tokens, config.width)

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,S,S) float32 -> (B,tokens,width) float32."""
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        return patches + self.position_embedding.weight


class Attention(nn.Module):
    """Bidirectional multi-head attention with biases and no mask."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,width) -> (B,N,width)."""
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linears with a tanh-GELU between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,width) -> (B,N,width)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,width) -> (B,N,width)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))


class SiglipTower(nn.Module):
    """Images of one camera to features, final LayerNorm included."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    @property
    def dtype(self) -> torch.dtype:
        """In which the blocks run; the patch embedding is always float32."""
        return self.post_layernorm.weight.dtype

    def forward(self, images: Tensor, tap: Tap | None = None) -> Tensor:
        """(B,3,S,S) float32 in [-1,1] -> (B,tokens,width) in the tower's dtype."""
        x = self.embeddings(images)
        if tap:
            tap("embeddings", x)
        x = x.to(self.dtype)
        for layer, block in enumerate(self.encoder.layers):
            x = block(x)
            if tap:
                tap(f"layer{layer:02d}", x)
        x = self.post_layernorm(x)
        if tap:
            tap("post_ln", x)
        return x
