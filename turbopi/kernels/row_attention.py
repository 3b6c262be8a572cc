"""Attention of few queries over many keys, in parts, each launch ready before its predecessor has ended."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from . import row_attention_cluster as cluster
from . import row_attention_wgmma as wgmma
from ._common import cdiv, next_power_of_2, precision
from ._dependent import after_the_last, fetch, fetching, options
from ._fp8 import check_inverse, narrow
from ._triton import tl, triton
from .attention import LOG2_E, Shape, attention_ref, check_attention, check_partial, over_keys
from .tuning import AttentionConfig, tuned

WARPS = 4
"""Of a program that combines the parts of a row."""


def row_attention_ref(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    out: Tensor,
    rows_per_sample: int,
    partial: Tensor,
    partial_lse: Tensor,
    extra: int = 0,
    state_token: bool = False,
    config: AttentionConfig | None = None,
    ahead: Tensor | None = None,
    inverse: float = 1.0,
) -> None:
    """Twin of `row_attention`."""
    check_partial(partial, partial_lse, check_attention(q, keys, values, lengths, out, rows_per_sample))
    attention_ref(q, keys, values, lengths, out, rows_per_sample, extra, state_token, inverse=inverse)


@triton.jit
def _row_attention(
    q, keys, values, lengths, partial, lse, scale, queries, slots, extra, q_row, k_batch, k_head, k_slot, v_batch,
    v_head, v_slot, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STATE_TOKEN: tl.constexpr, PRECISION: tl.constexpr, DEPENDENT: tl.constexpr,
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
    after_the_last(DEPENDENT)
    a = tl.load(q + token[:, None] * q_row + head[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
    length = tl.load(lengths + sample)
    total = tl.minimum(length + extra, slots)
    limit = tl.zeros((BLOCK_M,), dtype=tl.int32) + total
    if STATE_TOKEN:
        limit = tl.where(query == 0, tl.minimum(length + 1, total), limit)
    part = tl.cdiv(tl.cdiv(total, BLOCK_N), tl.num_programs(2)) * BLOCK_N
    begin = split * part
    acc, best, mass = over_keys(
        a, keys + sample * k_batch + kv_head * k_head + dims[None, :],
        values + sample * v_batch + kv_head * v_head + dims[None, :], k_slot, v_slot, begin,
        tl.minimum(begin + part, total), limit, scale, dims < HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_DIM, PRECISION,
    )  # fmt: skip
    acc = acc / tl.where(mass > 0.0, mass, 1.0)[:, None]
    line = (split * tl.num_programs(1) // KV_HEADS * queries + token) * (KV_HEADS * GROUP) + head
    tl.store(partial + line[:, None] * HEAD_DIM + dims[None, :], acc, mask=inside)
    tl.store(lse + line, best + tl.log2(mass), mask=query < queries)


@triton.jit
def _row_combine(
    partial, lse, out, lines, out_row, inverse, ahead, ahead_size, ahead_piece, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    LANES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    fetch(ahead, ahead_size, ahead_piece, LANES, DEPENDENT)
    line = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    dims = tl.arange(0, BLOCK_DIM)
    source = partial + (split[:, None] * lines + line) * HEAD_DIM + dims[None, :]
    after_the_last(DEPENDENT)
    logs = tl.load(lse + split * lines + line, mask=split < SPLITS, other=float("-inf"))
    parts = tl.load(source, mask=(split < SPLITS)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    best = tl.max(logs, axis=0)
    weights = tl.exp2(logs - tl.where(best == float("-inf"), 0.0, best))
    mass = tl.sum(weights, axis=0)
    acc = tl.sum(parts * weights[:, None], axis=0) / tl.where(mass > 0.0, mass, 1.0)
    target = out + line // HEADS * out_row + line % HEADS * HEAD_DIM + dims
    tl.store(target, narrow(acc, inverse, out.dtype.element_ty), mask=dims < HEAD_DIM)


def default_config(rows: int, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """Tiles for shapes that were never tuned; `rows` are queries times the heads that share a key head."""
    block_m = 16 if rows <= 16 else 32
    if dtype.itemsize > 2:
        return AttentionConfig(block_m, 16, stages=1)
    return AttentionConfig(block_m, 32 if head_dim > 128 else 64)


def _launch(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    partial: Tensor,
    partial_lse: Tensor,
    shape: Shape,
    extra: int,
    state_token: bool,
    config: AttentionConfig | None,
) -> None:
    rows, splits = shape.rows_per_sample * shape.group, len(partial)
    if config is None:
        config = tuned("row_attention", AttentionConfig, q, (rows, shape.head_dim, shape.kv_heads, splits))
        config = config or default_config(rows, shape.head_dim, q.dtype)
    grid = (cdiv(rows, config.block_m), shape.batch * shape.kv_heads, splits)
    _row_attention[grid](
        q,
        keys,
        values,
        lengths,
        partial,
        partial_lse,
        LOG2_E,
        shape.rows_per_sample,
        shape.slots,
        extra,
        q.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        KV_HEADS=shape.kv_heads,
        GROUP=shape.group,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=max(16, next_power_of_2(shape.head_dim)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STATE_TOKEN=state_token,
        PRECISION=precision(q),
        num_stages=config.stages,
        **options(q, config.warps),
    )


def row_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    out: Tensor,
    rows_per_sample: int,
    partial: Tensor,
    partial_lse: Tensor,
    extra: int = 0,
    state_token: bool = False,
    config: AttentionConfig | None = None,
    ahead: Tensor | None = None,
    inverse: float = 1.0,
) -> None:
    """`attention_split`, its logits not scaled: one launch, or two. Behind all others `ahead` is brought into L2.

    `config` None takes one of the kernels for Hopper where it runs, else tiles for this GPU and shape. `out` in E4M3
    holds the result times `inverse`, saturated.

    Raises ValueError where shapes do not fit.
    """
    shape = check_attention(q, keys, values, lengths, out, rows_per_sample)
    splits = check_partial(partial, partial_lse, shape)
    check_inverse(out, inverse)
    if config is None and not cluster.obstacles(q, keys, values, out):
        cluster.launch(q, keys, values, lengths, out, shape, extra, state_token, ahead, inverse)
        return
    if config is None and wgmma.runs(q, keys, splits):
        parts = (partial, partial_lse, rows_per_sample, extra, state_token, LOG2_E)
        wgmma.launch(q, keys, values, lengths, *parts)
    else:
        _launch(q, keys, values, lengths, partial, partial_lse, shape, extra, state_token, config)
    lines = partial.shape[1]
    _row_combine[(lines,)](
        partial,
        partial_lse,
        out,
        lines,
        out.stride(0),
        inverse,
        HEADS=shape.heads,
        HEAD_DIM=shape.head_dim,
        BLOCK_DIM=next_power_of_2(shape.head_dim),
        SPLITS=splits,
        BLOCK_SPLITS=next_power_of_2(splits),
        **fetching(ahead, lines, WARPS),
        **options(q, WARPS),
    )
