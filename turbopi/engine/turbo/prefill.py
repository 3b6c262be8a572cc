"""Stage 2 over static buffers: image tokens and prompt to keys and values (SPEC 1.2 and 1.3)."""

from __future__ import annotations

from ...config import ModelConfig
from ...kernels import attention_misfits, prefix_attention_config
from .buffers import Buffers, PrefillBuffers, RequestBuffers
from .ops import Ops
from .products import Product, Target, Update, add_later, multiply_for, multiply_geglu, target, width
from .weights import TurboWeights


def embed(config: ModelConfig, weights: TurboWeights, ops: Ops, request: RequestBuffers, buffers: Buffers) -> None:
    """Image tokens, then each sample's prompt from its row `first` on.

    Every row that a sample counts is written. In a ragged batch, rows behind a prompt that begins further in front than
    the others' keep old values; no valid row reads them.
    """
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
    update: Update | None = None
    for layer, block in enumerate(weights.prefix.blocks):
        keys, values = b.keys[layer], b.values[layer]
        normed = _norm(ops, b, update, block.qkv)
        scale = multiply_for(ops, normed.tensor, block.qkv, b.qkv)
        ops.rotate_and_store(b.qkv, cos, sin, b.zero, b.q, keys, values, rows, scale)
        attended = target(block.out, b.attended, b.attended_fp8)
        ops.attention(b.q, keys, values, request.lengths, attended.tensor, rows, inverse=attended.inverse)
        update = add_later(ops, attended.tensor, block.out, b.x, b.update)
        normed = _norm(ops, b, update, block.gate_up)
        hidden = target(block.down, b.hidden, b.hidden_fp8)
        multiply_geglu(ops, normed.tensor, block.gate_up, b.gate_up, hidden)
        update = add_later(ops, hidden.tensor, block.down, b.x, b.update)
    _last_layer(weights, ops, b, rows, update)


def attention_obstacles(config: ModelConfig, weights: TurboWeights) -> list[str]:
    """Why the prefix's attention is not `kernels.prefix_attention`; empty if it is. A fixed rule."""
    vlm, like = config.vlm, weights.cos.new_empty(0, dtype=weights.dtype)
    found = attention_misfits(vlm.kv_heads, vlm.head_dim, weights.dtype, weights.device)
    if prefix_attention_config(like, vlm.heads, vlm.head_dim) is None:
        found.append("no entry in the tuned file of this GPU")
    return found


def _norm(ops: Ops, b: PrefillBuffers, update: Update | None, reader: Product) -> Target:
    """The stream, with what is still to be added to it, normed for the product that reads it."""
    into = target(reader, b.normed, b.normed_fp8)
    if update is None:
        ops.rms_norm(b.x, into.tensor, inverse=into.inverse)
    else:
        ops.gated_residual_norm(b.x, update.sums, update.scale, None, None, into.tensor, inverse=into.inverse)
    return into


def _last_layer(weights: TurboWeights, ops: Ops, b: PrefillBuffers, rows: int, update: Update | None) -> None:
    """Only keys and values: nothing reads the last layer's output."""
    merged = weights.prefix.last_keys_values
    columns = width(merged)
    keys_values = b.qkv.view(-1)[: len(b.x) * columns].view(len(b.x), columns)
    normed = _norm(ops, b, update, merged)
    scale = multiply_for(ops, normed.tensor, merged, keys_values)
    cache = b.q[:, :0], b.keys[-1], b.values[-1]
    ops.rotate_and_store(keys_values, weights.cos, weights.sin, b.zero, *cache, rows, scale)
