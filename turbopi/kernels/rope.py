"""Rotary positions on queries and keys, and keys and values into the cache, in one pass (SPEC 1.3)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from ._common import cdiv, dense, matrix, next_power_of_2, samples, vector
from ._triton import tl, triton


def check_rotation(
    rows: int,
    width: int,
    cos: Tensor,
    sin: Tensor,
    first: Tensor,
    q_out: Tensor,
    keys: Tensor,
    values: Tensor,
    rows_per_sample: int,
) -> tuple[int, int, int]:
    """Samples, query heads and head_dim, for a (rows, width) product of queries, keys and values."""
    if keys.ndim != 4 or keys.shape != values.shape or keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)}: expected two (B, KV, slots, d) of one shape "
            "with a contiguous last dimension"
        )
    batch, kv_heads, slots, head_dim = keys.shape
    _, queries = matrix("q_out", q_out, rows)
    if head_dim % 2 or queries % head_dim:
        raise ValueError(f"q_out is {queries} wide, expected a multiple of the even head_dim {head_dim}")
    if width != queries + 2 * kv_heads * head_dim:
        raise ValueError(f"queries, keys and values are {width} wide, expected {queries + 2 * kv_heads * head_dim}")
    if samples("qkv", rows, rows_per_sample) != batch or rows_per_sample > slots:
        raise ValueError(
            f"{rows} rows of {rows_per_sample} a sample do not fit keys {tuple(keys.shape)}: expected B samples with "
            "at most `slots` rows each"
        )
    positions, _ = dense("cos", cos, width=head_dim // 2)
    dense("sin", sin, positions, head_dim // 2)
    vector("first", first, batch, torch.int32)
    return batch, queries // head_dim, head_dim


def rotate_and_store_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    first: Tensor,
    q_out: Tensor,
    keys: Tensor,
    values: Tensor,
    rows_per_sample: int,
    scale: Tensor | None = None,
) -> None:
    """Twin of `rotate_and_store`."""
    batch, heads, head_dim = check_rotation(*matrix("qkv", qkv), cos, sin, first, q_out, keys, values, rows_per_sample)
    vector("scale", scale, qkv.shape[1])
    kv_heads = keys.shape[1]
    scaled = qkv if scale is None else qkv.float() * scale
    heads_of_row = scaled.view(batch, rows_per_sample, heads + 2 * kv_heads, head_dim)
    place = first.long()[:, None] + torch.arange(rows_per_sample, device=qkv.device)
    c, s = cos[place][:, :, None], sin[place][:, :, None]
    a, b = heads_of_row[:, :, : heads + kv_heads].float().chunk(2, dim=-1)
    rotated = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
    q_out.copy_(rotated[:, :, :heads].flatten(2).flatten(0, 1))
    sample = torch.arange(batch, device=qkv.device)[:, None]
    keys[sample, :, place] = rotated[:, :, heads:].to(keys.dtype)
    values[sample, :, place] = heads_of_row[:, :, heads + kv_heads :].to(values.dtype)


@triton.jit
def _rotate_and_store(
    qkv,
    scale,
    cos,
    sin,
    first,
    q_out,
    keys,
    values,
    rows,
    rows_per_sample,
    qkv_stride,
    q_stride,
    k_batch,
    k_head,
    k_slot,
    v_batch,
    v_head,
    v_slot,
    SCALED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (row < rows)[:, None] & (dims < HALF)
    sample = row // rows_per_sample
    place = tl.load(first + sample, mask=row < rows, other=0) + row - sample * rows_per_sample
    row, sample = row.to(tl.int64)[:, None], sample.to(tl.int64)[:, None]
    source = qkv + row * qkv_stride + head * (2 * HALF) + dims
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        columns = scale + head * (2 * HALF) + dims
        a *= tl.load(columns, mask=dims < HALF, other=0.0)
        b *= tl.load(columns + HALF, mask=dims < HALF, other=0.0)
    # A value is not rotated: cos 1, sin 0.
    turning = inside & (dims < tl.where(head < HEADS + KV_HEADS, HALF, 0))
    angle = place[:, None] * HALF + dims
    c = tl.load(cos + angle, mask=turning, other=1.0)
    s = tl.load(sin + angle, mask=turning, other=0.0)
    low, high = a * c - b * s, b * c + a * s
    slot = place.to(tl.int64)[:, None]
    if head < HEADS:
        target = q_out + row * q_stride + head * (2 * HALF) + dims
        tl.store(target, low.to(q_out.dtype.element_ty), mask=inside)
        tl.store(target + HALF, high.to(q_out.dtype.element_ty), mask=inside)
    elif head < HEADS + KV_HEADS:
        target = keys + sample * k_batch + (head - HEADS) * k_head + slot * k_slot + dims
        tl.store(target, low.to(keys.dtype.element_ty), mask=inside)
        tl.store(target + HALF, high.to(keys.dtype.element_ty), mask=inside)
    else:
        target = values + sample * v_batch + (head - HEADS - KV_HEADS) * v_head + slot * v_slot + dims
        tl.store(target, low.to(values.dtype.element_ty), mask=inside)
        tl.store(target + HALF, high.to(values.dtype.element_ty), mask=inside)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    first: Tensor,
    q_out: Tensor,
    keys: Tensor,
    values: Tensor,
    rows_per_sample: int,
    scale: Tensor | None = None,
) -> None:
    """Rotate queries and keys, and put keys and values in their slots of the cache.

    qkv (B*N, (H+2KV)*d) with rows [queries, keys, values] -> q_out (B*N, H*d), keys and values (B, KV, slots, d); each
    column of qkv first times `scale` ((H+2KV)*d,) float32 where given.
    Row j of sample b has position and slot first[b] + j; `first` is (B,) int32 on the device. cos and sin are
    (positions, d/2) float32, pairs are (i, i + d/2), the rotation is in float32 with one rounding. The caller makes
    sure that first[b] + N fits the slots and the table. Raises ValueError where shapes do not fit.
    """
    _, heads, head_dim = check_rotation(*matrix("qkv", qkv), cos, sin, first, q_out, keys, values, rows_per_sample)
    vector("scale", scale, qkv.shape[1])
    rows, kv_heads, half = qkv.shape[0], keys.shape[1], head_dim // 2
    block_rows = 8 if rows >= 256 else 1
    grid = (cdiv(rows, block_rows), heads + 2 * kv_heads)
    _rotate_and_store[grid](
        qkv,
        scale,
        cos,
        sin,
        first,
        q_out,
        keys,
        values,
        rows,
        rows_per_sample,
        qkv.stride(0),
        q_out.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        SCALED=scale is not None,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        BLOCK_HALF=next_power_of_2(half),
        BLOCK_ROWS=block_rows,
        num_warps=4 if block_rows > 1 else 1,
    )
