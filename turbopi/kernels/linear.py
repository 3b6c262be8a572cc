"""The linear layer with a fused epilogue: bias, tanh-GELU, gate, residual."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import aligned, cdiv, matrix, multiprocessors, next_power_of_2, precision, same_dtype, vector
from ._gemm import epilogue, sum_splits, tile_place
from ._triton import host_descriptor, tl, triton
from .tuning import GemmConfig, tuned

Activation = Literal["none", "gelu"]


def _check(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    gate: Tensor | None,
    partial: Tensor | None = None,
) -> tuple[int, int, int]:
    """M, N and K."""
    m, k = matrix("x", x)
    n, _ = matrix("w", w, width=k)
    matrix("out", out, m, n)
    same_dtype("x", x, "w", w)
    vector("bias", bias, n, None)
    vector("gate", gate, n)
    if residual is not None:
        matrix("residual", residual, m, n)
    if activation not in get_args(Activation):
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(get_args(Activation))}")
    if partial is not None and (
        partial.ndim != 3
        or partial.shape[1:] != (m, n)
        or not partial.is_contiguous()
        or partial.dtype != torch.float32
    ):
        raise ValueError(f"partial is {partial.dtype} {tuple(partial.shape)}, expected float32 (splits, {m}, {n})")
    return m, n, k


def linear_ref(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    config: GemmConfig | None = None,
    partial: Tensor | None = None,
) -> None:
    """Twin of `linear`; `config` and `partial` change nothing here."""
    _check(x, w, out, bias, activation, residual, gate, partial)
    y = F.linear(x.float(), w.float(), None if bias is None else bias.float())
    if activation == "gelu":
        y = F.gelu(y, approximate="tanh")
    if gate is not None:
        y = y * gate
    out.copy_(y if residual is None else residual.float() + y)


@triton.jit
def _linear_pointers(
    x,
    w,
    out,
    bias,
    residual,
    gate,
    m,
    n,
    k,
    x_stride,
    w_stride,
    out_stride,
    residual_stride,
    GELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split = tl.program_id(1)
    tile_m, tile_n = tile_place(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Rows past the end wrap around: loads need no mask, and the store leaves them out.
    x_rows = x + (rows % m).to(tl.int64)[:, None] * x_stride
    w_rows = w + (columns % n).to(tl.int64)[:, None] * w_stride
    part = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLITS) * BLOCK_K
    begin = split * part
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(begin, tl.minimum(begin + part, k), BLOCK_K):
        at = (start + depth)[None, :]
        if EVEN_K:
            a = tl.load(x_rows + at)
            b = tl.load(w_rows + at)
        else:
            a = tl.load(x_rows + at, mask=at < k, other=0.0)
            b = tl.load(w_rows + at, mask=at < k, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    rows = rows.to(tl.int64)
    acc = epilogue(
        acc, rows, columns, inside, n, bias, residual, gate, residual_stride, GELU, HAS_BIAS, HAS_RESIDUAL, HAS_GATE
    )
    # Each split writes its own plane of `partial`, which is then `out`.
    target = out + (split * m + rows)[:, None] * out_stride + columns[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _linear_descriptors(
    x,
    w,
    out,
    bias,
    residual,
    gate,
    m,
    n,
    k,
    residual_stride,
    GELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    # Flattened with the loop over K, so that the next tile's loads start under this tile's epilogue.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        tile_m, tile_n = tile_place(tile, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(tl.cdiv(k, BLOCK_K)):
            a = x.load([tile_m * BLOCK_M, step * BLOCK_K])
            b = w.load([tile_n * BLOCK_N, step * BLOCK_K])
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        acc = epilogue(
            acc, rows.to(tl.int64), columns, inside, n, bias, residual, gate, residual_stride, GELU, HAS_BIAS,
            HAS_RESIDUAL, HAS_GATE,
        )  # fmt: skip
        out.store([tile_m * BLOCK_M, tile_n * BLOCK_N], acc.to(out.dtype))


def default_config(m: int, n: int, dtype: torch.dtype) -> GemmConfig:
    """Tiles that run on any supported GPU, for shapes that were never tuned."""
    wide = 1 if dtype.itemsize <= 2 else 2
    if m <= 64:
        block_n = 64 if n > 4096 else 32
        return GemmConfig(max(16, next_power_of_2(m)), block_n, 128 // wide, group_m=1, warps=4, stages=4)
    return GemmConfig(128, 128, 64 // wide, warps=8, stages=3)


def _with_pointers(x, w, out, bias, residual, gate, partial, sizes, config: GemmConfig, flags) -> None:
    m, n, k = sizes
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    split = config.splits > 1
    none = {"GELU": False, "HAS_BIAS": False, "HAS_RESIDUAL": False, "HAS_GATE": False}
    target = partial if split else out
    residual_stride = 0 if residual is None else residual.stride(0)
    _linear_pointers[(tiles, config.splits)](
        x,
        w,
        target,
        bias,
        residual,
        gate,
        m,
        n,
        k,
        x.stride(0),
        w.stride(0),
        n if split else out.stride(0),
        residual_stride,
        **(none if split else flags),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        SPLITS=config.splits,
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision(x),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if split:
        block = min(256, next_power_of_2(n))
        sum_splits[(m, cdiv(n, block))](
            partial,
            out,
            bias,
            residual,
            gate,
            m,
            n,
            out.stride(0),
            residual_stride,
            **flags,
            SPLITS=config.splits,
            BLOCK_N=block,
            num_warps=2,
        )


def _with_descriptors(x, w, out, bias, residual, gate, sizes, config: GemmConfig, flags) -> None:
    m, n, k = sizes
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    _linear_descriptors[(min(multiprocessors(x), tiles) if config.persistent else tiles,)](
        host_descriptor(x, [config.block_m, config.block_k]),
        host_descriptor(w, [config.block_n, config.block_k]),
        host_descriptor(out, [config.block_m, config.block_n]),
        bias,
        residual,
        gate,
        m,
        n,
        k,
        0 if residual is None else residual.stride(0),
        **flags,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        PRECISION=precision(x),
        PERSISTENT=config.persistent,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def linear(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    config: GemmConfig | None = None,
    partial: Tensor | None = None,
) -> None:
    """out (M,N) = residual + gate * activation(x (M,K) w (N,K)^T + bias), accumulated in float32, rounded once.

    bias (N,) of any dtype, gate (N,) float32, residual (M,N), which may be `out`. Rows are contiguous, any distance
    apart. `partial` (splits, M, N) float32 is scratch: with it K is cut into as many parts, for products of few rows
    and few columns. `config` None takes the tuned one for this GPU and shape, else a default. Raises ValueError where
    shapes do not fit.
    """
    sizes = _check(x, w, out, bias, activation, residual, gate, partial)
    splits = 1 if partial is None else partial.shape[0]
    if config is None:
        op, shape = ("linear", sizes) if splits == 1 else ("linear_split", (*sizes, splits))
        config = tuned(op, GemmConfig, x, shape)
        if config is None or (config.descriptors and not aligned(x, w, out)):
            config = replace(default_config(*sizes[:2], x.dtype), splits=splits)
    if config.splits != splits:
        raise ValueError(f"a config of {config.splits} splits needs partial of as many planes, got {splits}")
    flags = {
        "GELU": activation == "gelu",
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "HAS_GATE": gate is not None,
    }
    if config.descriptors:
        _with_descriptors(x, w, out, bias, residual, gate, sizes, config, flags)
    else:
        _with_pointers(x, w, out, bias, residual, gate, partial, sizes, config, flags)
