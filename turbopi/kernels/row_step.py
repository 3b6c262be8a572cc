"""From the end of one Euler step to the layers of the next, a row of actions in one program (SPEC 1.4 and 1.5)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from ._common import dense, next_power_of_2, vector
from ._dependent import after_the_last, options
from ._fp8 import check_inverse, narrow
from ._triton import tl, triton
from .actions import action_in_ref, action_out_ref
from .rms_norm import rms_norm_ref

WARPS = 16
MOST_WEIGHTS = 32 << 10
"""Of a projection, which a program holds in its registers."""


def step_misfits(width: int, action_dim: int) -> list[str]:
    """Why `row_step` does not run in such a model; empty if it does."""
    weights = next_power_of_2(width) * next_power_of_2(action_dim)
    return [] if weights <= MOST_WEIGHTS else [f"projections of {weights} weights, more than {MOST_WEIGHTS}"]


def _check(
    out_norm: Tensor,
    outward: tuple[Tensor, Tensor],
    x_t: Tensor,
    inward: tuple[Tensor, Tensor],
    x: Tensor,
    modulation: tuple[Tensor, Tensor] | None,
    normed: Tensor,
) -> tuple[int, int, int]:
    rows, width = dense("out_norm", out_norm)
    _, action_dim = dense("x_t", x_t, rows)
    for name, t in (("x", x), ("normed", normed)):
        dense(name, t, rows, width)
    dense("the weight of outward", outward[0], action_dim, width)
    dense("the weight of inward", inward[0], width, action_dim)
    vector("the bias of outward", outward[1], action_dim)
    vector("the bias of inward", inward[1], width)
    for name, t in zip(("scale", "shift"), modulation or (), strict=False):
        vector(name, t, width)
    if x_t.dtype != torch.float32:
        raise ValueError(f"x_t is {x_t.dtype}, expected float32")
    return rows, width, action_dim


def row_step_ref(
    out_norm: Tensor,
    outward: tuple[Tensor, Tensor],
    x_t: Tensor,
    inward: tuple[Tensor, Tensor],
    x: Tensor,
    modulation: tuple[Tensor, Tensor] | None,
    normed: Tensor,
    eps: float = 1e-6,
    inverse: float = 1.0,
) -> None:
    """Twin of `row_step`."""
    _check(out_norm, outward, x_t, inward, x, modulation, normed)
    action_out_ref(out_norm, *outward, x_t)
    action_in_ref(x_t, *inward, x)
    scale, shift = modulation or (None, None)
    rms_norm_ref(x, normed, scale, shift, eps, inverse)


@triton.jit
def _row_step(
    out_norm, out_weight, out_bias, x_t, in_weight, in_bias, x, scale, shift, normed, width, eps, inverse,
    ACTION_DIM: tl.constexpr, BLOCK_ACTION: tl.constexpr, BLOCK: tl.constexpr, MODULATED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dims, columns = tl.arange(0, BLOCK_ACTION), tl.arange(0, BLOCK)
    real, inside = dims < ACTION_DIM, columns < width
    # Of the schedule, which no kernel writes: on its way while the layers end.
    w = tl.load(out_weight + dims[:, None] * width + columns[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    after_the_last(DEPENDENT)
    h = tl.load(out_norm + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    target = x_t + row * ACTION_DIM + dims
    moved = tl.load(target, mask=real, other=0.0) + tl.load(out_bias + dims, mask=real, other=0.0)
    inward = in_weight + columns[:, None] * ACTION_DIM + dims[None, :]
    v = tl.load(inward, mask=inside[:, None] & real[None, :], other=0.0)
    moved += tl.sum(w * h[None, :], axis=1)
    tl.store(target, moved, mask=real)
    f = tl.sum(v * moved[None, :], axis=1) + tl.load(in_bias + columns, mask=inside, other=0.0)
    # The norm reads what the stream holds: rounded, as in the reference.
    stream = f.to(x.dtype.element_ty)
    tl.store(x + row * width + columns, stream, mask=inside)
    f = tl.where(inside, stream.to(tl.float32), 0.0)
    y = f * tl.rsqrt(tl.sum(f * f, axis=0) / width + eps)
    if MODULATED:
        weight = 1.0 + tl.load(scale + columns, mask=inside, other=0.0)
        y = y * weight + tl.load(shift + columns, mask=inside, other=0.0)
    tl.store(normed + row * width + columns, narrow(y, inverse, normed.dtype.element_ty), mask=inside)


def row_step(
    out_norm: Tensor,
    outward: tuple[Tensor, Tensor],
    x_t: Tensor,
    inward: tuple[Tensor, Tensor],
    x: Tensor,
    modulation: tuple[Tensor, Tensor] | None,
    normed: Tensor,
    eps: float = 1e-6,
    inverse: float = 1.0,
) -> None:
    """`action_out`, `action_in` and `rms_norm` in a row, where each row of the suffix is an action.

    x_t (M,A) float32 += out_norm (M,W) times `outward`, weight (A,W) and bias (A,); x (M,W) = x_t times `inward`,
    weight (W,A) and bias (W,); normed (M,W) = the norm of x, times 1 + scale, plus shift, the `modulation`, (W,) each.
    Projections and modulation are float32. `normed` in E4M3 holds the norm times `inverse`, saturated.

    Raises ValueError where shapes do not fit, and for what `step_misfits` names.
    """
    rows, width, action_dim = _check(out_norm, outward, x_t, inward, x, modulation, normed)
    check_inverse(normed, inverse)
    if found := step_misfits(width, action_dim):
        raise ValueError(f"the kernel between two steps cannot run: {'; '.join(found)}")
    _row_step[(rows,)](
        out_norm,
        *outward,
        x_t,
        *inward,
        x,
        *(modulation or (None, None)),
        normed,
        width,
        eps,
        inverse,
        ACTION_DIM=action_dim,
        BLOCK_ACTION=next_power_of_2(action_dim),
        BLOCK=next_power_of_2(width),
        MODULATED=modulation is not None,
        **options(x, WARPS),
    )
