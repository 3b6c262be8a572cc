"""Random weights of a SigLIP tower of the full model's size, for the benchmarks of stage 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from turbopi.quant.fold import Affine, FoldedAffine, FoldedVision, FoldedVisionBlock
from turbopi.quant.fp8 import to_fp8_weight

WIDTH, MLP, HIDDEN, HEADS, DEPTH, PROJECTED, TOKENS = 1152, 4304, 4352, 16, 27, 2048, 256
CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    """Normal values."""
    return torch.randn(shape, device=CUDA).mul_(scale).to(dtype)


def random_weights() -> FoldedVision:
    """Of a tower whose stream neither dies nor explodes. `out` has no bias: it is worth no time."""
    blocks = []
    for _ in range(DEPTH):
        qkv, fc1, fc1_bias = random(3 * WIDTH, WIDTH, scale=0.03), random(HIDDEN, WIDTH, scale=0.03), random(HIDDEN)
        qkv[:WIDTH] *= (WIDTH // HEADS) ** -0.5
        fc1[MLP:], fc1_bias[MLP:] = 0, 0
        blocks.append(
            FoldedVisionBlock(
                FoldedAffine(qkv, random(3 * WIDTH, scale=0.1)),
                random(WIDTH, WIDTH, scale=0.02),
                torch.zeros(1, WIDTH, device=CUDA),
                FoldedAffine(fc1, fc1_bias),
                random(WIDTH, HIDDEN, scale=0.01),
            )
        )
    patch = random(WIDTH, 588, scale=0.04, dtype=torch.float32)
    projector = Affine(random(PROJECTED, WIDTH, scale=0.03), random(PROJECTED))
    return FoldedVision(patch, random(TOKENS, WIDTH, dtype=torch.float32), tuple(blocks), projector)


def in_e4m3(weights: FoldedVision, reaches: Sequence[float]) -> FoldedVision:
    """The blocks' products in E4M3, for inputs that reach so far: of qkv, `out`, fc1 and fc2, block by block.

    Those onto the stream bring a bias, of zeros.
    """
    blocks, none = [], torch.zeros(WIDTH, device=CUDA, dtype=BF16)
    for i, block in enumerate(weights.blocks):
        qkv, out, fc1, fc2 = reaches[4 * i : 4 * i + 4]
        blocks.append(
            replace(
                block,
                qkv=FoldedAffine(to_fp8_weight(block.qkv.weight, qkv), block.qkv.bias),
                out=to_fp8_weight(block.out, out, none),
                fc1=FoldedAffine(to_fp8_weight(block.fc1.weight, fc1), block.fc1.bias),
                fc2=to_fp8_weight(block.fc2, fc2, none),
            )
        )
    return replace(weights, blocks=tuple(blocks))
