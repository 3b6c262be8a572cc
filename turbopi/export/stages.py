"""The three stages of the reference as graphs of one observation, and all of them as one graph (SPEC 1.1 to 1.5).

Static shapes: `views` cameras that are there, `prompt` slots of which the first `prompt_length` are valid. Values are
named like the reference's taps, so that a graph can be held against it tap by tap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..config import ModelConfig
from ..model.gemma import HIDDEN_LOGIT
from .layers import (
    AttentionForm,
    Rotary,
    attention_mask,
    gated_residual,
    gemma_heads,
    gemma_merge,
    gemma_mlp,
    layer_norm,
    linear,
    rms_norm,
    rope_tables,
    softmax_attention,
    visible_prefix,
)
from .schedule import StepConstants, action_weight, step_constants
from .writer import GraphWriter

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@dataclass(frozen=True)
class GraphShape:
    """Static sizes of a graph.

    Attributes:
        views: cameras that are there.
        prompt: prompt slots.
        steps: flow-matching evaluations.
    """

    views: int
    prompt: int
    steps: int

    def prefix(self, config: ModelConfig) -> int:
        """Prefix slots, P."""
        return self.views * config.vision.tokens + self.prompt


@dataclass(frozen=True)
class CacheValues:
    """A PrefixCache within a graph: a (1,kv_heads,P,head_dim) key and value a layer, and its (1,) int64 length."""

    keys: tuple[ir.Value, ...]
    values: tuple[ir.Value, ...]
    length: ir.Value


def encode_images(w: GraphWriter, shape: GraphShape, images: ir.Value, form: AttentionForm) -> ir.Value:
    """Stage 1: images (V,3,S,S) float32 in [-1,1] -> image tokens (V,tokens,width)."""
    config = w.weights.config.vision
    n, heads, d = config.tokens, config.heads, config.width // config.heads
    with w.scope("vision"), w.island("float32"), w.scope("embeddings"):
        name = "vision.embeddings.patch_embedding"
        stride = [config.patch_size] * 2
        patches = w.op(
            "Conv",
            images,
            w.parameter(f"{name}.weight"),
            w.parameter(f"{name}.bias"),
            strides=stride,
            kernel_shape=stride,
        )
        rows = w.transpose(w.reshape(patches, shape.views, config.width, n), 0, 2, 1)
        x = w.op("Add", rows, w.parameter("vision.embeddings.position_embedding.weight"))
    x = w.tap("vision.embeddings", x)
    for layer in range(config.depth):
        name, product = f"vision.encoder.layers.{layer}", f"vision.layers.{layer}"
        with w.scope(product), w.island("product"):
            normed = layer_norm(w, x, f"{name}.layer_norm1")
            attention = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
            with w.scope("qkv"):
                stacked = linear(w, normed, attention, bias=True, product=f"{product}.qkv")
            apart = w.transpose(w.reshape(stacked, shape.views, n, 3 * heads, d), 0, 2, 1, 3)
            q, k, v = w.split(apart, (heads, heads, heads), axis=1)
            mixed = softmax_attention(w, q, k, v, d**-0.5, None, form)
            merged = w.reshape(w.transpose(mixed, 0, 2, 1, 3), shape.views, n, config.width)
            with w.scope("out"):
                out = linear(w, merged, [f"{name}.self_attn.out_proj"], bias=True, product=f"{product}.out")
            x = gated_residual(w, x, out, None)
            normed = layer_norm(w, x, f"{name}.layer_norm2")
            with w.scope("fc1"):
                hidden = linear(w, normed, [f"{name}.mlp.fc1"], bias=True, product=f"{product}.fc1")
            hidden = w.op("Gelu", hidden, approximate="tanh")
            with w.scope("fc2"):
                update = linear(w, hidden, [f"{name}.mlp.fc2"], bias=True, product=f"{product}.fc2")
            x = w.tap(f"vision.layer{layer:02d}", gated_residual(w, x, update, None))
    with w.scope("projector"), w.island("product"):
        x = w.tap("vision.post_ln", layer_norm(w, x, "vision.post_layernorm"))
        return w.tap("vision.projected", linear(w, x, ["projector"], bias=True))


def prefill(
    w: GraphWriter, shape: GraphShape, image_tokens: ir.Value, tokens: ir.Value, length: ir.Value, form: AttentionForm
) -> CacheValues:
    """Stage 2: image tokens (V,tokens,width), prompt ids (1,T) int64, its (1,) int64 length -> the prefix's cache."""
    model = w.weights.config
    config, slots = model.vlm, shape.prefix(model)
    with w.scope("prefix"):
        with w.island("stream"):
            rows = w.op("Gather", w.parameter("vlm.embed_tokens.weight"), tokens, axis=0)
            prompt = w.op("Mul", rows, w.constant(math.sqrt(config.width)))
            images = w.reshape(image_tokens, 1, shape.views * model.vision.tokens, config.width)
            x = w.tap("prefix.embs", w.op("Concat", images, prompt, axis=1))
        valid = w.op("Add", length, w.integers(shape.views * model.vision.tokens), name="length")
        bias = visible_prefix(w, slots, valid)
        mask = attention_mask(w, bias, slots * (config.heads // config.kv_heads), slots, form)
        cos, sin = (w.constant(table[None, :, None]) for table in rope_tables(config.head_dim, slots))
        rotary = Rotary(cos, sin, slots)
    keys, values = [], []
    for layer in range(config.depth):
        name, product = f"vlm.layers.{layer}", f"prefix.layers.{layer}"
        with w.scope(product), w.island("product"):
            normed = rms_norm(w, x, f"{name}.input_layernorm")
            last = layer == config.depth - 1
            heads = gemma_heads(w, config, normed, name, product, rotary, queries=not last)
            keys.append(w.tap(f"prefix.k{layer:02d}", heads.k))
            values.append(w.tap(f"prefix.v{layer:02d}", heads.v))
            if heads.q is None:
                break
            mixed = softmax_attention(w, heads.q, heads.k, heads.v, config.head_dim**-0.5, mask, form)
            with w.scope("out"):
                merged = gemma_merge(w, config, mixed, slots)
                out = linear(w, merged, [f"{name}.self_attn.o_proj"], bias=False, product=f"{product}.out")
            x = gated_residual(w, x, out, None)
            update = gemma_mlp(w, config, rms_norm(w, x, f"{name}.post_attention_layernorm"), f"{name}.mlp", product)
            x = w.tap(f"prefix.hidden{layer:02d}", gated_residual(w, x, update, None))
    return CacheValues(tuple(keys), tuple(values), valid)


class Denoise:
    """Stage 3, unrolled: what every step shares, made once."""

    def __init__(self, w: GraphWriter, shape: GraphShape, cache: CacheValues, form: AttentionForm) -> None:
        self.w = w
        self.model = w.weights.config
        self.config = self.model.expert
        self.cache = cache
        self.form = form
        self.n = self.model.suffix_tokens
        slots = shape.prefix(self.model)
        with w.scope("suffix"):
            bias = visible_prefix(w, slots, cache.length, more=self.n)
            if self.model.kind == "pi0":
                bias = w.op("Add", bias, w.constant(self._state_sees_itself(slots)))
            group = self.config.heads // self.config.kv_heads
            self.mask = attention_mask(w, bias, self.n * group, slots + self.n, form)
            rows = w.op("Add", cache.length, w.integers(*range(self.n)), name="positions")
            tables = rope_tables(self.config.head_dim, slots + self.n)
            cos, sin = (w.op("Gather", w.constant(table), rows, axis=0) for table in tables)
            cos, sin = (w.reshape(table, 1, self.n, 1, self.config.head_dim) for table in (cos, sin))
            self.rotary = Rotary(cos, sin, self.n)

    def _state_sees_itself(self, slots: int) -> np.ndarray:
        """π0's state token, the suffix's first, does not see the actions: (1,1,N·group,P+N) to add to the logits."""
        group = self.config.heads // self.config.kv_heads
        hidden = np.zeros((self.n, slots + self.n), np.float32)
        hidden[0, slots + 1 :] = HIDDEN_LOGIT
        return hidden.repeat(group, axis=0)[None, None]

    def layer(self, x: ir.Value, index: int, constants: StepConstants) -> ir.Value:
        """One layer of the action expert over the suffix (1,N,width)."""
        w, config, name = self.w, self.config, f"expert.layers.{index}"
        first, second = constants.modulations(w, index)
        with w.scope(name), w.island("product"):
            normed = rms_norm(w, x, first or f"{name}.input_layernorm")
            heads = gemma_heads(w, config, normed, name, name, self.rotary)
            assert heads.q is not None
            k = w.concat((self.cache.keys[index], heads.k), axis=2)
            v = w.concat((self.cache.values[index], heads.v), axis=2)
            mixed = softmax_attention(w, heads.q, k, v, config.head_dim**-0.5, self.mask, self.form)
            with w.scope("out"):
                merged = gemma_merge(w, config, mixed, self.n)
                out = linear(w, merged, [f"{name}.self_attn.o_proj"], bias=False, product=f"{name}.out")
            x = gated_residual(w, x, out, first.gate if first else None)
            normed = rms_norm(w, x, second or f"{name}.post_attention_layernorm")
            update = gemma_mlp(w, config, normed, f"{name}.mlp", name)
            return gated_residual(w, x, update, second.gate if second else None)

    def embed(self, state: ir.Value | None, x_t: ir.Value, constants: StepConstants) -> ir.Value:
        """Suffix tokens (1,N,width) of the state (π0) and the noisy actions."""
        w = self.w
        with w.scope("suffix_in"), w.island("float32"):
            actions = linear(w, x_t, ["action_in_proj"], bias=True)
            if state is None:
                return actions
            mixed = w.op("Add", w.op("MatMul", actions, action_weight(w)), constants.time_bias(w))
            mixed = w.op("Mul", mixed, w.op("Sigmoid", mixed))
            mixed = linear(w, mixed, ["action_time_mlp_out"], bias=True)
            first = w.reshape(linear(w, state, ["state_proj"], bias=True), 1, 1, self.config.width)
            return w.concat((first, mixed), axis=1)

    def step(self, state: ir.Value | None, x_t: ir.Value, constants: StepConstants, steps: int) -> ir.Value:
        """One Euler step: x_t (1,H,32) -> the next."""
        w, tap = self.w, f"step{constants.step}"
        with w.scope(tap):
            x = w.tap(f"{tap}.suffix_embs", self.embed(state, x_t, constants))
            for layer in range(self.config.depth):
                x = w.tap(f"{tap}.hidden{layer:02d}", self.layer(x, layer, constants))
            with w.island("float32"):
                out = w.tap(f"{tap}.suffix_out", rms_norm(w, x, constants.last(w) or "expert.norm"))
                if state is not None:
                    out = w.split(out, (1, self.model.horizon), axis=1)[1]
                v_t = w.tap(f"{tap}.v_t", linear(w, out, ["action_out_proj"], bias=True))
                return w.op("Add", x_t, w.op("Mul", v_t, w.constant(-1.0 / steps)), name="x_t")


def denoise(
    w: GraphWriter,
    shape: GraphShape,
    cache: CacheValues,
    state: ir.Value | None,
    noise: ir.Value,
    form: AttentionForm,
) -> ir.Value:
    """Stage 3: the cache, the state (1,32) for π0, noise (1,H,32) -> normalised actions (1,H,32), all float32."""
    stage = Denoise(w, shape, cache, form)
    x_t = noise
    for constants in step_constants(w.weights, shape.steps):
        x_t = stage.step(state, x_t, constants, shape.steps)
        w.tap(f"step{constants.step + 1}.x_t", x_t)
    return x_t
