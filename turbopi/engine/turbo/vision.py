"""Stage 1 over static buffers: images to image tokens (SPEC 1.1)."""

from __future__ import annotations

from torch import Tensor

from ...config import VisionConfig
from ...quant.fold import FoldedVision
from .buffers import VisionBuffers
from .ops import Ops
from .products import Product, Target, add_product, multiply, multiply_gelu, target


def encode(config: VisionConfig, weights: FoldedVision, ops: Ops, images: Tensor, b: VisionBuffers) -> None:
    """images (B,C,3,S,S) float32 in [-1,1] or uint8 -> b.image_tokens (B·C·tokens, vlm width).

    The patch embedding is float32, as in the reference; each product runs in the format of its weight. From a block's
    first product onto the stream to its second, b.x lacks the first one's bias (`FoldedVisionBlock`).
    """
    if images.numel() == 0:
        return
    ops.patches(images.flatten(0, 1), b.patches)
    ops.matmul(b.patches, weights.patch, b.embedded)
    readers: list[Product | None] = [*(block.qkv.weight for block in weights.blocks), None]
    normed = target(readers[0], b.normed, b.normed_fp8)
    ops.layer_norm(b.embedded, normed.tensor, weights.position, b.x, inverse=normed.inverse)
    for block, next_reader in zip(weights.blocks, readers[1:], strict=True):
        multiply(ops, normed.tensor, block.qkv.weight, b.qkv, block.qkv.bias)
        into = target(block.out, b.attended, b.attended_fp8)
        attended = ops.vision_attention(b.qkv, into.tensor, config.heads, config.tokens, inverse=into.inverse)
        update = add_product(ops, attended, block.out, b.x, b.update, b.sums)
        normed = target(block.fc1.weight, b.normed, b.normed_fp8)
        _norm(ops, b, update, normed, block.out_bias)
        hidden = target(block.fc2, b.hidden, b.hidden_fp8)
        multiply_gelu(ops, normed.tensor, block.fc1, b.hidden, hidden)
        update = add_product(ops, hidden.tensor, block.fc2, b.x, b.update, b.sums)
        normed = target(next_reader, b.normed, b.normed_fp8)
        _norm(ops, b, update, normed, None)
    ops.matmul(b.normed, weights.projector.weight, b.image_tokens, bias=weights.projector.bias)


def _norm(ops: Ops, b: VisionBuffers, update: Tensor | None, into: Target, lacking: Tensor | None) -> None:
    """The stream, with what is still to be added to it, or `lacking` a bias, normed."""
    if update is None:
        ops.layer_norm(b.x, into.tensor, lacking, inverse=into.inverse)
    else:
        ops.residual_layer_norm(b.x, update, into.tensor, inverse=into.inverse)
