"""RMSNorm, plain or adaptive. A plain norm's weight is folded into the product that follows (SPEC 1.3)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from ._common import dense, next_power_of_2, row_warps, vector
from ._fp8 import check_inverse, narrow, store_ref
from ._triton import tl, triton


def _check(x: Tensor, out: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[int, int]:
    rows, width = dense("x", x)
    dense("out", out, rows, width)
    vector("scale", scale, width)
    vector("shift", shift, width)
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift make one modulation: give both or neither")
    return rows, width


def rms_norm_ref(
    x: Tensor,
    out: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    inverse: float = 1.0,
) -> None:
    """Twin of `rms_norm`."""
    _check(x, out, scale, shift)
    f = x.float()
    normed = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)
    store_ref(normed if scale is None or shift is None else normed * (1 + scale) + shift, out, inverse)


@triton.jit
def _rms_norm(x, out, scale, shift, width, eps, inverse, MODULATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    offsets = tl.arange(0, BLOCK)
    inside = offsets < width
    f = tl.load(x + row + offsets, mask=inside, other=0.0).to(tl.float32)
    normed = f * tl.rsqrt(tl.sum(f * f, axis=0) / width + eps)
    if MODULATED:
        weight = 1.0 + tl.load(scale + offsets, mask=inside, other=0.0)
        normed = normed * weight + tl.load(shift + offsets, mask=inside, other=0.0)
    tl.store(out + row + offsets, narrow(normed, inverse, out.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor,
    out: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    inverse: float = 1.0,
) -> None:
    """x (M,D) -> out (M,D): x * rsqrt(mean x² + eps), then * (1 + scale) + shift where given, in float32.

    scale and shift are (D,) float32, both or neither. `out` may be `x`; in E4M3 it holds the result times `inverse`,
    saturated. Raises ValueError where shapes do not fit.
    """
    rows, width = _check(x, out, scale, shift)
    check_inverse(out, inverse)
    block = next_power_of_2(width)
    _rms_norm[(rows,)](
        x, out, scale, shift, width, eps, inverse, MODULATED=scale is not None, BLOCK=block, num_warps=row_warps(block)
    )
