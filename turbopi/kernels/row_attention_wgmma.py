"""The parts of `row_attention` on Hopper: keys and values of the prefix are on their way before the queries are there.

A program holds all keys of its part at once, so there is one softmax and no loop. Keys are the rows of the products
(queries, of which there are few, the columns): logits^T = K q^T, and the part^T = V^T p^T.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from ._common import cdiv, next_power_of_2
from ._dependent import on_hopper, options
from ._triton import ampere, gl, gluon, hopper
from .row_products_tma import MOST_SHARED, _after_the_last

SUB = 32
"""Keys that are fetched together: before the wait if all of them are the prefix's."""
BLOCK_M = 32


@gluon.jit
def _ask_for_slots(
    source, shared, begin, end, boundary, slot_stride, LAYOUT: gl.constexpr, SUB: gl.constexpr, BEHIND: gl.constexpr
):
    """Copy slots [begin, end), in runs of SUB: those that end before `boundary`, or, BEHIND, the others.

    Unused slots may hold NaN: they are not read, and are zeros in shared memory.
    """
    dims = gl.arange(0, shared.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    within = gl.arange(0, SUB, layout=gl.SliceLayout(1, LAYOUT))
    for i in gl.static_range(shared.shape[0] // SUB):
        first = begin + i * SUB
        if (first + SUB > boundary) == BEHIND:
            slot = first + within
            at = source + slot.to(gl.int64)[:, None] * slot_stride + dims[None, :]
            place = shared.slice(i * SUB, SUB)
            ampere.async_copy.async_copy_global_to_shared(place, at, mask=(slot < end)[:, None])


@gluon.jit
def _softmax(logits, begin, limit, LAYOUT: gl.constexpr):
    """Of every column over the slots before its limit, base 2: weights, maximum and mass."""
    slots = begin + gl.arange(0, logits.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    logits = gl.where(slots[:, None] < limit[None, :], logits, float("-inf"))
    best = gl.max(logits, axis=0)
    # A column without keys has no mass, not exp2(-inf + inf).
    weights = gl.exp2(logits - gl.where(best == float("-inf"), 0.0, best)[None, :])
    return weights, best, gl.sum(weights, axis=0)


@gluon.jit
def _all_copied():
    """Wait for the copies of all threads, and let the tensor cores see them."""
    ampere.async_copy.commit_group()
    ampere.async_copy.wait_group(0)
    gl.thread_barrier()
    hopper.fence_async_shared()


@gluon.jit
def _line(lines, row, KV_HEADS: gl.constexpr, GROUP: gl.constexpr):
    """Where a row stands among those of all heads; `lines` is where its sample and key head begin."""
    return lines + row // GROUP * (KV_HEADS * GROUP) + row % GROUP


@gluon.jit
def _store_part(acc, partial, lines, queries, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """acc (dim, rows) to the lines of `partial`."""
    acc = gl.convert_layout(acc, LAYOUT)
    rows: gl.constexpr = acc.shape[1]
    row = gl.program_id(0) * rows + gl.arange(0, rows, layout=gl.SliceLayout(0, LAYOUT))
    dims = gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    inside = (row // GROUP < queries)[None, :] & (dims >= 0)[:, None]
    at = partial + _line(lines, row, KV_HEADS, GROUP)[None, :] * acc.shape[0] + dims[:, None]
    gl.store(at, acc, mask=inside)


@gluon.jit
def _row_attention_wgmma(
    q, keys, values, lengths, partial, lse, scale, queries, slots, extra, q_row, k_batch, k_head, k_slot, v_batch,
    v_head, v_slot, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, KEYS: gl.constexpr, SUB: gl.constexpr, STATE_TOKEN: gl.constexpr, WARPS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [WARPS, 1], [1, 0])
    tall: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [DIM // 64, WARPS * 64 // DIM], [0, 1])
    cache: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, DIM], gl.bfloat16)
    k_shared = gl.allocate_shared_memory(gl.bfloat16, [KEYS, DIM], cache)
    v_shared = gl.allocate_shared_memory(gl.bfloat16, [KEYS, DIM], cache)
    few: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, DIM], gl.bfloat16)
    q_shared = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, DIM], few)
    many: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_M], gl.bfloat16)
    p_shared = gl.allocate_shared_memory(gl.bfloat16, [KEYS, BLOCK_M], many)
    sample, kv_head = (gl.program_id(1) // KV_HEADS).to(gl.int64), gl.program_id(1) % KV_HEADS
    split, splits = gl.program_id(2), gl.num_programs(2)
    length = gl.load(lengths + sample)
    total = gl.minimum(length + extra, slots)
    part = (total + splits * SUB - 1) // (splits * SUB) * SUB
    begin = split * part
    end = gl.minimum(begin + part, total)
    k_start, v_start = keys + sample * k_batch + kv_head * k_head, values + sample * v_batch + kv_head * v_head
    _ask_for_slots(k_start, k_shared, begin, end, length, k_slot, wide, SUB, False)
    _ask_for_slots(v_start, v_shared, begin, end, length, v_slot, wide, SUB, False)
    _after_the_last(DEPENDENT)
    # A row is a query and one of the heads that share this key head.
    row = gl.program_id(0) * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, wide))
    token, head = sample * queries + row // GROUP, kv_head * GROUP + row % GROUP
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))
    at = q + token[:, None] * q_row + (head * DIM)[:, None] + dims[None, :]
    ampere.async_copy.async_copy_global_to_shared(q_shared, at, mask=(row // GROUP < queries)[:, None])
    _ask_for_slots(k_start, k_shared, begin, end, length, k_slot, wide, SUB, True)
    _ask_for_slots(v_start, v_shared, begin, end, length, v_slot, wide, SUB, True)
    _all_copied()
    logits = gl.zeros((KEYS, BLOCK_M), dtype=gl.float32, layout=mma)
    logits = hopper.warpgroup_mma(k_shared, q_shared.permute((1, 0)), logits, is_async=True)
    logits = hopper.warpgroup_mma_wait(0, deps=[logits]) * scale
    column = gl.program_id(0) * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, mma))
    limit = end + column * 0
    if STATE_TOKEN:
        limit = gl.where(column // GROUP == 0, gl.minimum(length + 1, end), limit)
    weights, best, mass = _softmax(logits, begin, limit, mma)
    p_shared.store(weights.to(gl.bfloat16))
    gl.thread_barrier()
    hopper.fence_async_shared()
    acc = gl.zeros((DIM, BLOCK_M), dtype=gl.float32, layout=mma)
    acc = hopper.warpgroup_mma(v_shared.permute((1, 0)), p_shared, acc, is_async=True)
    acc = hopper.warpgroup_mma_wait(0, deps=[acc])
    lines = (split * (gl.num_programs(1) // KV_HEADS) + sample) * queries * (KV_HEADS * GROUP) + kv_head * GROUP
    _store_part(acc / gl.where(mass > 0.0, mass, 1.0)[None, :], partial, lines, queries, KV_HEADS, GROUP, tall)
    gl.store(lse + _line(lines, column, KV_HEADS, GROUP), best + gl.log2(mass), mask=column // GROUP < queries)


def _keys(slots: int, splits: int) -> int:
    """Slots of a part, at most: a multiple of what the tensor cores take."""
    return max(64, next_power_of_2(cdiv(slots, splits)))


def runs(q: Tensor, keys: Tensor, splits: int) -> bool:
    """Whether this kernel can: Hopper, bfloat16, and a part's keys and values fit into shared memory."""
    _, _, slots, dim = keys.shape
    count = _keys(slots, splits)
    shared = 2 * (2 * count * dim + BLOCK_M * (dim + count)) + 1024
    return on_hopper(q) and q.dtype == torch.bfloat16 and dim in (64, 128, 256) and shared <= MOST_SHARED


def launch(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    partial: Tensor,
    partial_lse: Tensor,
    rows_per_sample: int,
    extra: int,
    state_token: bool,
    scale: float,
) -> None:
    """The parts of `row_attention`, where `runs`; shapes were checked before, logits are times `scale` to base 2."""
    batch, kv_heads, slots, dim = keys.shape
    group = q.shape[1] // dim // kv_heads
    splits = len(partial)
    grid = (cdiv(rows_per_sample * group, BLOCK_M), batch * kv_heads, splits)
    count = _keys(slots, splits)
    # A group of four warps takes 64 rows of a product: of the keys, then of the head's dimensions.
    warps = 4 if min(count, dim) < 128 else 8
    _row_attention_wgmma[grid](
        q,
        keys,
        values,
        lengths,
        partial,
        partial_lse,
        scale,
        rows_per_sample,
        slots,
        extra,
        q.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        BLOCK_M=BLOCK_M,
        KEYS=count,
        SUB=SUB,
        STATE_TOKEN=state_token,
        WARPS=warps,
        **options(q, warps),
    )
