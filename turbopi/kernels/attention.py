"""Attention over a cache of valid keys: no mask, only a length on the device (SPEC 1.6)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import cdiv, matrix, next_power_of_2, precision, same_dtype, samples, vector
from ._fp8 import check_inverse, narrow, store_ref
from ._triton import tl, triton
from .tuning import AttentionConfig, tuned

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Shape:
    """Of one call. Rows of queries are of `batch` samples, heads of `head_dim` beside one another."""

    batch: int
    rows_per_sample: int
    heads: int
    kv_heads: int
    slots: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads


def check_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None, out: Tensor, rows_per_sample: int
) -> Shape:
    """The shape. Raises ValueError where the tensors do not fit each other."""
    if keys.ndim != 4 or keys.shape != values.shape or keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)}: expected two (B, KV, slots, d) of one shape "
            "with a contiguous last dimension"
        )
    batch, kv_heads, slots, head_dim = keys.shape
    rows, width = matrix("q", q)
    matrix("out", out, rows, width)
    same_dtype("q", q, "keys", keys)
    same_dtype("q", q, "values", values)
    if head_dim > 256 or width % (kv_heads * head_dim):
        raise ValueError(
            f"q is {width} wide with {kv_heads} key heads of {head_dim}: expected a multiple of {kv_heads * head_dim}, "
            "head_dim at most 256; use the engine 'eager' for other models"
        )
    if samples("q", rows, rows_per_sample) != batch:
        raise ValueError(f"q has {rows} rows of {rows_per_sample} a sample, expected {batch} samples as in keys")
    vector("lengths", lengths, batch, torch.int32)
    return Shape(batch, rows_per_sample, width // head_dim, kv_heads, slots, head_dim)


def check_partial(partial: Tensor, partial_lse: Tensor, shape: Shape) -> int:
    """The number of splits that the buffers hold."""
    rows = shape.batch * shape.rows_per_sample * shape.heads
    expected = (partial.shape[0], rows, shape.head_dim)
    for name, t, size in (("partial", partial, expected), ("partial_lse", partial_lse, expected[:2])):
        if t.shape != size or t.dtype != torch.float32 or not t.is_contiguous():
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)}, expected contiguous float32 {size}: (splits, B*N*H"
                + (", d)" if t is partial else ")")
            )
    return partial.shape[0]


def attention_ref(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    rows_per_sample: int,
    extra: int = 0,
    state_token: bool = False,
    scale: float = 1.0,
    config: AttentionConfig | None = None,
    inverse: float = 1.0,
) -> None:
    """Twin of `attention`; `config` changes nothing here."""
    shape = check_attention(q, keys, values, lengths, out, rows_per_sample)
    queries = q.unflatten(0, (shape.batch, rows_per_sample)).unflatten(-1, (shape.heads, shape.head_dim))
    k, v = (t.float().repeat_interleave(shape.group, dim=1) for t in (keys, values))
    logits = queries.float().transpose(1, 2) @ k.transpose(2, 3) * scale
    hidden = torch.zeros(shape.batch, rows_per_sample, shape.slots, dtype=torch.bool, device=q.device)
    if lengths is not None:
        limit = (lengths[:, None] + extra).repeat(1, rows_per_sample)
        if state_token:
            limit[:, 0] = lengths + 1
        hidden = torch.arange(shape.slots, device=q.device) >= limit[:, :, None]
    hidden = hidden[:, None]
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)
    # What stands in an unused slot may be NaN, and 0 * NaN is NaN.
    unused = hidden.all(dim=2).unsqueeze(-1)
    store_ref((weights @ v.masked_fill(unused, 0.0)).transpose(1, 2).flatten(2).flatten(0, 1), out, inverse)


def attention_split_ref(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    rows_per_sample: int,
    partial: Tensor,
    partial_lse: Tensor,
    extra: int = 0,
    state_token: bool = False,
    scale: float = 1.0,
    config: AttentionConfig | None = None,
    inverse: float = 1.0,
) -> None:
    """Twin of `attention_split`; the partial buffers are only checked."""
    check_partial(partial, partial_lse, check_attention(q, keys, values, lengths, out, rows_per_sample))
    attention_ref(q, keys, values, lengths, out, rows_per_sample, extra, state_token, scale, inverse=inverse)


@triton.jit
def over_keys(
    a,
    k_start,
    v_start,
    k_slot,
    v_slot,
    begin,
    end,
    limit,
    scale,
    inside_dims,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over slots [begin, end): the sum of values, and of each row the maximum and the mass (base 2)."""
    best = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DIM), dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        # Unused slots may hold NaN, so they are not read.
        used = (slot < end)[:, None] & inside_dims[None, :]
        k = tl.load(k_start + slot[:, None] * k_slot, mask=used, other=0.0)
        logits = tl.dot(a, tl.trans(k), input_precision=PRECISION) * scale
        logits = tl.where(slot[None, :] < tl.minimum(limit, end)[:, None], logits, float("-inf"))
        higher = tl.maximum(best, tl.max(logits, axis=1))
        # A row that has seen no key yet stays at zero mass instead of exp2(-inf + inf).
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(logits - base[:, None])
        decay = tl.exp2(best - base)
        mass = mass * decay + tl.sum(p, axis=1)
        v = tl.load(v_start + slot[:, None] * v_slot, mask=used, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        best = higher
    return acc, best, mass


@triton.jit
def _attention(
    q, keys, values, lengths, out, lse, scale, queries, slots, extra, q_row, k_batch, k_head, k_slot, v_batch, v_head,
    v_slot, out_row, inverse, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, STATE_TOKEN: tl.constexpr, PARTIAL: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(1) % KV_HEADS
    split = tl.program_id(2)
    # A row is a query and one of the heads that share this key head.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // GROUP
    head = kv_head * GROUP + row % GROUP
    dims = tl.arange(0, BLOCK_DIM)
    inside = (query < queries)[:, None] & (dims < HEAD_DIM)[None, :]
    token = sample * queries + query
    a = tl.load(q + token[:, None] * q_row + head[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
    if HAS_LENGTHS:
        length = tl.load(lengths + sample)
        total = tl.minimum(length + extra, slots)
    else:
        length = slots
        total = slots
    limit = tl.zeros((BLOCK_M,), dtype=tl.int32) + total
    if STATE_TOKEN:
        limit = tl.where(query == 0, tl.minimum(length + 1, total), limit)
    part = tl.cdiv(tl.cdiv(total, BLOCK_N), SPLITS) * BLOCK_N
    begin = split * part
    end = tl.minimum(begin + part, total)
    # Said aloud, because a stride such as SigLIP's 72 is no multiple of 16: without it loads are narrow.
    k_start = keys + sample * k_batch + tl.multiple_of(kv_head * k_head, ALIGNED) + dims[None, :]
    v_start = values + sample * v_batch + tl.multiple_of(kv_head * v_head, ALIGNED) + dims[None, :]
    acc, best, mass = over_keys(
        a, k_start, v_start, k_slot, v_slot, begin, end, limit, scale, dims < HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_DIM,
        PRECISION,
    )  # fmt: skip
    acc = acc / tl.where(mass > 0.0, mass, 1.0)[:, None]
    if PARTIAL:
        line = (split * tl.num_programs(1) // KV_HEADS * queries + token) * (KV_HEADS * GROUP) + head
        tl.store(out + line[:, None] * HEAD_DIM + dims[None, :], acc, mask=inside)
        tl.store(lse + line, best + tl.log2(mass), mask=query < queries)
    else:
        target = out + token[:, None] * out_row + head[:, None] * HEAD_DIM + dims[None, :]
        tl.store(target, narrow(acc, inverse, out.dtype.element_ty), mask=inside)


@triton.jit
def _combine(
    partial,
    lse,
    out,
    lines,
    out_row,
    inverse,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    dims = tl.arange(0, BLOCK_DIM)
    logs = tl.load(lse + split * lines + line, mask=split < SPLITS, other=float("-inf"))
    best = tl.max(logs, axis=0)
    weights = tl.exp2(logs - tl.where(best == float("-inf"), 0.0, best))
    mass = tl.sum(weights, axis=0)
    source = partial + (split[:, None] * lines + line) * HEAD_DIM + dims[None, :]
    parts = tl.load(source, mask=(split < SPLITS)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    acc = tl.sum(parts * weights[:, None], axis=0) / tl.where(mass > 0.0, mass, 1.0)
    target = out + line // HEADS * out_row + line % HEADS * HEAD_DIM + dims
    tl.store(target, narrow(acc, inverse, out.dtype.element_ty), mask=dims < HEAD_DIM)


def default_config(rows: int, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """Tiles that fit every supported GPU's shared memory; `rows` are queries times the heads that share a key head."""
    wide = head_dim > 128
    if dtype.itemsize > 2:
        return AttentionConfig(block_m=32 if rows > 16 else 16, block_n=16 if wide else 32, stages=1)
    block_m = min(64, max(16, next_power_of_2(rows)))
    return AttentionConfig(block_m, 32 if wide else 64, warps=4, stages=2)


def _launch(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    target: Tensor,
    lse: Tensor | None,
    shape: Shape,
    extra: int,
    state_token: bool,
    scale: float,
    config: AttentionConfig,
    inverse: float,
) -> None:
    splits = 1 if lse is None else lse.shape[0]
    grid = (cdiv(shape.rows_per_sample * shape.group, config.block_m), shape.batch * shape.kv_heads, splits)
    _attention[grid](
        q,
        keys,
        values,
        lengths,
        target,
        lse,
        scale * LOG2_E,
        shape.rows_per_sample,
        shape.slots,
        extra,
        q.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        target.stride(0),
        inverse,
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=max(16, next_power_of_2(shape.head_dim)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SPLITS=splits,
        HAS_LENGTHS=lengths is not None,
        STATE_TOKEN=state_token and lengths is not None,
        PARTIAL=lse is not None,
        ALIGNED=math.gcd(keys.stride(1), values.stride(1), 16),
        PRECISION=precision(q),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _config(op: str, q: Tensor, shape: Shape, splits: int) -> AttentionConfig:
    sizes = (shape.rows_per_sample * shape.group, shape.head_dim, shape.kv_heads, splits)
    found = tuned(op, AttentionConfig, q, sizes)
    return found or default_config(shape.rows_per_sample * shape.group, shape.head_dim, q.dtype)


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    rows_per_sample: int,
    extra: int = 0,
    state_token: bool = False,
    scale: float = 1.0,
    config: AttentionConfig | None = None,
    inverse: float = 1.0,
) -> None:
    """q (B*N, H*d) over keys and values (B, KV, slots, d) -> out (B*N, H*d), softmax in float32.

    Every query of sample b sees the keys of slots [0, lengths[b] + extra); with `state_token` the first query of a
    sample sees only [0, lengths[b] + 1). `lengths` (B,) int32 is on the device; None: all slots, for every query. What
    stands in other slots is never read. A query with no key gives zeros. Rows of q and out, and batch, head and slot
    of keys and values, may stand any distance apart: views of a merged QKV product need no copy. `scale` multiplies
    the logits. `config` None takes the tuned one for this GPU and shape, else a default. `out` in E4M3 holds the result
    times `inverse`, saturated. Raises ValueError where shapes do not fit.
    """
    shape = check_attention(q, keys, values, lengths, out, rows_per_sample)
    check_inverse(out, inverse)
    config = config or _config("attention", q, shape, 1)
    _launch(q, keys, values, lengths, out, None, shape, extra, state_token, scale, config, inverse)


def attention_split(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    rows_per_sample: int,
    partial: Tensor,
    partial_lse: Tensor,
    extra: int = 0,
    state_token: bool = False,
    scale: float = 1.0,
    config: AttentionConfig | None = None,
    inverse: float = 1.0,
) -> None:
    """`attention`, for few queries and many keys: the keys in parts on as many programs, then one kernel to combine.

    partial (splits, B*N*H, d) and partial_lse (splits, B*N*H), both float32, are scratch; their first size is the
    number of parts. The order of the sum is fixed. Raises ValueError where shapes do not fit.
    """
    shape = check_attention(q, keys, values, lengths, out, rows_per_sample)
    check_inverse(out, inverse)
    splits = check_partial(partial, partial_lse, shape)
    config = config or _config("attention_split", q, shape, splits)
    _launch(q, keys, values, lengths, partial, partial_lse, shape, extra, state_token, scale, config, 1.0)
    _combine[(partial.shape[1],)](
        partial,
        partial_lse,
        out,
        partial.shape[1],
        out.stride(0),
        inverse,
        HEADS=shape.heads,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=next_power_of_2(shape.head_dim),
        SPLITS=splits,
        BLOCK_SPLITS=next_power_of_2(splits),
        num_warps=4,
    )
