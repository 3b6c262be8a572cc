"""The gated residual, with or without the norm that follows it (SPEC 1.3)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from torch import Tensor

from ._common import cdiv, dense, next_power_of_2, row_warps, same_dtype, vector
from ._dependent import after_the_last, options
from ._fp8 import check_inverse, narrow
from ._triton import tl, triton
from .rms_norm import rms_norm_ref

RESIDUAL_BLOCK = 1024


def _check(x: Tensor, update: Tensor, gate: Tensor | None) -> tuple[int, int]:
    rows, width = dense("x", x)
    dense("update", update, rows, width)
    same_dtype("x", x, "update", update)
    vector("gate", gate, width)
    return rows, width


def _check_norm(
    x: Tensor, update: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, out: Tensor
) -> tuple[int, int]:
    rows, width = _check(x, update, gate)
    dense("out", out, rows, width)
    vector("scale", scale, width)
    vector("shift", shift, width)
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift make one modulation: give both or neither")
    return rows, width


def gated_residual_ref(x: Tensor, update: Tensor, gate: Tensor | None = None) -> None:
    """Twin of `gated_residual`."""
    _check(x, update, gate)
    f = update.float()
    x.copy_(x.float() + (f if gate is None else f * gate))


def gated_residual_norm_ref(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    eps: float = 1e-6,
    inverse: float = 1.0,
) -> None:
    """Twin of `gated_residual_norm`."""
    _check_norm(x, update, gate, scale, shift, out)
    gated_residual_ref(x, update, gate)
    rms_norm_ref(x, out, scale, shift, eps, inverse)


@triton.jit
def _gated_residual(x, update, gate, width, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < width
    f = tl.load(x + row + offsets, mask=inside).to(tl.float32)
    step = tl.load(update + row + offsets, mask=inside).to(tl.float32)
    if GATED:
        step *= tl.load(gate + offsets, mask=inside)
    tl.store(x + row + offsets, (f + step).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _gated_residual_norm(
    x,
    update,
    gate,
    scale,
    shift,
    out,
    width,
    eps,
    inverse,
    GATED: tl.constexpr,
    MODULATED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * width
    offsets = tl.arange(0, BLOCK)
    inside = offsets < width
    after_the_last(DEPENDENT)
    f = tl.load(x + row + offsets, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(update + row + offsets, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        step *= tl.load(gate + offsets, mask=inside, other=0.0)
    # The norm reads what the stream holds: rounded, as in the reference.
    stream = (f + step).to(x.dtype.element_ty)
    tl.store(x + row + offsets, stream, mask=inside)
    f = stream.to(tl.float32)
    normed = f * tl.rsqrt(tl.sum(f * f, axis=0) / width + eps)
    if MODULATED:
        weight = 1.0 + tl.load(scale + offsets, mask=inside, other=0.0)
        normed = normed * weight + tl.load(shift + offsets, mask=inside, other=0.0)
    tl.store(out + row + offsets, narrow(normed, inverse, out.dtype.element_ty), mask=inside)


def gated_residual(x: Tensor, update: Tensor, gate: Tensor | None = None) -> None:
    """x (M,D) += update (M,D) * gate (D,) float32 where given; added in float32, rounded once.

    Raises ValueError where shapes do not fit.
    """
    rows, width = _check(x, update, gate)
    block = min(RESIDUAL_BLOCK, next_power_of_2(width))
    grid = (rows, cdiv(width, block))
    _gated_residual[grid](x, update, gate, width, GATED=gate is not None, BLOCK=block, num_warps=row_warps(block))


def gated_residual_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    eps: float = 1e-6,
    inverse: float = 1.0,
) -> None:
    """`gated_residual`, then out (M,D) = `rms_norm` of the new x, in one pass over the row.

    gate, scale, shift are (D,) float32 or None (scale and shift together). `out` in E4M3 holds the result times
    `inverse`, saturated. Raises ValueError where shapes do not fit.
    """
    rows, width = _check_norm(x, update, gate, scale, shift, out)
    check_inverse(out, inverse)
    block = next_power_of_2(width)
    _gated_residual_norm[(rows,)](
        x,
        update,
        gate,
        scale,
        shift,
        out,
        width,
        eps,
        inverse,
        GATED=gate is not None,
        MODULATED=scale is not None,
        BLOCK=block,
        **options(x, row_warps(block)),
    )
