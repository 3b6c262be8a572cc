"""LayerNorm without affine: weight and bias are folded into the product that follows (SPEC 1.1)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from ._common import dense, next_power_of_2, row_warps, same_dtype
from ._fp8 import check_inverse, narrow, store_ref
from ._triton import tl, triton


def _check(x: Tensor, out: Tensor, offset: Tensor | None, stream: Tensor | None) -> tuple[int, int]:
    rows, width = dense("x", x)
    dense("out", out, rows, width)
    if stream is not None:
        dense("stream", stream, rows, width)
    if offset is None:
        return rows, width
    period, _ = dense("offset", offset, width=width)
    if offset.dtype != torch.float32:
        raise ValueError(f"offset is {offset.dtype}, expected {torch.float32}")
    if period < 1 or rows % period:
        raise ValueError(f"offset has {period} rows, expected a divisor of the {rows} rows of x")
    return rows, width


def _check_update(x: Tensor, update: Tensor, out: Tensor) -> tuple[int, int]:
    rows, width = _check(x, out, None, None)
    dense("update", update, rows, width)
    same_dtype("x", x, "update", update)
    return rows, width


def layer_norm_ref(
    x: Tensor,
    out: Tensor,
    offset: Tensor | None = None,
    stream: Tensor | None = None,
    eps: float = 1e-6,
    inverse: float = 1.0,
) -> None:
    """Twin of `layer_norm`."""
    _check(x, out, offset, stream)
    f = x.float()
    if offset is not None:
        f = (f.unflatten(0, (-1, len(offset))) + offset).flatten(0, 1)
    centred = f - f.mean(-1, keepdim=True)
    store_ref(centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps), out, inverse)
    if stream is not None:
        stream.copy_(f)


def residual_layer_norm_ref(x: Tensor, update: Tensor, out: Tensor, eps: float = 1e-6, inverse: float = 1.0) -> None:
    """Twin of `residual_layer_norm`."""
    _check_update(x, update, out)
    x.copy_(x.float() + update.float())
    layer_norm_ref(x, out, eps=eps, inverse=inverse)


@triton.jit
def _normed(f, inside, width, eps):
    """One row, centred and of unit variance; 0 outside."""
    centred = tl.where(inside, f - tl.sum(f, axis=0) / width, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)


@triton.jit
def _layer_norm(
    x, out, offset, stream, width, period, eps, inverse, OFFSET: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    f = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        f += tl.load(offset + tl.program_id(0) % period * width + columns, mask=inside, other=0.0)
    normed = _normed(f, inside, width, eps)
    tl.store(out + row + columns, narrow(normed, inverse, out.dtype.element_ty), mask=inside)
    if STREAM:
        tl.store(stream + row + columns, f.to(stream.dtype.element_ty), mask=inside)


@triton.jit
def _residual_layer_norm(x, update, out, width, eps, inverse, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    f = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    f += tl.load(update + row + columns, mask=inside, other=0.0).to(tl.float32)
    # The norm reads what the stream holds: rounded, as in the reference.
    stream = f.to(x.dtype.element_ty)
    tl.store(x + row + columns, stream, mask=inside)
    normed = _normed(stream.to(tl.float32), inside, width, eps)
    tl.store(out + row + columns, narrow(normed, inverse, out.dtype.element_ty), mask=inside)


def layer_norm(
    x: Tensor,
    out: Tensor,
    offset: Tensor | None = None,
    stream: Tensor | None = None,
    eps: float = 1e-6,
    inverse: float = 1.0,
) -> None:
    """x (M,D) -> out (M,D): (y - mean) * rsqrt(variance + eps), in float32, where y is x, or x + offset.

    offset (P,D) float32, of which row i of x takes row i mod P: a bias that x lacks, or positions. `stream` (M,D)
    keeps y, rounded to its dtype; without it y is not kept. `out` and `stream` may be `x`; `out` in E4M3 holds the
    result times `inverse`, saturated. Raises ValueError where shapes do not fit.
    """
    rows, width = _check(x, out, offset, stream)
    check_inverse(out, inverse)
    block = next_power_of_2(width)
    _layer_norm[(rows,)](
        x,
        out,
        offset,
        stream,
        width,
        1 if offset is None else len(offset),
        eps,
        inverse,
        OFFSET=offset is not None,
        STREAM=stream is not None,
        BLOCK=block,
        num_warps=row_warps(block),
    )


def residual_layer_norm(x: Tensor, update: Tensor, out: Tensor, eps: float = 1e-6, inverse: float = 1.0) -> None:
    """x (M,D) += update (M,D), rounded once; out (M,D) = `layer_norm` of the new x, in one pass over the row.

    `out` in E4M3 holds the result times `inverse`, saturated. Raises ValueError where shapes do not fit.
    """
    rows, width = _check_update(x, update, out)
    check_inverse(out, inverse)
    block = next_power_of_2(width)
    _residual_layer_norm[(rows,)](x, update, out, width, eps, inverse, BLOCK=block, num_warps=row_warps(block))
