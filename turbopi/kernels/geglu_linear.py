"""The product with merged gate and up weights, and GeGLU on its way out (SPEC 1.3)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import aligned, cdiv, matrix, multiprocessors, next_power_of_2, precision, same_dtype, vector
from ._fp8 import check_inverse, narrow, store_ref
from ._gemm import tile_place
from ._triton import host_descriptor, tl, triton
from .geglu import gelu_tanh
from .tuning import GemmConfig, tuned


def _check(x: Tensor, w_gate_up: Tensor, out: Tensor, scale: Tensor | None) -> tuple[int, int, int]:
    """M, F and K."""
    m, k = matrix("x", x)
    _, f = matrix("out", out, m)
    matrix("w_gate_up", w_gate_up, 2 * f, k)
    same_dtype("x", x, "w_gate_up", w_gate_up)
    vector("scale", scale, 2 * f)
    return m, f, k


def geglu_linear_ref(
    x: Tensor,
    w_gate_up: Tensor,
    out: Tensor,
    config: GemmConfig | None = None,
    scale: Tensor | None = None,
    inverse: float = 1.0,
) -> None:
    """Twin of `geglu_linear`; `config` changes nothing here."""
    _check(x, w_gate_up, out, scale)
    product = F.linear(x.float(), w_gate_up.float())
    gate, up = (product if scale is None else product * scale).chunk(2, dim=-1)
    store_ref(F.gelu(gate, approximate="tanh") * up, out, inverse)


@triton.jit
def _scaled(acc, scale, columns, inside, HAS_SCALE: tl.constexpr):
    """The sums of a tile, each column times its own scale."""
    if HAS_SCALE:
        acc *= tl.load(scale + columns, mask=inside, other=0.0)[None, :]
    return acc


@triton.jit
def _geglu_linear_pointers(
    x,
    w,
    out,
    scale,
    m,
    f,
    k,
    x_stride,
    w_stride,
    out_stride,
    inverse,
    HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile_m, tile_n = tile_place(tl.program_id(0), m, f, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Rows past the end wrap around: loads need no mask, and the store leaves them out.
    x_rows = x + (rows % m).to(tl.int64)[:, None] * x_stride
    gate_rows = w + (columns % f).to(tl.int64)[:, None] * w_stride
    up_rows = w + (columns % f + f).to(tl.int64)[:, None] * w_stride
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        at = (start + depth)[None, :]
        if EVEN_K:
            a = tl.load(x_rows + at)
            b = tl.load(gate_rows + at)
            c = tl.load(up_rows + at)
        else:
            a = tl.load(x_rows + at, mask=at < k, other=0.0)
            b = tl.load(gate_rows + at, mask=at < k, other=0.0)
            c = tl.load(up_rows + at, mask=at < k, other=0.0)
        gate = tl.dot(a, tl.trans(b), gate, input_precision=PRECISION)
        up = tl.dot(a, tl.trans(c), up, input_precision=PRECISION)
    gate = _scaled(gate, scale, columns, columns < f, HAS_SCALE)
    up = _scaled(up, scale, f + columns, columns < f, HAS_SCALE)
    inside = (rows < m)[:, None] & (columns < f)[None, :]
    target = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(target, narrow(gelu_tanh(gate) * up, inverse, out.dtype.element_ty), mask=inside)


@triton.jit
def _geglu_linear_descriptors(
    x,
    w,
    out,
    scale,
    m,
    f,
    k,
    inverse,
    HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(f, BLOCK_N)
    # Flattened with the loop over K, so that the next tile's loads start under this tile's epilogue.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        tile_m, tile_n = tile_place(tile, m, f, BLOCK_M, BLOCK_N, GROUP_M)
        gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(tl.cdiv(k, BLOCK_K)):
            a = x.load([tile_m * BLOCK_M, step * BLOCK_K])
            b = w.load([tile_n * BLOCK_N, step * BLOCK_K])
            c = w.load([f + tile_n * BLOCK_N, step * BLOCK_K])
            gate = tl.dot(a, tl.trans(b), gate, input_precision=PRECISION)
            up = tl.dot(a, tl.trans(c), up, input_precision=PRECISION)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        gate = _scaled(gate, scale, columns, columns < f, HAS_SCALE)
        up = _scaled(up, scale, f + columns, columns < f, HAS_SCALE)
        out.store([tile_m * BLOCK_M, tile_n * BLOCK_N], narrow(gelu_tanh(gate) * up, inverse, out.dtype))


def default_config(m: int, dtype: torch.dtype) -> GemmConfig:
    """Tiles that run on any supported GPU, for shapes that were never tuned."""
    row_bytes = 128
    if m <= 64:
        block_k = 2 * row_bytes // max(2, dtype.itemsize)
        return GemmConfig(max(16, next_power_of_2(m)), 32, block_k, group_m=1, warps=4, stages=4)
    return GemmConfig(128, 64, row_bytes // dtype.itemsize, warps=8, stages=3)


def geglu_linear(
    x: Tensor,
    w_gate_up: Tensor,
    out: Tensor,
    config: GemmConfig | None = None,
    scale: Tensor | None = None,
    inverse: float = 1.0,
) -> None:
    """out (M,F) = tanh-GELU(x gate^T) * (x up^T), with w_gate_up (2F,K) holding gate, then up.

    x (M,K). Accumulated in float32, rounded once: the (M,2F) product is never stored. x and weights may be in E4M3,
    both products then multiplied by `scale` (2F,) float32; `out` in E4M3 holds the result times `inverse`, saturated.
    `config` None takes the tuned one for this GPU and shape, else a default. Raises ValueError where shapes do not fit.
    """
    m, f, k = _check(x, w_gate_up, out, scale)
    check_inverse(out, inverse)
    if config is None:
        config = tuned("geglu_linear", GemmConfig, x, (m, f, k))
        if config is None or (config.descriptors and not aligned(x, w_gate_up, out)):
            config = default_config(m, x.dtype)
    if config.splits > 1:
        raise ValueError(f"geglu_linear cannot be split along K, got splits = {config.splits}")
    tiles = cdiv(m, config.block_m) * cdiv(f, config.block_n)
    tile = {
        "HAS_SCALE": scale is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PRECISION": precision(x),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    if config.descriptors:
        _geglu_linear_descriptors[(min(multiprocessors(x), tiles) if config.persistent else tiles,)](
            host_descriptor(x, [config.block_m, config.block_k]),
            host_descriptor(w_gate_up, [config.block_n, config.block_k]),
            host_descriptor(out, [config.block_m, config.block_n]),
            scale,
            m,
            f,
            k,
            inverse,
            PERSISTENT=config.persistent,
            **tile,
        )
    else:
        strides = x.stride(0), w_gate_up.stride(0), out.stride(0)
        even = k % config.block_k == 0
        _geglu_linear_pointers[(tiles,)](x, w_gate_up, out, scale, m, f, k, *strides, inverse, EVEN_K=even, **tile)
