"""Products of `row_products` on Hopper: a program's whole share of the weights is on its way before its turn comes.

A program asks the copy engine (TMA) for all its weights, then waits for the kernel in front, then asks for its rows,
of which only a few chunks have room at a time.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import aligned, cdiv
from ._dependent import on_hopper, options
from ._fp8 import E4M3
from ._triton import gl, gluon, gluon_descriptor, hopper, nvidia
from .tuning import GemmConfig

BLOCK_M = 64
WARPS = 4
MOST_SHARED = 227 << 10


@gluon.jit
def _after_the_last(DEPENDENT: gl.constexpr):
    """See `_dependent.after_the_last`."""
    if DEPENDENT:
        nvidia.gdc_wait()
        nvidia.gdc_launch_dependents()


@gluon.jit
def _ask_for_weights(w, first, second, depth, bars, w_shared, TWO: gl.constexpr, STEPS: gl.constexpr):
    """A barrier for each chunk of K, which waits for the chunk of the rows too; both blocks of weight rows."""
    block_n: gl.constexpr = w.block_shape[0]
    block_k: gl.constexpr = w.block_shape[1]
    blocks: gl.constexpr = 2 if TWO else 1
    for i in gl.static_range(STEPS):
        hopper.mbarrier.init(bars.index(i), count=1)
    for i in gl.static_range(STEPS):
        bar = bars.index(i)
        hopper.mbarrier.expect(bar, (blocks * block_n + 64) * block_k * (w.dtype.primitive_bitwidth // 8))
        hopper.tma.async_copy_global_to_shared(w, [first, depth + i * block_k], bar, w_shared.index(blocks * i))
        if TWO:
            place = w_shared.index(blocks * i + 1)
            hopper.tma.async_copy_global_to_shared(w, [second, depth + i * block_k], bar, place)


@gluon.jit
def _ask_for_rows(x, row, depth, bars, x_shared):
    """As many chunks of K as have a place."""
    block_k: gl.constexpr = x.block_shape[1]
    ring: gl.constexpr = x_shared.shape[0]
    for i in gl.static_range(ring):
        hopper.tma.async_copy_global_to_shared(x, [row, depth + i * block_k], bars.index(i), x_shared.index(i))


@gluon.jit
def _multiply(x, row, depth, bars, x_shared, w_shared, a, b, TWO: gl.constexpr, STEPS: gl.constexpr):
    """The rows from `row` on times the weights, all of which were asked for; asks for the chunks that had no place."""
    block_k: gl.constexpr = x.block_shape[1]
    ring: gl.constexpr = x_shared.shape[0]
    blocks: gl.constexpr = 2 if TWO else 1
    for i in gl.static_range(STEPS):
        hopper.mbarrier.wait(bars.index(i), 0)
        rows = x_shared.index(i % ring)
        a = hopper.warpgroup_mma(rows, w_shared.index(blocks * i).permute((1, 0)), a, is_async=True)
        if TWO:
            b = hopper.warpgroup_mma(rows, w_shared.index(blocks * i + 1).permute((1, 0)), b, is_async=True)
        if i >= 1 and i - 1 + ring < STEPS:
            # The chunk before this one has been multiplied: its place is free.
            if TWO:
                a, b = hopper.warpgroup_mma_wait(2, deps=[a, b])
            else:
                a = hopper.warpgroup_mma_wait(1, deps=[a])
            gl.thread_barrier()
            bar = bars.index(i - 1 + ring)
            at = [row, depth + (i - 1 + ring) * block_k]
            hopper.tma.async_copy_global_to_shared(x, at, bar, x_shared.index((i - 1) % ring))
    if TWO:
        a, b = hopper.warpgroup_mma_wait(0, deps=[a, b])
    else:
        a = hopper.warpgroup_mma_wait(0, deps=[a])
    for i in gl.static_range(STEPS):
        hopper.mbarrier.invalidate(bars.index(i))
    return a, b


@gluon.jit
def _rotation(cos, sin, first, row, dims, m, rows_per_sample, turned, HALF: gl.constexpr):
    """Cosines and sines of a tile; 1 and 0 where nothing is turned, as in values."""
    sample = row // rows_per_sample
    place = gl.load(first + sample, mask=row < m, other=0) + row - sample * rows_per_sample
    turning = (row < m)[:, None] & (dims < gl.where(turned, HALF, 0))[None, :]
    angle = place[:, None] * HALF + dims[None, :]
    return gl.load(cos + angle, mask=turning, other=1.0), gl.load(sin + angle, mask=turning, other=0.0)


@gluon.jit
def _store_heads(
    low, high, q_out, keys, values, first, rows, dims, head, m, rows_per_sample, q_stride, k_batch, k_head, k_slot,
    v_batch, v_head, v_slot, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Both halves of a head, to the queries or into the cache."""
    inside = (rows < m)[:, None] & (dims < HALF)[None, :]
    sample = rows // rows_per_sample
    slot = gl.load(first + sample, mask=rows < m, other=0) + rows - sample * rows_per_sample
    sample, slot = sample.to(gl.int64)[:, None], slot.to(gl.int64)[:, None]
    if head < HEADS:
        target = q_out + rows.to(gl.int64)[:, None] * q_stride + head * (2 * HALF) + dims[None, :]
        gl.store(target, low, mask=inside)
        gl.store(target + HALF, high, mask=inside)
    elif head < HEADS + KV_HEADS:
        target = keys + sample * k_batch + (head - HEADS) * k_head + slot * k_slot + dims[None, :]
        gl.store(target, low, mask=inside)
        gl.store(target + HALF, high, mask=inside)
    else:
        target = values + sample * v_batch + (head - HEADS - KV_HEADS) * v_head + slot * v_slot + dims[None, :]
        gl.store(target, low, mask=inside)
        gl.store(target + HALF, high, mask=inside)


@gluon.jit
def _scale_of(scale, columns):
    """By which each column's sums are multiplied."""
    factor = 1.0
    if scale is not None:
        factor = gl.load(scale + columns)[None, :]
    return factor


@gluon.jit
def _geglu(gate, up, inverse, dtype: gl.constexpr):
    """tanh-GELU(gate) * up, to `dtype`; to E4M3 as `_fp8.narrow`."""
    y = gate / (1.0 + gl.exp(-1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate))) * up
    if dtype == gl.float8e4nv:
        y *= inverse
        # Comparisons with NaN are false: it stays.
        y = gl.where(y > 448.0, 448.0, gl.where(y < -448.0, -448.0, y))
    return y.to(dtype)


@gluon.jit
def _row_product(
    x, w, out, scale, cos, sin, first, keys, values, m, rows_per_sample, inverse, out_stride, k_batch, k_head, k_slot,
    v_batch, v_head, v_slot, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HALF: gl.constexpr, STEPS: gl.constexpr,
    RING: gl.constexpr, WARPS: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    # Queries, keys and values have heads, gate and up two halves alone; parts of a product neither.
    QKV: gl.constexpr = HEADS > 0
    TWO: gl.constexpr = HALF > 0
    block_n: gl.constexpr = w.block_shape[0]
    block_k: gl.constexpr = w.block_shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, block_n, 256 // w.dtype.primitive_bitwidth])
    vector: gl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    lanes: gl.constexpr = [32 * vector // block_n, block_n // vector]
    flat: gl.constexpr = gl.BlockedLayout([1, vector], lanes, [WARPS, 1], [1, 0])
    column, row, depth = gl.program_id(0) * block_n, gl.program_id(2) * 64, gl.program_id(1) * (STEPS * block_k)
    first_row = column
    if QKV:
        blocks: gl.constexpr = HALF // block_n
        head, dim = gl.program_id(0) // blocks, gl.program_id(0) % blocks * block_n
        first_row = head * (2 * HALF) + dim
    second_row = first_row + HALF
    w_shared = gl.allocate_shared_memory(w.dtype, [(2 if TWO else 1) * STEPS, block_n, block_k], w.layout)
    x_shared = gl.allocate_shared_memory(w.dtype, [RING, 64, block_k], x.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STEPS, 1], hopper.mbarrier.MBarrierLayout())
    _ask_for_weights(w, first_row, second_row, depth, bars, w_shared, TWO, STEPS)
    scaled = gl.arange(0, block_n, layout=gl.SliceLayout(0, mma))
    first_scale, second_scale = _scale_of(scale, first_row + scaled), _scale_of(scale, second_row + scaled)
    _after_the_last(DEPENDENT)
    _ask_for_rows(x, row, depth, bars, x_shared)
    if QKV:
        tile_rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
        tile_dims = dim + gl.arange(0, block_n, layout=gl.SliceLayout(0, mma))
        turned = head < HEADS + KV_HEADS
        c, s = _rotation(cos, sin, first, tile_rows, tile_dims, m, rows_per_sample, turned, HALF)
    zero = gl.zeros((64, block_n), dtype=gl.float32, layout=mma)
    a, b = _multiply(x, row, depth, bars, x_shared, w_shared, zero, zero, TWO, STEPS)
    a, b = a * first_scale, b * second_scale
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, flat))
    columns = gl.arange(0, block_n, layout=gl.SliceLayout(0, flat))
    if QKV:
        low = gl.convert_layout((a * c - b * s).to(out.dtype.element_ty), flat)
        high = gl.convert_layout((b * c + a * s).to(out.dtype.element_ty), flat)
        _store_heads(
            low, high, out, keys, values, first, rows, dim + columns, head, m, rows_per_sample, out_stride, k_batch,
            k_head, k_slot, v_batch, v_head, v_slot, HEADS, KV_HEADS, HALF,
        )  # fmt: skip
    else:
        place = (gl.program_id(1).to(gl.int64) * m + rows)[:, None] * out_stride + (column + columns)[None, :]
        inside = (rows < m)[:, None] & (columns < block_n)[None, :]
        if TWO:
            a = _geglu(a, b, inverse, out.dtype.element_ty)
        gl.store(out + place, gl.convert_layout(a, flat), mask=inside)


def obstacles(x: Tensor, weight: Tensor, config: GemmConfig, splits: int = 1, half: int = 0) -> list[str]:
    """Why these kernels cannot multiply so; empty if they can.

    `half` of a head, for queries, keys and values, or of the columns, for gate and up.
    """
    found = []
    if not on_hopper(x):
        found.append("they need Triton 3.6 and a Hopper GPU")
    if x.dtype not in (torch.bfloat16, E4M3) or weight.dtype != x.dtype:
        found.append(f"x is {x.dtype}, expected torch.bfloat16 or {E4M3}, as the weight is")
    n, k = weight.shape
    shared = _shared(k // splits, config, 2 if half else 1, x.itemsize)
    if k % (splits * config.block_k) or (half or n) % config.block_n or not 16 <= config.block_n <= 128:
        found.append(f"weight {tuple(weight.shape)} is no multiple of {config} in {splits} parts")
    elif shared > MOST_SHARED:
        found.append(f"{shared} bytes of shared memory for {config}")
    if config.stages < 2 <= k // splits // config.block_k:
        found.append(f"a ring of one chunk has no place for the next: {config}")
    if not aligned(x, weight):
        found.append("x or weight does not stand at multiples of 16 bytes")
    return found


def _shared(depth: int, config: GemmConfig, blocks: int, itemsize: int) -> int:
    """Bytes of weights, of the ring of rows, and of barriers."""
    ring = min(config.stages, depth // config.block_k)
    return (blocks * config.block_n * depth + ring * BLOCK_M * config.block_k) * itemsize + 1024


def launch(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    config: GemmConfig,
    splits: int = 1,
    scale: Tensor | None = None,
    half: int = 0,
    rotation: tuple[Any, ...] = (None, None, None, None, None, 1),
    heads: tuple[int, int] = (0, 0),
    inverse: float = 1.0,
) -> None:
    """The parts of a product; with a `half` GeGLU of gate and up, or, with heads too, queries, keys and values.

    config.stages is the depth of the ring of rows. `scale` multiplies each column's sums, `inverse` GeGLU in E4M3;
    `rotation` is cos, sin, first, keys, values, rows_per_sample; `heads` query heads, key heads. `obstacles` were asked
    for before.
    """
    m, k = x.shape
    steps = k // splits // config.block_k
    columns = len(weight) // 2 if half else len(weight)
    *tables, keys, values, rows_per_sample = rotation
    strides = (0,) * 6 if keys is None else (*keys.stride()[:3], *values.stride()[:3])
    _row_product[(columns // config.block_n, splits, cdiv(m, BLOCK_M))](
        gluon_descriptor(x, [BLOCK_M, config.block_k]),
        gluon_descriptor(weight, [config.block_n, config.block_k]),
        out,
        scale,
        *tables,
        keys,
        values,
        m,
        rows_per_sample,
        inverse,
        out.stride(-2),
        *strides,
        HEADS=heads[0],
        KV_HEADS=heads[1],
        HALF=half,
        STEPS=steps,
        RING=min(config.stages, steps),
        WARPS=WARPS,
        **options(x, WARPS),
    )
