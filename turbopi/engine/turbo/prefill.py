"""Stage 2 over static buffers: image tokens and prompt to keys and values (SPEC 1.2 and 1.3)."""

from __future__ import annotations

from ...config import ModelConfig
from .buffers import Buffers, PrefillBuffers, RequestBuffers
from .ops import Ops
from .weights import TurboWeights


def embed(config: ModelConfig, weights: TurboWeights, ops: Ops, request: RequestBuffers, buffers: Buffers) -> None:
    """Image tokens, then each sample's prompt from its row `first` on. Every row is written: none keeps old values."""
    b, rows = buffers.prefill, buffers.rows
    images = buffers.bucket.cameras * config.vision.tokens
    if images:
        x = b.x.view(buffers.bucket.batch, rows, -1)
        x[:, :images].copy_(buffers.vision.image_tokens.view(buffers.bucket.batch, images, -1))
    table = weights.prefix
    ops.embed_tokens(request.tokens, table.embedding, table.scale, b.x, request.first, rows)


def prefill(config: ModelConfig, weights: TurboWeights, ops: Ops, request: RequestBuffers, buffers: Buffers) -> None:
    """buffers.vision.image_tokens and request.tokens -> b.keys, b.values, their first `lengths` slots valid.

    Rows behind a sample's valid tokens are computed with the rest and never read by a valid one.
    """
    embed(config, weights, ops, request, buffers)
    b, rows = buffers.prefill, buffers.rows
    cos, sin = weights.cos, weights.sin
    for layer, block in enumerate(weights.prefix.blocks):
        keys, values = b.keys[layer], b.values[layer]
        ops.rms_norm(b.x, b.normed)
        ops.matmul(b.normed, block.qkv, b.qkv)
        ops.rotate_and_store(b.qkv, cos, sin, b.zero, b.q, keys, values, rows)
        ops.attention(b.q, keys, values, request.lengths, b.attended, rows)
        ops.matmul(b.attended, block.out, b.x, residual=b.x)
        ops.rms_norm(b.x, b.normed)
        ops.geglu_matmul(b.normed, block.gate_up, b.gate_up, b.hidden)
        ops.matmul(b.hidden, block.down, b.x, residual=b.x)
    _last_layer(weights, ops, b, rows)


def _last_layer(weights: TurboWeights, ops: Ops, b: PrefillBuffers, rows: int) -> None:
    """Only keys and values: nothing reads the last layer's output."""
    merged = weights.prefix.last_keys_values
    keys_values = b.qkv.view(-1)[: len(b.x) * len(merged)].view(len(b.x), len(merged))
    ops.rms_norm(b.x, b.normed)
    ops.matmul(b.normed, merged, keys_values)
    no_queries = b.q[:, :0]
    ops.rotate_and_store(keys_values, weights.cos, weights.sin, b.zero, no_queries, b.keys[-1], b.values[-1], rows)
