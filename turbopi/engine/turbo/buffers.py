"""Static memory: one arena for a batch size, and a bucket's tensors as views into it.

Every bucket of a batch size uses the same storage, since one is computed at a time. Nothing here is allocated during
a tick, and every address stays, which is what a CUDA graph needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from ...config import ModelConfig
from ...kernels import E4M3
from ...quant.fold import hidden_width
from .buckets import Bucket
from .fp8_ops import MOST_SPLITS as MOST_PRODUCT_SPLITS

ALIGNMENT = 256
QUERY_ROWS = 64
"""Rows of a program of the split attention, at most."""
MULTIPROCESSORS = 128
MOST_SPLITS = 16
MOST_FUSED_ROWS = 128
"""Suffix rows that `FusedLoop` takes at most."""
MOST_TILED_ROWS = 1024
"""Of images that `encode_tiled` takes at most."""
MOST_TILES = 36
"""Of a row of the stream, whose moments are kept apart."""
GREY_PARTS = 3
"""In bfloat16 of a weight in float32."""
PRODUCT_PARTS = 8
"""Parts of K in which it computes a product onto the stream, at most."""
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class RequestBuffers:
    """What one tick is told, on the device. The fields are laid out one after the other (`Blob`).

    Attributes:
        lengths: (B,) int32, valid prefix tokens of each sample; here the suffix's positions start.
        first: (B,) int32, the row at which its prompt starts.
        tokens: (B,T) int64, its prompt, then 0.
        state: (B,state_dim) float32.
        noise: (B,H,action_dim) float32.
        images: (B,C,3,S,S) float32 or uint8, its valid cameras first.
    """

    lengths: Tensor
    first: Tensor
    tokens: Tensor
    state: Tensor
    noise: Tensor
    images: Tensor


@dataclass(frozen=True, eq=False)
class VisionBuffers:
    """B·C images in rows. `image_tokens` (B·C·S, vlm width) is what the stage leaves.

    `grey` (rows, 3 patches) and `moments` (2, rows of tiles, 2) float32, in the middle of a block and at its end, are
    `encode_tiled`'s.
    `update`, `sums` (float32, parts of a product) and those named `_fp8` (E4M3, what fp8 products read) have rows where
    there is a product in fp8.
    """

    patches: Tensor
    embedded: Tensor
    x: Tensor
    normed: Tensor
    qkv: Tensor
    attended: Tensor
    hidden: Tensor
    image_tokens: Tensor
    grey: Tensor
    moments: Tensor
    update: Tensor
    sums: Tensor
    normed_fp8: Tensor
    attended_fp8: Tensor
    hidden_fp8: Tensor


@dataclass(frozen=True, eq=False)
class PrefillBuffers:
    """B·P rows of the prefix.

    `keys` and `values` (depth,B,kv_heads,P+N,head_dim) are what the stage leaves: token i of a sample in slot i, and
    room behind its last valid token for the suffix. `gate_up` has rows where that product is stored. `update` and
    `_fp8` as in `VisionBuffers`.
    """

    zero: Tensor
    x: Tensor
    normed: Tensor
    qkv: Tensor
    q: Tensor
    attended: Tensor
    gate_up: Tensor
    hidden: Tensor
    keys: Tensor
    values: Tensor
    update: Tensor
    normed_fp8: Tensor
    attended_fp8: Tensor
    hidden_fp8: Tensor


@dataclass(frozen=True, eq=False)
class DenoiseBuffers:
    """B·N rows of the suffix.

    `x_t` (B·H,action_dim) float32 starts as the noise and ends as the actions. `mixed`, `projected` (B·H,width) and
    `state_token` (B,width) are float32 and only π0's. `ends` (B,) int32 is where each sample's keys end, for
    `ManyRowsLoop`; `partial` and `partial_lse` belong to the split attention, `parts` to the split products of
    `FusedLoop`. `_fp8` as in `VisionBuffers`.
    """

    x_t: Tensor
    x: Tensor
    normed: Tensor
    qkv: Tensor
    q: Tensor
    attended: Tensor
    update: Tensor
    gate_up: Tensor
    hidden: Tensor
    mixed: Tensor
    projected: Tensor
    state_token: Tensor
    ends: Tensor
    partial: Tensor
    partial_lse: Tensor
    parts: Tensor
    normed_fp8: Tensor
    attended_fp8: Tensor
    hidden_fp8: Tensor


@dataclass(frozen=True, eq=False)
class Buffers:
    """Everything that one bucket reads and writes. `outcome` is x_t and, behind it, 1.0 if all of it is finite."""

    bucket: Bucket
    rows: int
    vision: VisionBuffers
    prefill: PrefillBuffers
    denoise: DenoiseBuffers
    outcome: Tensor
    finite: Tensor


Spec = tuple[tuple[int, ...], torch.dtype]


def build(kind: type[T], make: Callable[[str, Spec], Tensor], specs: dict[str, Spec]) -> T:
    """A dataclass of tensors, each made from its shape and dtype."""
    return kind(**{f.name: make(f.name, specs[f.name]) for f in fields(kind)})  # type: ignore[arg-type]


def request_specs(config: ModelConfig, bucket: Bucket, image_dtype: torch.dtype) -> dict[str, Spec]:
    """Shapes and dtypes of a bucket's `RequestBuffers`."""
    size = config.vision.image_size
    return {
        "lengths": ((bucket.batch,), torch.int32),
        "first": ((bucket.batch,), torch.int32),
        "tokens": ((bucket.batch, bucket.tokens), torch.int64),
        "state": ((bucket.batch, config.state_dim), torch.float32),
        "noise": ((bucket.batch, config.horizon, config.action_dim), torch.float32),
        "images": ((bucket.batch, bucket.cameras, 3, size, size), image_dtype),
    }


def grey_width(patch_size: int) -> int:
    """Columns of a patch where rows are multiples of 16 bytes."""
    return -(-3 * patch_size**2 // 8) * 8


def _fp8_specs(specs: dict[str, Spec], fp8: bool) -> dict[str, Spec]:
    """E4M3 twins of the buffers that products read, without rows where no product is in fp8."""
    return {
        f"{name}_fp8": ((specs[name][0][0] if fp8 else 0, specs[name][0][1]), E4M3)
        for name in ("normed", "attended", "hidden")
    }


def vision_specs(config: ModelConfig, bucket: Bucket, dtype: torch.dtype, fp8: bool = False) -> dict[str, Spec]:
    """Shapes and dtypes of a bucket's `VisionBuffers`; `fp8`: with those of fp8 products."""
    vision = config.vision
    rows = bucket.batch * bucket.cameras * vision.tokens
    tiled_rows = rows if rows <= MOST_TILED_ROWS else 0
    specs: dict[str, Spec] = {
        "patches": ((rows, 3 * vision.patch_size**2), torch.float32),
        "embedded": ((rows, vision.width), torch.float32),
        "x": ((rows, vision.width), dtype),
        "normed": ((rows, vision.width), dtype),
        "qkv": ((rows, 3 * vision.width), dtype),
        "attended": ((rows, vision.width), dtype),
        "hidden": ((rows, hidden_width(vision.mlp_dim)), dtype),
        "image_tokens": ((rows, config.vlm.width), dtype),
        "grey": ((tiled_rows, GREY_PARTS * grey_width(vision.patch_size)), torch.bfloat16),
        "moments": ((2, tiled_rows * MOST_TILES, 2), torch.float32),
        "update": ((rows if fp8 else 0, vision.width), dtype),
        "sums": ((MOST_PRODUCT_SPLITS, rows if fp8 else 0, vision.width), torch.float32),
    }
    return specs | _fp8_specs(specs, fp8)


def prefill_specs(
    config: ModelConfig, bucket: Bucket, dtype: torch.dtype, fp8: bool = False, tiled: bool = False
) -> dict[str, Spec]:
    """Shapes and dtypes of a bucket's `PrefillBuffers`.

    `fp8`: with those of fp8 products. `tiled`: gate and up are `TiledGeglu`, and their product is never stored.
    """
    vlm = config.vlm
    rows = bucket.batch * bucket.rows(config)
    slots = bucket.rows(config) + config.suffix_tokens
    queries, heads = vlm.heads * vlm.head_dim, vlm.heads + 2 * vlm.kv_heads
    cache: Spec = ((vlm.depth, bucket.batch, vlm.kv_heads, slots, vlm.head_dim), dtype)
    specs: dict[str, Spec] = {
        "zero": ((bucket.batch,), torch.int32),
        "x": ((rows, vlm.width), dtype),
        "normed": ((rows, vlm.width), dtype),
        "qkv": ((rows, heads * vlm.head_dim), dtype),
        "q": ((rows, queries), dtype),
        "attended": ((rows, queries), dtype),
        "gate_up": ((0 if tiled else rows, 2 * vlm.mlp_dim), dtype),
        "hidden": ((rows, vlm.mlp_dim), dtype),
        "keys": cache,
        "values": cache,
        "update": ((rows if fp8 else 0, vlm.width), dtype),
    }
    return specs | _fp8_specs(specs, fp8)


def key_splits(config: ModelConfig, batch: int) -> int:
    """Parts in which the suffix's attention cuts the keys: about a program for each multiprocessor of a large GPU."""
    expert = config.expert
    group = expert.heads // expert.kv_heads
    programs = batch * expert.kv_heads * -(-config.suffix_tokens * group // QUERY_ROWS)
    return max(1, min(MOST_SPLITS, MULTIPROCESSORS // programs))


def denoise_specs(config: ModelConfig, bucket: Bucket, dtype: torch.dtype, fp8: bool = False) -> dict[str, Spec]:
    """Shapes and dtypes of a bucket's `DenoiseBuffers`; `fp8`: with those of fp8 products."""
    expert = config.expert
    rows, actions = bucket.batch * config.suffix_tokens, bucket.batch * config.horizon
    queries, heads = expert.heads * expert.head_dim, expert.heads + 2 * expert.kv_heads
    splits = key_splits(config, bucket.batch)
    specs: dict[str, Spec] = {
        "x_t": ((actions, config.action_dim), torch.float32),
        "x": ((rows, expert.width), dtype),
        "normed": ((rows, expert.width), dtype),
        "qkv": ((rows, heads * expert.head_dim), dtype),
        "q": ((rows, queries), dtype),
        "attended": ((rows, queries), dtype),
        "update": ((rows, expert.width), dtype),
        "gate_up": ((rows, 2 * expert.mlp_dim), dtype),
        "hidden": ((rows, expert.mlp_dim), dtype),
        "mixed": ((actions, expert.width), torch.float32),
        "projected": ((actions, expert.width), torch.float32),
        "state_token": ((bucket.batch, expert.width), torch.float32),
        "ends": ((bucket.batch,), torch.int32),
        "partial": ((splits, rows * expert.heads, expert.head_dim), torch.float32),
        "partial_lse": ((splits, rows * expert.heads), torch.float32),
        "parts": ((PRODUCT_PARTS, rows if rows <= MOST_FUSED_ROWS else 0, expert.width), torch.float32),
    }
    return specs | _fp8_specs(specs, fp8)


def aligned(count: int) -> int:
    """Bytes, rounded up to where the next tensor may start."""
    return -(-count // ALIGNMENT) * ALIGNMENT


class Blob:
    """Bytes in one piece, so that one copy carries everything that is laid out in them."""

    def __init__(self, size: int, device: torch.device, *, pinned: bool = False) -> None:
        self.bytes = torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pinned)

    def lay(self, specs: dict[str, Spec]) -> tuple[dict[str, Tensor], int]:
        """One tensor after the other; also how many bytes they take."""
        tensors, offset = {}, 0
        for name, (shape, dtype) in specs.items():
            count = math.prod(shape) * dtype.itemsize
            tensors[name] = self.bytes[offset : offset + count].view(dtype).view(shape)
            offset += aligned(count)
        return tensors, offset


def blob_size(specs: dict[str, Spec]) -> int:
    """Bytes that `Blob.lay` takes."""
    return sum(aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in specs.values())
