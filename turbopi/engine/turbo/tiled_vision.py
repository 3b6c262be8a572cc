"""Stage 1 in five kernels a block: norms behind the products, moments from whoever made the stream (SPEC 1.1).

LayerNorm(x) Wᵀ is (x Wᵀ - mean * sums of W's rows) * rstd, so a product can take the stream itself and be normed when
it is summed up. Mean and rstd come from the product in front, which has the stream's new rows in its registers. Each
kernel is launched before the one in front has ended. In E4M3 the input is normed before it is rounded: that takes seven
kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import kernels
from ...config import VisionConfig
from ...kernels import LinearTiling, Norm, VisionTilings
from ...quant.fold import FoldedAffine, FoldedVision
from ...quant.fp8 import Fp8Weight
from .buffers import GREY_PARTS, VisionBuffers
from .ops import Ops
from .vision import encode


@dataclass(frozen=True, eq=False)
class _BlockSums:
    """Beside a `FoldedVisionBlock`.

    Attributes:
        qkv, fc1: float32, sums of the rows of those weights.
        out_bias: (width,) in the tower's dtype, which here the stream gets at once.
        back: the same, negative: fc2 brings it once more.
    """

    qkv: Tensor
    fc1: Tensor
    out_bias: Tensor
    back: Tensor


@dataclass(frozen=True, eq=False)
class VisionSums:
    """What norms behind products need beside the folded weights; `vision_sums` makes it.

    Attributes:
        blocks: none in E4M3.
        projector: as in a block.
        patch: (width, 3·w) bfloat16, the patch embedding of grey levels: three parts that add up to it in float32.
        position: (tokens, width) float32, with what a grey level of 0 is worth.
    """

    blocks: tuple[_BlockSums, ...]
    projector: Tensor
    patch: Tensor
    position: Tensor


def vision_sums(weights: FoldedVision) -> VisionSums:
    """Of weights whose products are all in E4M3, or none."""

    def sums(weight: Tensor) -> Tensor:
        return weight.float().sum(1)

    blocks = []
    for block in weights.blocks if not _in_e4m3(weights) else ():
        bias = block.out_bias[0].to(block.out.dtype)
        blocks.append(_BlockSums(sums(block.qkv.weight), sums(block.fc1.weight), bias, -bias))
    patch = weights.patch.double()
    position = weights.position - patch.sum(1).float()
    return VisionSums(tuple(blocks), sums(weights.projector.weight), grey_parts(patch * 2 / 255), position)


def grey_parts(weight: Tensor) -> Tensor:
    """weight (N,K) float64 in three parts of bfloat16 beside one another, each of K in whole 16 bytes."""
    parts = []
    for _ in range(GREY_PARTS):
        parts.append(F.pad(weight.bfloat16(), (0, -weight.shape[1] % 8)))
        weight = weight - weight.bfloat16()
    return torch.cat(parts, dim=1)


def tiled_vision_obstacles(config: VisionConfig, weights: FoldedVision) -> list[str]:
    """Why no number of rows goes through `encode_tiled`; empty if those may that have an entry. A fixed rule."""
    if not weights.blocks:
        return ["no blocks"]
    products = [w for b in weights.blocks for w in (b.qkv.weight, b.out, b.fc1.weight, b.fc2)]
    if len({isinstance(product, Fp8Weight) for product in products}) > 1:
        return ["products of the tower in two formats"]
    like = weights.projector.weight
    return kernels.vision_attention_misfits(config.width // config.heads, config.tokens, like.dtype, like.device)


def _in_e4m3(weights: FoldedVision) -> bool:
    """Whether the products of the blocks are."""
    return any(isinstance(block.fc2, Fp8Weight) for block in weights.blocks)


def _values(product: Tensor | Fp8Weight) -> Tensor:
    return product.values if isinstance(product, Fp8Weight) else product


class VisionStage:
    """Runs stage 1 by `encode_tiled` where nothing is in the way, else by `encode`. A fixed rule, told by `told`."""

    def __init__(self, config: VisionConfig, weights: FoldedVision, obstacles: list[str] | None = None) -> None:
        self._config, self._weights = config, weights
        self._obstacles = tiled_vision_obstacles(config, weights) if obstacles is None else obstacles
        self._told: dict[int, str] = {}

    @cached_property
    def _sums(self) -> VisionSums:
        """Made when the first number of rows needs it: in the run before a capture."""
        return vision_sums(self._weights)

    def watched(self) -> VisionStage:
        """The same kernel by kernel, as an audit wants to see it."""
        return VisionStage(self._config, self._weights, ["watched kernel by kernel"])

    def run(self, ops: Ops, images: Tensor, b: VisionBuffers) -> None:
        """See `encode`."""
        rows = len(b.x)
        tilings = None if self._obstacles else kernels.vision_tilings(_values(self._weights.blocks[0].fc2), rows)
        if tilings is None:
            self._told[rows] = "; ".join(self._obstacles) or f"no entry for {rows} rows in the tuned file"
            encode(self._config, self._weights, ops, images, b)
            return
        e4m3 = _in_e4m3(self._weights)
        self._told[rows] = "tiled products in E4M3" if e4m3 else "norms behind products"
        by_tiles = encode_tiled_fp8 if e4m3 else encode_tiled
        by_tiles(self._config, self._weights, self._sums, tilings, ops, images, b)

    def told(self) -> dict[str, str]:
        """Of each number of rows that was computed: how, or what is in the way of the tiled kernels."""
        return {str(rows): how for rows, how in sorted(self._told.items())}


def encode_tiled(
    config: VisionConfig,
    weights: FoldedVision,
    sums: VisionSums,
    tilings: VisionTilings,
    ops: Ops,
    images: Tensor,
    b: VisionBuffers,
) -> None:
    """`vision.encode`, the same arguments and the same result within rounding."""
    of_out, of_fc2 = (_moments(b, i, t.columns) for i, t in enumerate((tilings.out, tilings.fc2)))
    position = _embed(weights, sums, tilings, ops, images, b)
    # Nobody has made the moments of the first block's stream: it is normed on its way.
    ops.layer_norm(b.embedded, b.normed, position, b.x)
    linear, last = ops.tiled_linear, weights.projector
    x = b.normed
    for block, beside in zip(weights.blocks, sums.blocks, strict=True):
        qkv, fc1 = block.qkv, block.fc1
        norm = None if x is b.normed else Norm(beside.qkv, of_fc2)
        linear(x, qkv.weight, b.qkv, tilings.qkv, qkv.bias, norm=norm)
        attended = ops.vision_attention(b.qkv, b.attended, config.heads, config.tokens, early=tilings.early_attention)
        linear(attended, block.out, b.x, tilings.out, beside.out_bias, "none", b.x, moments=of_out)
        norm = Norm(beside.fc1, of_out)
        linear(b.x, fc1.weight, b.hidden, tilings.fc1, fc1.bias, "gelu", norm=norm)
        linear(b.hidden, block.fc2, b.x, tilings.fc2, beside.back, "none", b.x, moments=of_fc2)
        x = b.x
    linear(x, last.weight, b.image_tokens, tilings.projector, last.bias, norm=Norm(sums.projector, of_fc2))


def encode_tiled_fp8(
    config: VisionConfig,
    weights: FoldedVision,
    sums: VisionSums,
    tilings: VisionTilings,
    ops: Ops,
    images: Tensor,
    b: VisionBuffers,
) -> None:
    """`encode_tiled`, of blocks in E4M3: what a product reads is normed, then rounded, as `vision.encode` does it."""
    moments, last = _moments(b, 1, tilings.fc2.columns), weights.projector
    position = _embed(weights, sums, tilings, ops, images, b)
    normed, readers = b.normed_fp8, [block.qkv.weight.inverse for block in weights.blocks[1:]]
    ops.layer_norm(b.embedded, normed, position, b.x, inverse=weights.blocks[0].qkv.weight.inverse)
    for block, reader in zip(weights.blocks, [*readers, None], strict=True):
        out, fc1, fc2 = block.out, block.fc1, block.fc2
        _multiply(ops, normed, block.qkv, b.qkv, tilings.qkv)
        attended = ops.vision_attention(
            b.qkv, b.attended_fp8, config.heads, config.tokens, inverse=out.inverse, early=tilings.early_attention
        )
        _add(ops, attended, out, b.x, tilings.out)
        ops.early_norm(b.x, normed, inverse=fc1.weight.inverse)
        _multiply(ops, normed, fc1, b.hidden_fp8, tilings.fc1, "gelu", fc2.inverse)
        if reader is None:  # but the projector, which is in bfloat16 and norms what it reads
            _add(ops, b.hidden_fp8, fc2, b.x, tilings.fc2, moments)
        else:
            _add(ops, b.hidden_fp8, fc2, b.x, tilings.fc2)
            ops.early_norm(b.x, normed, inverse=reader)
    norm = Norm(sums.projector, moments)
    ops.tiled_linear(b.x, last.weight, b.image_tokens, tilings.projector, last.bias, norm=norm)


def _multiply(
    ops: Ops,
    x: Tensor,
    linear: FoldedAffine[Fp8Weight],
    out: Tensor,
    tiling: LinearTiling,
    activation: str = "none",
    inverse: float = 1.0,
) -> None:
    weight = linear.weight
    ops.tiled_linear(x, weight.values, out, tiling, linear.bias, activation, scale=weight.scale, inverse=inverse)


def _add(
    ops: Ops, x: Tensor, weight: Fp8Weight, stream: Tensor, tiling: LinearTiling, moments: Tensor | None = None
) -> None:
    """stream += x · weightᵀ, and the moments of it for who norms it behind a product."""
    ops.tiled_linear(
        x, weight.values, stream, tiling, weight.bias, residual=stream, moments=moments, scale=weight.scale
    )


def _embed(
    weights: FoldedVision, sums: VisionSums, tilings: VisionTilings, ops: Ops, images: Tensor, b: VisionBuffers
) -> Tensor:
    """Leaves patches in b.embedded, and returns the position that they lack."""
    if tilings.grey and images.dtype == torch.uint8:
        ops.patches(images.flatten(0, 1), b.grey, GREY_PARTS)
        ops.wide_matmul(b.grey, sums.patch, b.embedded)
        return sums.position
    ops.patches(images.flatten(0, 1), b.patches)
    ops.matmul(b.patches, weights.patch, b.embedded)
    return weights.position


def _moments(b: VisionBuffers, which: int, columns: int) -> Tensor:
    """(rows, tiles, 2), of tiles of so many columns."""
    rows, width = b.x.shape
    tiles = width // columns
    return b.moments[which, : rows * tiles].view(rows, tiles, 2)
