"""Whole graphs with their inputs and outputs: one a stage, or all stages in one."""

from __future__ import annotations

import onnx_ir as ir

from ..config import ModelConfig
from .layers import AttentionForm
from .spec import GraphName
from .stages import CacheValues, GraphShape, denoise, encode_images, prefill
from .weights import Weights
from .writer import GraphWriter

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64

IMAGES, IMAGE_TOKENS, TOKENS, PROMPT_LENGTH = "images", "image_tokens", "tokens", "prompt_length"
PREFIX_LENGTH, STATE, NOISE, ACTIONS = "prefix_length", "state", "noise", "actions"


def cache_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of the prefix's keys and values where they pass from graph to graph: all keys, then all values."""
    layers = range(config.vlm.depth)
    return (*(f"keys_{i:02d}" for i in layers), *(f"values_{i:02d}" for i in layers))


def write_graph(
    name: GraphName, weights: Weights, shape: GraphShape, form: AttentionForm = "explicit", opset: int = 21
) -> ir.Model:
    """A graph of one observation in float32, as written: nothing folded, nothing lowered.

    vision: images (V,3,S,S) -> image_tokens (V,tokens,width)
    prefill: image_tokens, tokens (1,T) int64, prompt_length (1,) int64 -> keys_LL, values_LL (1,kv_heads,P,head_dim),
    prefix_length (1,) int64
    denoise: keys_LL, values_LL, prefix_length, state (1,32) for π0, noise (1,H,32) -> actions (1,H,32)
    whole: images, tokens, prompt_length, state for π0, noise -> actions
    """
    w = GraphWriter(f"turbopi_{name}", opset, weights)
    {"vision": _vision, "prefill": _prefill, "denoise": _denoise, "whole": _whole}[name](w, shape, form)
    return w.model()


def _images(w: GraphWriter, shape: GraphShape) -> ir.Value:
    size = w.weights.config.vision.image_size
    return w.input(IMAGES, FLOAT, (shape.views, 3, size, size))


def _prompt(w: GraphWriter, shape: GraphShape) -> tuple[ir.Value, ir.Value]:
    return w.input(TOKENS, INT64, (1, shape.prompt)), w.input(PROMPT_LENGTH, INT64, (1,))


def _suffix(w: GraphWriter) -> tuple[ir.Value | None, ir.Value]:
    config = w.weights.config
    state = w.input(STATE, FLOAT, (1, config.state_dim)) if config.kind == "pi0" else None
    return state, w.input(NOISE, FLOAT, (1, config.horizon, config.action_dim))


def _vision(w: GraphWriter, shape: GraphShape, form: AttentionForm) -> None:
    w.output(IMAGE_TOKENS, encode_images(w, shape, _images(w, shape), form))


def _prefill(w: GraphWriter, shape: GraphShape, form: AttentionForm) -> None:
    config = w.weights.config
    image_tokens = w.input(IMAGE_TOKENS, FLOAT, (shape.views, config.vision.tokens, config.vlm.width))
    cache = prefill(w, shape, image_tokens, *_prompt(w, shape), form)
    for name, value in zip(cache_names(config), (*cache.keys, *cache.values), strict=True):
        w.output(name, value)
    w.output(PREFIX_LENGTH, cache.length)


def _denoise(w: GraphWriter, shape: GraphShape, form: AttentionForm) -> None:
    config = w.weights.config
    size = (1, config.vlm.kv_heads, shape.prefix(config), config.vlm.head_dim)
    cached = [w.input(name, FLOAT, size) for name in cache_names(config)]
    depth = config.vlm.depth
    cache = CacheValues(tuple(cached[:depth]), tuple(cached[depth:]), w.input(PREFIX_LENGTH, INT64, (1,)))
    w.output(ACTIONS, denoise(w, shape, cache, *_suffix(w), form))


def _whole(w: GraphWriter, shape: GraphShape, form: AttentionForm) -> None:
    images, prompt, suffix = _images(w, shape), _prompt(w, shape), _suffix(w)
    cache = prefill(w, shape, encode_images(w, shape, images, form), *prompt, form)
    w.output(ACTIONS, denoise(w, shape, cache, *suffix, form))
