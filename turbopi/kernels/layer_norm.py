"""LayerNorm without affine: weight and bias are folded into the product that follows (SPEC 1.1)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from ._common import dense, next_power_of_2, row_warps
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


def layer_norm_ref(
    x: Tensor, out: Tensor, offset: Tensor | None = None, stream: Tensor | None = None, eps: float = 1e-6
) -> None:
    """Twin of `layer_norm`."""
    _check(x, out, offset, stream)
    f = x.float()
    if offset is not None:
        f = (f.unflatten(0, (-1, len(offset))) + offset).flatten(0, 1)
    centred = f - f.mean(-1, keepdim=True)
    out.copy_(centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps))
    if stream is not None:
        stream.copy_(f)


@triton.jit
def _layer_norm(
    x, out, offset, stream, width, period, eps, OFFSET: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    f = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        f += tl.load(offset + tl.program_id(0) % period * width + columns, mask=inside, other=0.0)
    centred = tl.where(inside, f - tl.sum(f, axis=0) / width, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    tl.store(out + row + columns, normed.to(out.dtype.element_ty), mask=inside)
    if STREAM:
        tl.store(stream + row + columns, f.to(stream.dtype.element_ty), mask=inside)


def layer_norm(
    x: Tensor, out: Tensor, offset: Tensor | None = None, stream: Tensor | None = None, eps: float = 1e-6
) -> None:
    """x (M,D) -> out (M,D): (y - mean) * rsqrt(variance + eps), in float32, where y is x, or x + offset.

    offset (P,D) float32, of which row i of x takes row i mod P: a bias that x lacks, or positions. `stream` (M,D)
    keeps y, rounded to its dtype; without it y is not kept. `out` and `stream` may be `x`. Raises ValueError where
    shapes do not fit.
    """
    rows, width = _check(x, out, offset, stream)
    block = next_power_of_2(width)
    _layer_norm[(rows,)](
        x,
        out,
        offset,
        stream,
        width,
        1 if offset is None else len(offset),
        eps,
        OFFSET=offset is not None,
        STREAM=stream is not None,
        BLOCK=block,
        num_warps=row_warps(block),
    )
