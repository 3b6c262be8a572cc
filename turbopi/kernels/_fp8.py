"""The E4M3 format: what kernels store where their output has it, and the same in plain torch.

1 sign, 4 exponent and 3 mantissa bits: up to 448, relative steps of 1/8 to 1/16, steps of 2^-9 below 2^-6, no infinity.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def check_inverse(out: Tensor, inverse: float) -> None:
    """Raise ValueError where a factor is given for an output that is not quantised."""
    if inverse != 1.0 and out.dtype != E4M3:
        raise ValueError(f"inverse {inverse:g} belongs to an output in {E4M3}, out is {out.dtype}")


def store_ref(values: Tensor, out: Tensor, inverse: float = 1.0) -> None:
    """Twin of `narrow` and the store behind it: float32 values into `out` of any dtype and the same shape."""
    check_inverse(out, inverse)
    out.copy_((values * inverse).clamp(-E4M3_MAX, E4M3_MAX) if out.dtype == E4M3 else values)


@triton.jit
def narrow(values, inverse, dtype: tl.constexpr):
    """float32 to `dtype`; to E4M3 times `inverse` and saturated, NaN staying NaN."""
    if dtype == tl.float8e4nv:
        values = tl.clamp(values * inverse, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return values.to(dtype)
