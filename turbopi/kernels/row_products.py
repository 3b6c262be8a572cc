"""Products over few rows, such as the suffix's, each one launch that may start before its predecessor has ended.

Here for any shape and GPU; `row_products_tma` has two of them for Hopper and for shapes that its blocks divide.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from . import row_products_tma as tma
from ._common import cdiv, matrix, next_power_of_2, planes, precision, same_dtype, vector
from ._dependent import after_the_last, options
from ._fp8 import check_inverse, narrow
from ._triton import tl, triton
from .geglu import gelu_tanh
from .geglu_linear import geglu_linear_ref
from .rope import check_rotation, rotate_and_store_ref
from .tuning import GemmConfig, tuned


@triton.jit
def _two_sums(
    x,
    w,
    rows,
    first_rows,
    second_rows,
    inside_columns,
    m,
    k,
    x_stride,
    w_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x times two blocks of BLOCK_N weight rows each."""
    depth = tl.arange(0, BLOCK_K)
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    first_at = w + first_rows.to(tl.int64)[:, None] * w_stride
    second_at = w + second_rows.to(tl.int64)[:, None] * w_stride
    inside = (rows < m)[:, None]
    first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        at = (start + depth)[None, :]
        a = tl.load(x_rows + at, mask=inside & (at < k), other=0.0)
        b = tl.load(first_at + at, mask=inside_columns[:, None] & (at < k), other=0.0)
        c = tl.load(second_at + at, mask=inside_columns[:, None] & (at < k), other=0.0)
        first = tl.dot(a, tl.trans(b), first, input_precision=PRECISION)
        second = tl.dot(a, tl.trans(c), second, input_precision=PRECISION)
    return first, second


@triton.jit
def _scale_of(scale, columns, inside):
    """By which each column's sums are multiplied: what no kernel writes, so it is read before this one's turn."""
    factor = 1.0
    if scale is not None:
        factor = tl.load(scale + columns, mask=inside, other=0.0)[None, :]
    return factor


@triton.jit
def _row_geglu(
    x, w, out, scale, m, f, k, x_stride, w_stride, out_stride, inverse, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_scale, up_scale = _scale_of(scale, columns, columns < f), _scale_of(scale, f + columns, columns < f)
    after_the_last(DEPENDENT)
    gate, up = _two_sums(
        x, w, rows, columns, f + columns, columns < f, m, k, x_stride, w_stride, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )
    inside = (rows < m)[:, None] & (columns < f)[None, :]
    target = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    product = gelu_tanh(gate * gate_scale) * (up * up_scale)
    tl.store(target, narrow(product, inverse, out.dtype.element_ty), mask=inside)


@triton.jit
def _row_qkv(
    x, w, scale, cos, sin, first, q_out, keys, values, m, k, rows_per_sample, x_stride, w_stride, q_stride, k_batch,
    k_head, k_slot, v_batch, v_head, v_slot, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (HALF + BLOCK_N - 1) // BLOCK_N
    head = tl.program_id(1) // blocks
    dims = tl.program_id(1) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < m)[:, None] & (dims < HALF)[None, :]
    low_rows = head * (2 * HALF) + dims
    low_scale, high_scale = _scale_of(scale, low_rows, dims < HALF), _scale_of(scale, low_rows + HALF, dims < HALF)
    after_the_last(DEPENDENT)
    sample = row // rows_per_sample
    place = tl.load(first + sample, mask=row < m, other=0) + row - sample * rows_per_sample
    # A value is not rotated: cos 1, sin 0.
    turning = inside & (dims < tl.where(head < HEADS + KV_HEADS, HALF, 0))[None, :]
    angle = place[:, None] * HALF + dims[None, :]
    c = tl.load(cos + angle, mask=turning, other=1.0)
    s = tl.load(sin + angle, mask=turning, other=0.0)
    a, b = _two_sums(
        x, w, row, low_rows, low_rows + HALF, dims < HALF, m, k, x_stride, w_stride, BLOCK_M, BLOCK_N, BLOCK_K,
        PRECISION,
    )  # fmt: skip
    a, b = a * low_scale, b * high_scale
    low, high = a * c - b * s, b * c + a * s
    token, sample, slot = row.to(tl.int64)[:, None], sample.to(tl.int64)[:, None], place.to(tl.int64)[:, None]
    if head < HEADS:
        target = q_out + token * q_stride + head * (2 * HALF) + dims[None, :]
        tl.store(target, low.to(q_out.dtype.element_ty), mask=inside)
        tl.store(target + HALF, high.to(q_out.dtype.element_ty), mask=inside)
    elif head < HEADS + KV_HEADS:
        target = keys + sample * k_batch + (head - HEADS) * k_head + slot * k_slot + dims[None, :]
        tl.store(target, low.to(keys.dtype.element_ty), mask=inside)
        tl.store(target + HALF, high.to(keys.dtype.element_ty), mask=inside)
    else:
        target = values + sample * v_batch + (head - HEADS - KV_HEADS) * v_head + slot * v_slot + dims[None, :]
        tl.store(target, low.to(values.dtype.element_ty), mask=inside)
        tl.store(target + HALF, high.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _row_parts(
    x, w, scale, parts, m, n, k, part, x_stride, w_stride, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(2) * part
    depth = tl.arange(0, BLOCK_K)
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    w_rows = w + columns.to(tl.int64)[:, None] * w_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    factor = _scale_of(scale, columns, columns < n)
    after_the_last(DEPENDENT)
    for start in range(begin, tl.minimum(begin + part, k), BLOCK_K):
        at = (start + depth)[None, :]
        a = tl.load(x_rows + at, mask=(rows < m)[:, None] & (at < k), other=0.0)
        b = tl.load(w_rows + at, mask=(columns < n)[:, None] & (at < k), other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    place = (tl.program_id(2).to(tl.int64) * m + rows)[:, None] * n + columns[None, :]
    tl.store(parts + place, acc * factor, mask=(rows < m)[:, None] & (columns < n)[None, :])


def _block_m(m: int, config: GemmConfig) -> int:
    """No taller than the rows need."""
    return min(config.block_m, max(16, next_power_of_2(m)))


def default_config(m: int, dtype: torch.dtype, columns: int) -> GemmConfig:
    """Tiles that run everywhere."""
    block_k = 256 // max(2, dtype.itemsize)
    return GemmConfig(min(64, max(16, next_power_of_2(m))), columns, block_k, group_m=1, warps=4, stages=4)


def _choose(
    op: str, x: Tensor, weight: Tensor, columns: int, sizes: tuple[int, ...], splits: int = 1, half: int = 0
) -> GemmConfig:
    """The tuned config, or the Hopper kernel's blocks, if it can run here; else `default_config`."""
    hopper = GemmConfig(tma.BLOCK_M, columns, 128, group_m=1, warps=tma.WARPS, stages=8, descriptors=True)
    for config in (tuned(op, GemmConfig, x, sizes), hopper):
        if config and not (config.descriptors and tma.obstacles(x, weight, config, splits, half)):
            return config
    return default_config(len(x), x.dtype, min(columns, 32))


def _check_config(config: GemmConfig, x: Tensor, weight: Tensor, splits: int = 1, half: int = 0) -> None:
    """Raise ValueError where a config that was given asks for the Hopper kernel and that cannot run."""
    if config.descriptors and (found := tma.obstacles(x, weight, config, splits, half)):
        raise ValueError(f"no product through descriptors: {'; '.join(found)}")


def _tile(config: GemmConfig, x: Tensor) -> dict[str, object]:
    return {
        "BLOCK_M": _block_m(len(x), config),
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PRECISION": precision(x),
        "num_stages": config.stages,
    }


def row_geglu_ref(
    x: Tensor,
    w_gate_up: Tensor,
    out: Tensor,
    config: GemmConfig | None = None,
    scale: Tensor | None = None,
    inverse: float = 1.0,
) -> None:
    """Twin of `row_geglu`."""
    geglu_linear_ref(x, w_gate_up, out, scale=scale, inverse=inverse)


def row_geglu(
    x: Tensor,
    w_gate_up: Tensor,
    out: Tensor,
    config: GemmConfig | None = None,
    scale: Tensor | None = None,
    inverse: float = 1.0,
) -> None:
    """`geglu_linear` for few rows: out (M,F) = tanh-GELU(x gate^T) * (x up^T), w_gate_up (2F,K) gate first.

    In E4M3, as there: both products times `scale` (2F,), `out` times `inverse`. Raises ValueError where shapes do not
    fit.
    """
    m, k = matrix("x", x)
    _, f = matrix("out", out, m)
    matrix("w_gate_up", w_gate_up, 2 * f, k)
    same_dtype("x", x, "w_gate_up", w_gate_up)
    vector("scale", scale, 2 * f)
    check_inverse(out, inverse)
    config = config or tuned("row_geglu", GemmConfig, x, (m, f, k)) or default_config(m, x.dtype, 32)
    _check_config(config, x, w_gate_up, half=f)
    if config.descriptors:
        tma.launch(x, w_gate_up, out, config, scale=scale, half=f, inverse=inverse)
        return
    grid = (cdiv(m, _block_m(m, config)), cdiv(f, config.block_n), 1)
    strides = x.stride(0), w_gate_up.stride(0), out.stride(0)
    sizes = (m, f, k, *strides, inverse)
    _row_geglu[grid](x, w_gate_up, out, scale, *sizes, **_tile(config, x), **options(x, config.warps))


def row_qkv_ref(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    first: Tensor,
    q_out: Tensor,
    keys: Tensor,
    values: Tensor,
    rows_per_sample: int,
    config: GemmConfig | None = None,
    scale: Tensor | None = None,
) -> None:
    """Twin of `row_qkv`."""
    qkv = x.float() @ weight.float().T
    qkv = qkv if scale is None else qkv * scale
    rotate_and_store_ref(qkv, cos, sin, first, q_out, keys, values, rows_per_sample)


def row_qkv(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    first: Tensor,
    q_out: Tensor,
    keys: Tensor,
    values: Tensor,
    rows_per_sample: int,
    config: GemmConfig | None = None,
    scale: Tensor | None = None,
) -> None:
    """The product with merged q, k, v weights, and `rotate_and_store` on its way out, rounded once.

    x (B*N,K), weight ((H+2KV)*d,K); the rest as in `rotate_and_store`. config.block_n columns of a head's first half
    and as many of its second make a tile. x and weight may be in E4M3, each column's sums then times `scale`, a float32
    for each row of weight. Raises ValueError where shapes do not fit.
    """
    m, k = matrix("x", x)
    width, _ = matrix("weight", weight, width=k)
    same_dtype("x", x, "weight", weight)
    vector("scale", scale, width)
    _, heads, head_dim = check_rotation(m, width, cos, sin, first, q_out, keys, values, rows_per_sample)
    kv_heads, half = keys.shape[1], head_dim // 2
    config = config or _choose("row_qkv", x, weight, 16, (m, width, k), half=half)
    _check_config(config, x, weight, half=half)
    if config.descriptors:
        rotation = (cos, sin, first, keys, values, rows_per_sample)
        tma.launch(x, weight, q_out, config, scale=scale, half=half, rotation=rotation, heads=(heads, kv_heads))
        return
    grid = (cdiv(m, _block_m(m, config)), (heads + 2 * kv_heads) * cdiv(half, config.block_n), 1)
    _row_qkv[grid](
        x,
        weight,
        scale,
        cos,
        sin,
        first,
        q_out,
        keys,
        values,
        m,
        k,
        rows_per_sample,
        x.stride(0),
        weight.stride(0),
        q_out.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        **_tile(config, x),
        **options(x, config.warps),
    )


def row_parts_ref(
    x: Tensor, weight: Tensor, parts: Tensor, config: GemmConfig | None = None, scale: Tensor | None = None
) -> None:
    """Twin of `row_parts`: K is cut where the kernel cuts it without a config."""
    splits, _, _, k = _check_parts(x, weight, parts, scale)
    parts.zero_()
    for at, columns in enumerate(torch.arange(k).split(cdiv(k, splits))):
        parts[at] = x[:, columns].float() @ weight[:, columns].float().T
    if scale is not None:
        parts *= scale


def _check_parts(x: Tensor, weight: Tensor, parts: Tensor, scale: Tensor | None) -> tuple[int, int, int, int]:
    m, k = matrix("x", x)
    n, _ = matrix("weight", weight, width=k)
    same_dtype("x", x, "weight", weight)
    vector("scale", scale, n)
    return planes("parts", parts, m, n), m, n, k


def row_parts(
    x: Tensor, weight: Tensor, parts: Tensor, config: GemmConfig | None = None, scale: Tensor | None = None
) -> None:
    """parts (S,M,N) float32, whose sum is x (M,K) weight (N,K)^T: K in S parts, for `row_sum_norm` to add up.

    x and weight may be in E4M3, each column then times `scale` (N,) float32. Raises ValueError where shapes do not fit.
    """
    splits, m, n, k = _check_parts(x, weight, parts, scale)
    config = config or _choose("row_parts", x, weight, 64, (m, n, k, splits), splits)
    _check_config(config, x, weight, splits)
    if config.descriptors:
        tma.launch(x, weight, parts, config, splits, scale)
        return
    part = cdiv(cdiv(k, splits), config.block_k) * config.block_k
    grid = (cdiv(m, _block_m(m, config)), cdiv(n, config.block_n), splits)
    _row_parts[grid](
        x,
        weight,
        scale,
        parts,
        m,
        n,
        k,
        part,
        x.stride(0),
        weight.stride(0),
        **_tile(config, x),
        **options(x, config.warps),
    )
