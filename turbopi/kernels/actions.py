"""Noisy actions into the suffix and velocities out of it, in float32 (SPEC 1.4 and 1.5)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import cdiv, dense, next_power_of_2, vector
from ._triton import tl, triton

Activation = Literal["none", "silu"]


def _check(
    name: str, tokens: Tensor, x_t: Tensor, bias_width: int, bias: Tensor, horizon: int | None
) -> tuple[int, int]:
    """Actions and suffix tokens of one sample."""
    actions, _ = dense("x_t", x_t)
    rows, _ = dense(name, tokens)
    vector("bias", bias, bias_width)
    if x_t.dtype != torch.float32:
        raise ValueError(f"x_t is {x_t.dtype}, expected float32")
    if horizon is None:
        horizon = actions
    if horizon < 1 or actions % horizon or rows % (actions // horizon) or rows < actions:
        raise ValueError(
            f"{name} has {rows} rows for {actions} actions in chunks of {horizon}: expected a sample of at least as "
            "many rows for each chunk"
        )
    return horizon, rows // (actions // horizon)


def _check_in(
    x_t: Tensor, weight: Tensor, bias: Tensor, out: Tensor, horizon: int | None, activation: str
) -> tuple[int, int]:
    dense("weight", weight, out.shape[-1], x_t.shape[-1])
    if activation not in get_args(Activation):
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(get_args(Activation))}")
    return _check("out", out, x_t, weight.shape[0], bias, horizon)


def _check_out(out_norm: Tensor, weight: Tensor, bias: Tensor, x_t: Tensor, horizon: int | None) -> tuple[int, int]:
    dense("weight", weight, x_t.shape[-1], out_norm.shape[-1])
    return _check("out_norm", out_norm, x_t, weight.shape[0], bias, horizon)


def action_in_ref(
    x_t: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    horizon: int | None = None,
    activation: Activation = "none",
) -> None:
    """Twin of `action_in`."""
    horizon, tokens = _check_in(x_t, weight, bias, out, horizon, activation)
    y = F.linear(x_t, weight, bias)
    if activation == "silu":
        y = F.silu(y)
    out.unflatten(0, (-1, tokens))[:, tokens - horizon :] = y.unflatten(0, (-1, horizon)).to(out.dtype)


def action_out_ref(out_norm: Tensor, weight: Tensor, bias: Tensor, x_t: Tensor, horizon: int | None = None) -> None:
    """Twin of `action_out`."""
    horizon, tokens = _check_out(out_norm, weight, bias, x_t, horizon)
    actions = out_norm.unflatten(0, (-1, tokens))[:, tokens - horizon :].flatten(0, 1)
    x_t += F.linear(actions.float(), weight, bias)


@triton.jit
def _action_in(
    x_t,
    weight,
    bias,
    out,
    actions_per_sample,
    tokens_per_sample,
    width,
    ACTION_DIM: tl.constexpr,
    BLOCK_ACTION: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SILU: tl.constexpr,
):
    action = tl.program_id(0)
    sample = action // actions_per_sample
    token = sample * tokens_per_sample + tokens_per_sample - actions_per_sample + action % actions_per_sample
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    dims = tl.arange(0, BLOCK_ACTION)
    real = dims < ACTION_DIM
    x = tl.load(x_t + action * ACTION_DIM + dims, mask=real, other=0.0)
    w = tl.load(
        weight + columns[:, None] * ACTION_DIM + dims[None, :],
        mask=(columns < width)[:, None] & real[None, :],
        other=0.0,
    )
    y = tl.sum(w * x[None, :], axis=1) + tl.load(bias + columns, mask=columns < width, other=0.0)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + token.to(tl.int64) * width + columns, y.to(out.dtype.element_ty), mask=columns < width)


@triton.jit
def _action_out(
    out_norm,
    weight,
    bias,
    x_t,
    actions_per_sample,
    tokens_per_sample,
    width,
    ACTION_DIM: tl.constexpr,
    BLOCK_ACTION: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    action = tl.program_id(0)
    sample = action // actions_per_sample
    token = sample * tokens_per_sample + tokens_per_sample - actions_per_sample + action % actions_per_sample
    dims = tl.program_id(1) * BLOCK_ACTION + tl.arange(0, BLOCK_ACTION)
    real = dims < ACTION_DIM
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = columns < width
    h = tl.load(out_norm + token.to(tl.int64) * width + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + dims[:, None] * width + columns[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    y = tl.sum(w * h[None, :], axis=1) + tl.load(bias + dims, mask=real, other=0.0)
    target = x_t + action * ACTION_DIM + dims
    tl.store(target, tl.load(target, mask=real, other=0.0) + y, mask=real)


def action_in(
    x_t: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    horizon: int | None = None,
    activation: Activation = "none",
) -> None:
    """x_t (B*H, A) float32 -> out rows: activation(x_t weight^T + bias), in float32, rounded to out's dtype.

    weight (W, A) and bias (W,) float32. `horizon` H actions are the last H of each sample's rows of out (B*N, W);
    rows before them (π0's state token) are left alone. None: one sample. Raises ValueError where shapes do not fit.
    """
    horizon, tokens = _check_in(x_t, weight, bias, out, horizon, activation)
    actions, action_dim = x_t.shape
    width = out.shape[1]
    block = min(128, next_power_of_2(width))
    _action_in[(actions, cdiv(width, block))](
        x_t,
        weight,
        bias,
        out,
        horizon,
        tokens,
        width,
        ACTION_DIM=action_dim,
        BLOCK_ACTION=next_power_of_2(action_dim),
        BLOCK_WIDTH=block,
        SILU=activation == "silu",
        num_warps=4,
    )


def action_out(out_norm: Tensor, weight: Tensor, bias: Tensor, x_t: Tensor, horizon: int | None = None) -> None:
    """x_t (B*H, A) float32 += out_norm weight^T + bias, in float32: one Euler step.

    weight (A, W) and bias (A,) float32 carry the factor -1/steps. Of out_norm (B*N, W) the last `horizon` rows of each
    sample are read; None: one sample. Raises ValueError where shapes do not fit.
    """
    horizon, tokens = _check_out(out_norm, weight, bias, x_t, horizon)
    actions, action_dim = x_t.shape
    width = out_norm.shape[1]
    block_width = next_power_of_2(width)
    # About 8192 weights a program: enough programs for the GPU, few enough registers a thread.
    block = max(1, min(next_power_of_2(action_dim), 8192 // block_width))
    _action_out[(actions, cdiv(action_dim, block))](
        out_norm,
        weight,
        bias,
        x_t,
        horizon,
        tokens,
        width,
        ACTION_DIM=action_dim,
        BLOCK_ACTION=block,
        BLOCK_WIDTH=block_width,
        num_warps=4,
    )
