"""Parts that the product kernels share: the order of tiles, the epilogue, and the sum of a split product."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from ._fp8 import narrow
from ._triton import tl, triton
from .geglu import gelu_tanh


@triton.jit
def tile_place(tile, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of a tile: GROUP_M row tiles at a time, column after column, so that weights stay in L2."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    within = tile - group * GROUP_M * tiles_n
    return first + within % height, within // height


@triton.jit
def epilogue(
    acc,
    rows,
    columns,
    inside,
    n,
    scale,
    bias,
    residual,
    gate,
    residual_stride,
    HAS_SCALE: tl.constexpr,
    GELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    """residual + gate * activation(acc * scale + bias), in float32; `inside` masks the tile, `rows` are int64."""
    if HAS_SCALE:
        acc *= tl.load(scale + columns, mask=columns < n, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = gelu_tanh(acc)
    if HAS_GATE:
        acc *= tl.load(gate + columns, mask=columns < n, other=0.0)[None, :]
    if HAS_RESIDUAL:
        source = residual + rows[:, None] * residual_stride + columns[None, :]
        acc += tl.load(source, mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit
def sum_splits(
    partial,
    out,
    scale,
    bias,
    residual,
    gate,
    m,
    n,
    out_stride,
    residual_stride,
    inverse,
    HAS_SCALE: tl.constexpr,
    GELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """partial (SPLITS, M, N) float32 -> out (M,N): the planes added in order, then the epilogue."""
    rows = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (columns < n)[None, :]
    place = rows[:, None] * n + columns[None, :]
    acc = tl.load(partial + place, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(partial + place + tl.cast(split, tl.int64) * m * n, mask=inside, other=0.0)
    acc = epilogue(
        acc, rows, columns, inside, n, scale, bias, residual, gate, residual_stride, HAS_SCALE, GELU, HAS_BIAS,
        HAS_RESIDUAL, HAS_GATE,
    )  # fmt: skip
    target = out + rows[:, None] * out_stride + columns[None, :]
    tl.store(target, narrow(acc, inverse, out.dtype.element_ty), mask=inside)
