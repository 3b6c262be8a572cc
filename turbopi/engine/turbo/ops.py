"""The operations that the turbo engine is put together from: GPU kernels, or their plain-torch twins.

The assembly is the same for both, so that it is tested on a CPU in float32 against the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import kernels
from .fp8_ops import (
    FEW_ROWS,
    fp8_geglu_matmul,
    fp8_gelu_matmul,
    fp8_matmul,
    fp8_sums,
    twin_fp8_geglu_matmul,
    twin_fp8_gelu_matmul,
    twin_fp8_matmul,
    twin_fp8_sums,
)

Activation = Literal["none", "gelu"]
TWINS = "twins"


@dataclass(frozen=True)
class Ops:
    """A table of operations. Those without a note are of `turbopi.kernels`, with their arguments.

    Attributes:
        matmul: (x (M,K), weight (N,K), out (M,N), bias, activation, residual) -> None; see `cublas_matmul`.
        wide_matmul: (x (M,K), weight (N,K), out (M,N) float32) -> None; see `cublas_wide_matmul`.
        geglu_matmul: (x (M,K), weight (2F,K), gate_up (M,2F) scratch, out (M,F), inverse) -> None.
        fp8_matmul, fp8_sums, fp8_gelu_matmul, fp8_geglu_matmul: of `fp8_ops`, with an `Fp8Weight`.
        vision_attention: (qkv (n·S,3·W), out (n·S,W), heads, rows_per_image, inverse, early) -> attended (n·S,W), in
            `out` or elsewhere; in E4M3 always in `out`.
        early_norm: (x (M,D), out (M,D) E4M3, *, inverse) -> None.
    """

    name: str
    matmul: Callable[..., None]
    geglu_matmul: Callable[..., None]
    tiled_geglu: Callable[..., None]
    tiled_linear: Callable[..., None]
    wide_matmul: Callable[..., None]
    fp8_matmul: Callable[..., None]
    fp8_sums: Callable[..., None]
    fp8_gelu_matmul: Callable[..., None]
    fp8_geglu_matmul: Callable[..., None]
    gelu: Callable[..., None]
    vision_attention: Callable[..., Tensor]
    patches: Callable[..., None]
    embed_tokens: Callable[..., None]
    layer_norm: Callable[..., None]
    early_norm: Callable[..., None]
    residual_layer_norm: Callable[..., None]
    rms_norm: Callable[..., None]
    gated_residual_norm: Callable[..., None]
    rotate_and_store: Callable[..., None]
    attention: Callable[..., None]
    attention_split: Callable[..., None]
    row_qkv: Callable[..., None]
    row_attention: Callable[..., None]
    row_parts: Callable[..., None]
    row_sum_norm: Callable[..., None]
    row_geglu: Callable[..., None]
    row_step: Callable[..., None]
    action_in: Callable[..., None]
    action_out: Callable[..., None]


def sdpa_vision_attention(
    qkv: Tensor, out: Tensor, heads: int, rows_per_image: int, inverse: float = 1.0, early: bool = False
) -> Tensor:
    """Attention of each image's rows among themselves, through torch's fused kernels, which make their own output.

    qkv (n·S,3·W) holds q, k, v one after the other, q scaled by head_dim^-0.5. Only E4M3 is written to `out`. `early`
    changes nothing here.
    """
    q, k, v = qkv.view(-1, rows_per_image, 3, heads, out.shape[1] // heads).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    rows = attended.transpose(1, 2).reshape(out.shape)
    if out.dtype != kernels.E4M3:
        return rows
    kernels.store_ref(rows.float(), out, inverse)
    return out


def kernel_vision_attention(
    qkv: Tensor, out: Tensor, heads: int, rows_per_image: int, inverse: float = 1.0, early: bool = False
) -> Tensor:
    """`sdpa_vision_attention` through kernels that read q, k and v where they stand; written to out.

    By `kernels.vision_attention` where that runs and the tuned file of the GPU names it, else by Triton's, never early.
    """
    named = kernels.vision_attention_named(qkv)
    if named and not kernels.vision_attention_obstacles(qkv, out, heads, rows_per_image):
        kernels.vision_attention(qkv, out, heads, rows_per_image, inverse, early)
        return out
    _, k, v = qkv.view(-1, rows_per_image, 3, heads, out.shape[1] // heads).permute(2, 0, 3, 1, 4)
    kernels.attention(qkv[:, : out.shape[1]], k, v, None, out, rows_per_image, inverse=inverse)
    return out


def cache_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    rows_per_sample: int,
    extra: int = 0,
    state_token: bool = False,
    scale: float = 1.0,
    inverse: float = 1.0,
) -> None:
    """`kernels.attention`, by `kernels.prefix_attention` where that runs and the tuned file of the GPU names it."""
    head_dim = keys.shape[3]
    rows = rows_per_sample * q.shape[1] // head_dim
    named = kernels.prefix_attention_config(q, rows, head_dim) is not None
    all_alike = not extra and not state_token
    if named and all_alike and not kernels.prefix_attention_obstacles(q, keys, values, lengths, out):
        kernels.prefix_attention(q, keys, values, lengths, out, rows_per_sample, scale, inverse=inverse)
    else:
        kernels.attention(q, keys, values, lengths, out, rows_per_sample, extra, state_token, scale, inverse=inverse)


def twin_matmul(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> None:
    """Twin of `cublas_matmul`."""
    kernels.linear_ref(x, weight, out, bias=bias, activation=activation, residual=residual)


def cublas_matmul(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> None:
    """out (M,N) = activation(x (M,K) · weight (N,K)ᵀ + bias (N,)) + residual (M,N); `residual` may be `out`.

    By the library where it has the epilogue (a bias, a bias with tanh-GELU, an addend), else by the Triton product.
    """
    if activation == "gelu" and bias is not None and residual is None and out.dtype != torch.float32:
        torch._addmm_activation(bias, x, weight.t(), use_gelu=True, out=out)
        return
    addend = residual if bias is None else bias
    if activation == "gelu" or (bias is not None and residual is not None):
        kernels.linear(x, weight, out, bias=bias, activation=activation, residual=residual)
    elif addend is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(addend, x, weight.t(), out=out)


def cublas_wide_matmul(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (M,N) float32 = x (M,K) · weight (N,K)ᵀ in bfloat16, never rounded to it."""
    torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)


def geglu_matmul(x: Tensor, weight: Tensor, gate_up: Tensor, out: Tensor, inverse: float = 1.0) -> None:
    """out (M,F) = tanh-GELU(x · gateᵀ) * (x · upᵀ), weight (2F,K) holding gate, then up; gate_up (M,2F) is scratch.

    `out` in E4M3 holds it times `inverse`.
    """
    if len(x) <= FEW_ROWS:
        # One fused kernel beats a product and a pass over its result.
        kernels.geglu_linear(x, weight, out, inverse=inverse)
        return
    torch.mm(x, weight.t(), out=gate_up)
    kernels.geglu(gate_up, out, inverse)


def twin_geglu_matmul(x: Tensor, weight: Tensor, gate_up: Tensor, out: Tensor, inverse: float = 1.0) -> None:
    """Twin of `geglu_matmul`."""
    torch.mm(x, weight.t(), out=gate_up)
    kernels.geglu_ref(gate_up, out, inverse)


def triton_ops() -> Ops:
    """cuBLAS for the large products, Triton for the rest."""
    return Ops(
        name="cublas+triton",
        matmul=cublas_matmul,
        geglu_matmul=geglu_matmul,
        tiled_geglu=kernels.tiled_geglu,
        tiled_linear=kernels.tiled_linear,
        wide_matmul=cublas_wide_matmul,
        fp8_matmul=fp8_matmul,
        fp8_sums=fp8_sums,
        fp8_gelu_matmul=fp8_gelu_matmul,
        fp8_geglu_matmul=fp8_geglu_matmul,
        gelu=kernels.gelu,
        vision_attention=kernel_vision_attention,
        patches=kernels.patches,
        embed_tokens=kernels.embed_tokens,
        layer_norm=kernels.layer_norm,
        early_norm=kernels.early_norm,
        residual_layer_norm=kernels.residual_layer_norm,
        rms_norm=kernels.rms_norm,
        gated_residual_norm=kernels.gated_residual_norm,
        rotate_and_store=kernels.rotate_and_store,
        attention=cache_attention,
        attention_split=kernels.attention_split,
        row_qkv=kernels.row_qkv,
        row_attention=kernels.row_attention,
        row_parts=kernels.row_parts,
        row_sum_norm=kernels.row_sum_norm,
        row_geglu=kernels.row_geglu,
        row_step=kernels.row_step,
        action_in=kernels.action_in,
        action_out=kernels.action_out,
    )


def twin_ops() -> Ops:
    """Plain torch, any device: for tests, and for finding out which kernel is wrong."""
    return Ops(
        name=TWINS,
        matmul=twin_matmul,
        geglu_matmul=twin_geglu_matmul,
        tiled_geglu=kernels.tiled_geglu_ref,
        tiled_linear=kernels.tiled_linear_ref,
        wide_matmul=kernels.linear_ref,
        fp8_matmul=twin_fp8_matmul,
        fp8_sums=twin_fp8_sums,
        fp8_gelu_matmul=twin_fp8_gelu_matmul,
        fp8_geglu_matmul=twin_fp8_geglu_matmul,
        gelu=kernels.gelu_ref,
        vision_attention=sdpa_vision_attention,
        patches=kernels.patches_ref,
        embed_tokens=kernels.embed_tokens_ref,
        layer_norm=kernels.layer_norm_ref,
        early_norm=kernels.layer_norm_ref,
        residual_layer_norm=kernels.residual_layer_norm_ref,
        rms_norm=kernels.rms_norm_ref,
        gated_residual_norm=kernels.gated_residual_norm_ref,
        rotate_and_store=kernels.rotate_and_store_ref,
        attention=kernels.attention_ref,
        attention_split=kernels.attention_split_ref,
        row_qkv=kernels.row_qkv_ref,
        row_attention=kernels.row_attention_ref,
        row_parts=kernels.row_parts_ref,
        row_sum_norm=kernels.row_sum_norm_ref,
        row_geglu=kernels.row_geglu_ref,
        row_step=kernels.row_step_ref,
        action_in=kernels.action_in_ref,
        action_out=kernels.action_out_ref,
    )
