"""Stage 1 over static buffers: images to image tokens (SPEC 1.1)."""

from __future__ import annotations

from torch import Tensor

from ...config import VisionConfig
from ...quant.fold import FoldedVision
from .buffers import VisionBuffers
from .ops import Ops


def encode(config: VisionConfig, weights: FoldedVision, ops: Ops, images: Tensor, b: VisionBuffers) -> None:
    """images (B,C,3,S,S) float32 in [-1,1] or uint8 -> b.image_tokens (B·C·tokens, vlm width).

    The patch embedding is float32, as in the reference; the blocks run in the dtype of their weights. From a block's
    first product onto the stream to its second, b.x lacks the first one's bias (`FoldedVisionBlock`).
    """
    if images.numel() == 0:
        return
    ops.patches(images.flatten(0, 1), b.patches)
    ops.matmul(b.patches, weights.patch, b.embedded)
    ops.layer_norm(b.embedded, b.normed, weights.position, b.x)
    for block in weights.blocks:
        ops.matmul(b.normed, block.qkv.weight, b.qkv, bias=block.qkv.bias)
        attended = ops.vision_attention(b.qkv, b.attended, config.heads, config.tokens)
        ops.matmul(attended, block.out, b.x, residual=b.x)
        ops.layer_norm(b.x, b.normed, block.out_bias)
        ops.matmul(b.normed, block.fc1.weight, b.hidden, bias=block.fc1.bias, activation="gelu")
        ops.matmul(b.hidden, block.fc2, b.x, residual=b.x)
        ops.layer_norm(b.x, b.normed)
    ops.matmul(b.normed, weights.projector.weight, b.image_tokens, bias=weights.projector.bias)
