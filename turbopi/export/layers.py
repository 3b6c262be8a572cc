"""The layers that the stages are made of, in ONNX operators, in the order of the reference's own operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch

from ..config import GemmaConfig
from ..model.gemma import HIDDEN_LOGIT, RMS_EPS, RotaryEmbedding
from ..model.siglip import LAYER_NORM_EPS
from .writer import GraphWriter

AttentionForm = Literal["explicit", "fused"]
"""MatMul, Softmax, MatMul, or the one operator that opset 23 has for them."""


def linear(w: GraphWriter, x: ir.Value, parts: Sequence[str], *, bias: bool, product: str | None = None) -> ir.Value:
    """x Wᵀ + b of several linears over one input, stacked into one product: x (..., in) -> (..., sum of their out).

    Writes the checkpoint's own (out, in) weights, stacked and transposed by nodes that folding takes away.
    """
    name = product or parts[0]

    def stacked(leaf: str) -> ir.Value:
        return w.concat([w.parameter(f"{part}.{leaf}") for part in parts], axis=0)

    weight = w.shared(f"{name}.weight.transposed", lambda: w.transpose(stacked("weight"), 1, 0))
    y = w.op("MatMul", x, weight, name="product", product=product)
    if not bias:
        return y
    return w.op("Add", y, w.shared(f"{name}.bias.stacked", lambda: stacked("bias")), name="biased")


def layer_norm(w: GraphWriter, x: ir.Value, name: str) -> ir.Value:
    """SigLIP's LayerNorm, in float32."""
    with w.island("float32"):
        weight, bias = w.parameter(f"{name}.weight"), w.parameter(f"{name}.bias")
        return w.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=LAYER_NORM_EPS, name="norm")


@dataclass(frozen=True)
class Modulation:
    """What an adaRMS norm does at one step, all constants: scale already has its 1 added, gate is the residual's."""

    scale: ir.Value
    shift: ir.Value
    gate: ir.Value


def rms_norm(w: GraphWriter, x: ir.Value, by: str | Modulation) -> ir.Value:
    """RMSNorm by the weight of that name, or modulated; in float32."""
    with w.island("float32"), w.scope("norm"):
        square = w.op("Pow", x, w.constant(2.0))
        mean = w.op("ReduceMean", square, w.integers(-1), keepdims=1)
        normed = w.op("Div", x, w.op("Sqrt", w.op("Add", mean, w.constant(RMS_EPS))))
        if isinstance(by, str):
            parameter = w.parameter(f"{by}.weight")
            return w.op("Mul", normed, w.shared(f"{by}.scale", lambda: w.op("Add", parameter, w.constant(1.0))))
        return w.op("Add", w.op("Mul", normed, by.scale), by.shift)


def rope_tables(head_dim: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (positions, head_dim) float32, the sign of the half rotation in the sines.

    Computed by the reference, angles in float32.
    """
    cos, sin = RotaryEmbedding(head_dim, bf16_frequencies=False)(torch.arange(positions)[None], torch.float32)
    sign = torch.ones(head_dim)
    sign[: head_dim // 2] = -1.0
    return cos[0, 0].numpy(), (sin[0, 0] * sign).numpy()


def rotate(w: GraphWriter, x: ir.Value, cos: ir.Value, sin: ir.Value, head_dim: int) -> ir.Value:
    """Rotary positions of x (..., head_dim), in float32."""
    with w.island("float32"), w.scope("rope"):
        first, second = w.split(x, (head_dim // 2, head_dim // 2), axis=-1)
        swapped = w.concat((second, first), axis=-1)
        return w.op("Add", w.op("Mul", x, cos), w.op("Mul", swapped, sin))


def softmax_attention(
    w: GraphWriter,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    scale: float,
    mask: ir.Value | None,
    form: AttentionForm,
) -> ir.Value:
    """q (B,heads,Q,d) over k, v (B,heads,K,d), and what `attention_mask` gives -> (B,heads,Q,d); softmax in float32."""
    with w.scope("attention"):
        if form == "fused":
            with w.island("product"):
                precision = int(ir.DataType.FLOAT)
                return w.op("Attention", q, k, v, mask, scale=scale, softmax_precision=precision)
        with w.island("product"):
            logits = w.op("MatMul", q, w.transpose(k, 0, 1, 3, 2), name="logits")
        with w.island("float32"):
            logits = w.op("Mul", logits, w.constant(scale), name="scaled")
            if mask is not None:
                logits = w.op("Add", logits, mask, name="masked")
            weights = w.op("Softmax", logits, axis=-1, name="weights")
        with w.island("product"):
            return w.op("MatMul", weights, v, name="mixed")


@dataclass(frozen=True)
class Heads:
    """Of a Gemma layer: q (1,kv_heads,N·group,head_dim) or None, k and v (1,kv_heads,N,head_dim)."""

    q: ir.Value | None
    k: ir.Value
    v: ir.Value


@dataclass(frozen=True)
class Rotary:
    """Cosines and signed sines (1,N,1,head_dim) of N tokens."""

    cos: ir.Value
    sin: ir.Value
    tokens: int


def gemma_heads(
    w: GraphWriter,
    config: GemmaConfig,
    normed: ir.Value,
    layer: str,
    product: str,
    rotary: Rotary,
    queries: bool = True,
) -> Heads:
    """Rotated heads of normed (1,N,width), by one stacked product; without queries only keys and values.

    `layer` is the reference's name of the block. The queries of a group lie beside each other, token by token.
    """
    d, kv, n = config.head_dim, config.kv_heads, rotary.tokens
    asked = config.heads if queries else 0
    parts = [f"{layer}.self_attn.{part}_proj" for part in ("qkv" if queries else "kv")]
    with w.scope("qkv"), w.island("product"):
        stacked = linear(w, normed, parts, bias=False, product=f"{product}.qkv")
    turning, v = w.split(w.reshape(stacked, 1, n, asked + 2 * kv, d), (asked + kv, kv), axis=2)
    turned = rotate(w, turning, rotary.cos, rotary.sin, d)
    q, k = w.split(turned, (asked, kv), axis=2) if queries else (None, turned)
    if q is not None:
        group = config.heads // kv
        # With one key head the order of tokens and heads is that of memory: no transposing.
        q = q if kv == 1 else w.transpose(w.reshape(q, 1, n, kv, group, d), 0, 2, 1, 3, 4)
        q = w.reshape(q, 1, kv, n * group, d)
    if kv == 1:
        return Heads(q, w.reshape(k, 1, 1, n, d), w.reshape(v, 1, 1, n, d))
    return Heads(q, w.transpose(k, 0, 2, 1, 3), w.transpose(v, 0, 2, 1, 3))


def gemma_merge(w: GraphWriter, config: GemmaConfig, mixed: ir.Value, n: int) -> ir.Value:
    """(1,kv_heads,N·group,d) -> (1,N,heads·d)."""
    d, kv, group = config.head_dim, config.kv_heads, config.heads // config.kv_heads
    if kv > 1:
        mixed = w.transpose(w.reshape(mixed, 1, kv, n, group, d), 0, 2, 1, 3, 4)
    return w.reshape(mixed, 1, n, config.heads * d)


def gemma_mlp(w: GraphWriter, config: GemmaConfig, x: ir.Value, name: str, product: str) -> ir.Value:
    """The gated MLP of x (1,N,width), gate and up stacked into one product; `product` names the layer."""
    with w.scope("mlp"), w.island("product"):
        with w.scope("gate_up"):
            stacked = linear(w, x, [f"{name}.gate_proj", f"{name}.up_proj"], bias=False, product=f"{product}.gate_up")
        gate, up = w.split(stacked, (config.mlp_dim, config.mlp_dim), axis=-1)
        hidden = w.op("Mul", w.op("Gelu", gate, approximate="tanh"), up, name="hidden")
        with w.scope("down"):
            return linear(w, hidden, [f"{name}.down_proj"], bias=False, product=f"{product}.down")


def gated_residual(w: GraphWriter, x: ir.Value, update: ir.Value, gate: ir.Value | None) -> ir.Value:
    """x + update, the update first scaled by the gate where there is one."""
    with w.island("stream"):
        return w.op("Add", x, update if gate is None else w.op("Mul", update, gate, name="gated"), name="residual")


def visible_prefix(w: GraphWriter, slots: int, length: ir.Value, more: int = 0) -> ir.Value:
    """(1,1,1,slots+more) float32 for the logits: 0 for the first `length` slots and the `more` behind them all."""
    with w.island("shape"), w.scope("visible"):
        inside = w.op("Less", w.constant(np.arange(slots), np.int64), length)
        bias = w.op("Where", inside, w.constant(0.0), w.constant(HIDDEN_LOGIT))
        if more:
            bias = w.concat((bias, w.constant(np.zeros(more))), axis=0)
        return w.reshape(bias, 1, 1, 1, slots + more)


def attention_mask(w: GraphWriter, bias: ir.Value, queries: int, keys: int, form: AttentionForm) -> ir.Value:
    """What attention takes of a (1,1,1 or queries,keys) bias: itself, or (1,1,queries,keys) bool, True where visible.

    The fused operator may run in a type that cannot hold the bias.
    """
    if form == "explicit":
        return bias
    full = w.op("Expand", bias, w.integers(1, 1, queries, keys))
    return w.op("GreaterOrEqual", full, w.constant(0.0), name="mask")
