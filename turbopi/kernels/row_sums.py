"""The parts of a split product onto the residual stream, gated, and the norm that follows, in one pass over a row."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from torch import Tensor

from ._common import dense, next_power_of_2, planes, vector
from ._dependent import after_the_last, options
from ._fp8 import E4M3, check_inverse, narrow
from ._triton import tl, triton
from .rms_norm import rms_norm_ref

WARPS = 8
"""Of a program, which has one row."""


def _check(
    parts: Tensor, x: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, out: Tensor
) -> tuple[int, int]:
    rows, width = dense("x", x)
    dense("out", out, rows, width)
    planes("parts", parts, rows, width)
    for name, t in (("gate", gate), ("scale", scale), ("shift", shift)):
        vector(name, t, width)
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift make one modulation: give both or neither")
    return rows, width


def row_sum_norm_ref(
    parts: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    eps: float = 1e-6,
    inverse: float = 1.0,
) -> None:
    """Twin of `row_sum_norm`."""
    _check(parts, x, gate, scale, shift, out)
    update = parts.sum(0)
    x.copy_(x.float() + (update if gate is None else update * gate))
    rms_norm_ref(x, out, scale, shift, eps, inverse)


@triton.jit
def _row_sum_norm(
    parts, x, gate, scale, shift, out, rows, width, eps, inverse, SPLITS: tl.constexpr,
    GATED: tl.constexpr, MODULATED: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < width
    # Of the schedule, which no kernel writes: read while the product is still at work.
    if GATED:
        factor = tl.load(gate + offsets, mask=inside, other=0.0)
    if MODULATED:
        weight = 1.0 + tl.load(scale + offsets, mask=inside, other=0.0)
        bias = tl.load(shift + offsets, mask=inside, other=0.0)
    after_the_last(DEPENDENT, EARLY)
    f = tl.load(x + row * width + offsets, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(parts + row * width + offsets, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        plane = parts + tl.cast(split, tl.int64) * rows * width
        update += tl.load(plane + row * width + offsets, mask=inside, other=0.0)
    if GATED:
        update *= factor
    # The norm reads what the stream holds: rounded, as in the reference.
    stream = (f + update).to(x.dtype.element_ty)
    tl.store(x + row * width + offsets, stream, mask=inside)
    f = stream.to(tl.float32)
    normed = f * tl.rsqrt(tl.sum(f * f, axis=0) / width + eps)
    if MODULATED:
        normed = normed * weight + bias
    tl.store(out + row * width + offsets, narrow(normed, inverse, out.dtype.element_ty), mask=inside)


def row_sum_norm(
    parts: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    eps: float = 1e-6,
    inverse: float = 1.0,
) -> None:
    """x (M,D) += gate (D,) * the sum of parts (S,M,D) float32, in the order of S; then out (M,D) = `rms_norm` of x.

    gate, scale, shift are float32 or None (scale and shift together). `out` in E4M3 holds the norm times `inverse`,
    saturated. Raises ValueError where shapes do not fit.
    """
    rows, width = _check(parts, x, gate, scale, shift, out)
    check_inverse(out, inverse)
    _row_sum_norm[(rows,)](
        parts,
        x,
        gate,
        scale,
        shift,
        out,
        rows,
        width,
        eps,
        inverse,
        SPLITS=len(parts),
        GATED=gate is not None,
        MODULATED=scale is not None,
        BLOCK=next_power_of_2(width),
        # A product in E4M3 asks for half the weights ahead: in bfloat16 it would be in the way of the one before.
        EARLY=out.dtype == E4M3,
        **options(x, WARPS),
    )
