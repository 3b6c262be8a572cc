"""The linear layer with a fused epilogue: bias, tanh-GELU, gate, residual."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import aligned, cdiv, matrix, multiprocessors, next_power_of_2, planes, precision, same_dtype, vector
from ._fp8 import check_inverse, narrow, store_ref
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
    partial: Tensor | None,
    scale: Tensor | None,
) -> tuple[int, int, int]:
    """M, N and K."""
    m, k = matrix("x", x)
    n, _ = matrix("w", w, width=k)
    matrix("out", out, m, n)
    same_dtype("x", x, "w", w)
    vector("bias", bias, n, None)
    vector("gate", gate, n)
    vector("scale", scale, n)
    if residual is not None:
        matrix("residual", residual, m, n)
    if activation not in get_args(Activation):
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(get_args(Activation))}")
    if partial is not None:
        planes("partial", partial, m, n)
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
    scale: Tensor | None = None,
    inverse: float = 1.0,
) -> None:
    """Twin of `linear`; `config` and `partial` change nothing here."""
    _check(x, w, out, bias, activation, residual, gate, partial, scale)
    y = F.linear(x.float(), w.float())
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias.float()
    if activation == "gelu":
        y = F.gelu(y, approximate="tanh")
    if gate is not None:
        y = y * gate
    store_ref(y if residual is None else residual.float() + y, out, inverse)


@triton.jit
def _linear_pointers(
    x,
    w,
    out,
    scale,
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
    inverse,
    HAS_SCALE: tl.constexpr,
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
        acc, rows, columns, inside, n, scale, bias, residual, gate, residual_stride, HAS_SCALE, GELU, HAS_BIAS,
        HAS_RESIDUAL, HAS_GATE,
    )  # fmt: skip
    # Each split writes its own plane of `partial`, which is then `out`.
    target = out + (split * m + rows)[:, None] * out_stride + columns[None, :]
    tl.store(target, narrow(acc, inverse, out.dtype.element_ty), mask=inside)


@triton.jit
def _linear_descriptors(
    x,
    w,
    out,
    scale,
    bias,
    residual,
    gate,
    m,
    n,
    k,
    residual_stride,
    inverse,
    HAS_SCALE: tl.constexpr,
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
            acc, rows.to(tl.int64), columns, inside, n, scale, bias, residual, gate, residual_stride, HAS_SCALE, GELU,
            HAS_BIAS, HAS_RESIDUAL, HAS_GATE,
        )  # fmt: skip
        out.store([tile_m * BLOCK_M, tile_n * BLOCK_N], narrow(acc, inverse, out.dtype))


def default_config(m: int, n: int, dtype: torch.dtype) -> GemmConfig:
    """Tiles that run on any supported GPU, for shapes that were never tuned."""
    row_bytes = 128
    if m <= 64:
        block_n, block_k = 64 if n > 4096 else 32, 2 * row_bytes // max(2, dtype.itemsize)
        return GemmConfig(max(16, next_power_of_2(m)), block_n, block_k, group_m=1, warps=4, stages=4)
    return GemmConfig(128, 128, row_bytes // dtype.itemsize, warps=8, stages=3)


class _Extras(NamedTuple):
    """What the epilogue reads, in the kernels' order."""

    scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    gate: Tensor | None

    def flags(self, activation: str) -> dict[str, bool]:
        """The kernels' compile-time switches."""
        return {
            "HAS_SCALE": self.scale is not None,
            "GELU": activation == "gelu",
            "HAS_BIAS": self.bias is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "HAS_GATE": self.gate is not None,
        }

    @property
    def residual_stride(self) -> int:
        """Elements from row to row of the residual."""
        return 0 if self.residual is None else self.residual.stride(0)


def _tile(config: GemmConfig, x: Tensor) -> dict[str, int | str]:
    """What both kernels are told of a tile."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PRECISION": precision(x),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _with_pointers(x, w, out, extras: _Extras, partial, sizes, config: GemmConfig, flags, inverse: float) -> None:
    m, n, k = sizes
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    split = config.splits > 1
    _linear_pointers[(tiles, config.splits)](
        x,
        w,
        partial if split else out,
        *extras,
        m,
        n,
        k,
        x.stride(0),
        w.stride(0),
        n if split else out.stride(0),
        extras.residual_stride,
        inverse,
        **(dict.fromkeys(flags, False) if split else flags),
        SPLITS=config.splits,
        EVEN_K=k % config.block_k == 0,
        **_tile(config, x),
    )
    if split:
        block = min(256, next_power_of_2(n))
        sum_splits[(m, cdiv(n, block))](
            partial,
            out,
            *extras,
            m,
            n,
            out.stride(0),
            extras.residual_stride,
            inverse,
            **flags,
            SPLITS=config.splits,
            BLOCK_N=block,
            num_warps=2,
        )


def _with_descriptors(x, w, out, extras: _Extras, sizes, config: GemmConfig, flags, inverse: float) -> None:
    m, n, k = sizes
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    _linear_descriptors[(min(multiprocessors(x), tiles) if config.persistent else tiles,)](
        host_descriptor(x, [config.block_m, config.block_k]),
        host_descriptor(w, [config.block_n, config.block_k]),
        host_descriptor(out, [config.block_m, config.block_n]),
        *extras,
        m,
        n,
        k,
        extras.residual_stride,
        inverse,
        **flags,
        PERSISTENT=config.persistent,
        **_tile(config, x),
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
    scale: Tensor | None = None,
    inverse: float = 1.0,
) -> None:
    """out (M,N) = residual + gate * activation(x (M,K) w (N,K)^T * scale + bias), in float32, rounded once.

    bias (N,) of any dtype, gate and scale (N,) float32, residual (M,N), which may be `out`. Rows are contiguous, any
    distance apart. x and w may be in E4M3, which is what `scale` is for; `out` in E4M3 holds the result times
    `inverse`, saturated. `partial` (splits, M, N) float32 is scratch: with it K is cut into as many parts, for products
    of few rows and few columns. `config` None takes the tuned one for this GPU and shape, else a default. Raises
    ValueError where shapes do not fit.
    """
    sizes = _check(x, w, out, bias, activation, residual, gate, partial, scale)
    check_inverse(out, inverse)
    splits = 1 if partial is None else partial.shape[0]
    if config is None:
        op, shape = ("linear", sizes) if splits == 1 else ("linear_split", (*sizes, splits))
        config = tuned(op, GemmConfig, x, shape)
        if config is None or (config.descriptors and not aligned(x, w, out)):
            config = replace(default_config(*sizes[:2], x.dtype), splits=splits)
    if config.splits != splits:
        raise ValueError(f"a config of {config.splits} splits needs partial of as many planes, got {splits}")
    extras = _Extras(scale, bias, residual, gate)
    flags = extras.flags(activation)
    if config.descriptors:
        _with_descriptors(x, w, out, extras, sizes, config, flags, inverse)
    else:
        _with_pointers(x, w, out, extras, partial, sizes, config, flags, inverse)
