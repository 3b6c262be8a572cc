"""openpi's JAX parameter tree: which array holds which of our parameters, and in what layout (SPEC 3).

JAX stacks the layers of a tower on axis 0, and some arrays hold two matrices (key and value, gate and up) on the next
axis. What is left, the core, is one of our parameters in another layout; each layout below is a pair of inverses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError
from .names import EMBEDDING, Shape

HeadsOf = Literal["none", "vision", "query", "key"]


@dataclass(frozen=True)
class Layout:
    """How a core looks in JAX (`from_jax` brings it to torch) and back, given the number of heads."""

    from_jax: Callable[[Tensor], Tensor]
    to_jax: Callable[[Tensor, int], Tensor]


SAME = Layout(lambda core: core, lambda w, _: w)
TRANSPOSED = Layout(lambda core: core.T, lambda w, _: w.T)
PATCH_CONV = Layout(lambda core: core.permute(3, 2, 0, 1), lambda w, _: w.permute(2, 3, 1, 0))
POSITIONS = Layout(lambda core: core[0], lambda w, _: w[None])
# (width, heads, size): into heads; (heads, size, width): out of heads; (heads, width, size): Gemma's einsum in.
INTO_HEADS = Layout(lambda core: core.flatten(1).T, lambda w, h: w.T.unflatten(1, (h, -1)))
HEADS_BIAS = Layout(lambda core: core.flatten(), lambda w, h: w.unflatten(0, (h, -1)))
OUT_OF_HEADS = Layout(lambda core: core.flatten(0, 1).T, lambda w, h: w.T.unflatten(0, (h, -1)))
EINSUM_IN = Layout(
    lambda core: core.transpose(1, 2).flatten(0, 1), lambda w, h: w.unflatten(0, (h, -1)).transpose(1, 2)
)


@dataclass(frozen=True)
class Rule:
    """One JAX array.

    Attributes:
        path: in the tree, joined by "/".
        parts: our names; more than one where the array holds several matrices. "{l}" stands for the layer.
        layout: of each core.
        heads: which number of heads `layout` needs.
    """

    path: str
    parts: tuple[str, ...]
    layout: Layout
    heads: HeadsOf = "none"

    @property
    def stacked(self) -> bool:
        """Whether axis 0 is the layer."""
        return "{l}" in self.parts[0]

    @property
    def rank(self) -> int:
        """Axes before the core."""
        return int(self.stacked) + int(len(self.parts) > 1)


def _norm(path: str, name: str) -> Iterator[Rule]:
    # A tower has one of the two: a plain scale, or adaRMS.
    yield Rule(f"{path}/scale", (f"{name}.weight",), SAME)
    yield from _dense(f"{path}/Dense_0", f"{name}.dense")


def _dense(path: str, name: str) -> Iterator[Rule]:
    yield Rule(f"{path}/kernel", (f"{name}.weight",), TRANSPOSED)
    yield Rule(f"{path}/bias", (f"{name}.bias",), SAME)


def _layer_norm(path: str, name: str) -> Iterator[Rule]:
    yield Rule(f"{path}/scale", (f"{name}.weight",), SAME)
    yield Rule(f"{path}/bias", (f"{name}.bias",), SAME)


def _vision() -> Iterator[Rule]:
    img, layer = "PaliGemma/img", "vision.encoder.layers.{l}"
    block = f"{img}/Transformer/encoderblock"
    yield Rule(f"{img}/embedding/kernel", ("vision.embeddings.patch_embedding.weight",), PATCH_CONV)
    yield Rule(f"{img}/embedding/bias", ("vision.embeddings.patch_embedding.bias",), SAME)
    yield Rule(f"{img}/pos_embedding", ("vision.embeddings.position_embedding.weight",), POSITIONS)
    yield from _layer_norm(f"{block}/LayerNorm_0", f"{layer}.layer_norm1")
    for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        path, name = f"{block}/MultiHeadDotProductAttention_0/{theirs}", f"{layer}.self_attn.{ours}"
        yield Rule(f"{path}/kernel", (f"{name}.weight",), INTO_HEADS, "vision")
        yield Rule(f"{path}/bias", (f"{name}.bias",), HEADS_BIAS, "vision")
    path, name = f"{block}/MultiHeadDotProductAttention_0/out", f"{layer}.self_attn.out_proj"
    yield Rule(f"{path}/kernel", (f"{name}.weight",), OUT_OF_HEADS, "vision")
    yield Rule(f"{path}/bias", (f"{name}.bias",), SAME)
    yield from _layer_norm(f"{block}/LayerNorm_1", f"{layer}.layer_norm2")
    yield from _dense(f"{block}/MlpBlock_0/Dense_0", f"{layer}.mlp.fc1")
    yield from _dense(f"{block}/MlpBlock_0/Dense_1", f"{layer}.mlp.fc2")
    yield from _layer_norm(f"{img}/Transformer/encoder_norm", "vision.post_layernorm")
    yield from _dense(f"{img}/head", "projector")


def _gemma(tower: str, mark: str) -> Iterator[Rule]:
    layers, layer = "PaliGemma/llm/layers", tower + ".layers.{l}"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    yield from _norm(f"{layers}/pre_attention_norm{mark}", f"{layer}.input_layernorm")
    yield Rule(f"{layers}/attn/q_einsum{mark}/w", (f"{attention}.q_proj.weight",), EINSUM_IN, "query")
    key_value = (f"{attention}.k_proj.weight", f"{attention}.v_proj.weight")
    yield Rule(f"{layers}/attn/kv_einsum{mark}/w", key_value, EINSUM_IN, "key")
    yield Rule(f"{layers}/attn/attn_vec_einsum{mark}/w", (f"{attention}.o_proj.weight",), OUT_OF_HEADS, "query")
    yield from _norm(f"{layers}/pre_ffw_norm{mark}", f"{layer}.post_attention_layernorm")
    yield Rule(f"{layers}/mlp{mark}/gating_einsum", (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"), TRANSPOSED)
    yield Rule(f"{layers}/mlp{mark}/linear", (f"{mlp}.down_proj.weight",), TRANSPOSED)
    yield from _norm(f"PaliGemma/llm/final_norm{mark}", f"{tower}.norm")


def _all_rules() -> Iterator[Rule]:
    yield from _vision()
    yield Rule("PaliGemma/llm/embedder/input_embedding", (EMBEDDING,), SAME)
    yield from _gemma("vlm", "")
    yield from _gemma("expert", "_1")
    for name in ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out"):
        yield from _dense(name, name)
    for name in ("time_mlp_in", "time_mlp_out", "action_out_proj"):
        yield from _dense(name, name)


RULES: dict[str, Rule] = {rule.path: rule for rule in _all_rules()}


@dataclass(frozen=True)
class Place:
    """Where one of our parameters lies in a JAX array: the index of its core."""

    path: str
    index: tuple[int, ...]


def places(path: str, shape: Shape) -> dict[str, tuple[Place, Shape]]:
    """Our names in the JAX array at `path` of `shape`, each with its place and its torch shape.

    Raises CheckpointError if the array has too few axes, or another number of matrices than its name says.
    """
    rule = RULES[path]
    core = shape[rule.rank :]
    if len(rule.parts) > 1 and shape[rule.rank - 1 : rule.rank] != (len(rule.parts),):
        raise CheckpointError(f"JAX array {path} has shape {list(shape)}, expected {len(rule.parts)} on axis 1")
    try:
        if len(shape) <= rule.rank:
            raise IndexError(rule.rank)
        torch_shape = tuple(rule.layout.from_jax(torch.empty(core, device="meta")).shape)
    except (IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"JAX array {path} has shape {list(shape)}, which has too few or too many axes"
        ) from error
    found: dict[str, tuple[Place, Shape]] = {}
    for layer in range(shape[0]) if rule.stacked else (None,):
        for number, part in enumerate(rule.parts):
            index = (*(() if layer is None else (layer,)), *((number,) if len(rule.parts) > 1 else ()))
            found[part.format(l=layer)] = (Place(path, index), torch_shape)
    return found


def core_from_jax(array: Tensor, place: Place) -> Tensor:
    """Our parameter at `place` of the whole JAX `array`: a view in torch's layout."""
    return RULES[place.path].layout.from_jax(array[place.index])


def heads_in(shapes: Mapping[str, Shape]) -> dict[str, dict[str, int]]:
    """Head counts that a JAX tree's shapes spell out: {"vision": {"heads"}, "vlm": {...}, "expert": {...}}."""
    found: dict[str, dict[str, int]] = {}
    query = shapes.get("PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel", ())
    if len(query) == 4:
        found["vision"] = {"heads": query[2]}
    for tower, mark in (("vlm", ""), ("expert", "_1")):
        q = shapes.get(f"PaliGemma/llm/layers/attn/q_einsum{mark}/w", ())
        kv = shapes.get(f"PaliGemma/llm/layers/attn/kv_einsum{mark}/w", ())
        if len(q) == 4 and len(kv) == 5:
            found[tower] = {"heads": q[1], "kv_heads": kv[2], "head_dim": q[3]}
    return found


def rules_for(names: set[str], config: ModelConfig) -> Iterator[tuple[Rule, list[list[str]], int]]:
    """The arrays of a whole tree: rule, our names as [layer][part] (one row if not stacked), and the heads it needs.

    Raises CheckpointError for the one geometry that openpi's JAX tree spells differently (as many key as query heads).
    """
    if config.vlm.heads == config.vlm.kv_heads:
        raise CheckpointError("openpi's JAX layout joins q, k and v when every head has its own key: not supported")
    depths = {"vision": config.vision.depth, "vlm": config.vlm.depth, "expert": config.expert.depth}
    heads = {"none": 0, "vision": config.vision.heads, "query": config.vlm.heads, "key": config.vlm.kv_heads}
    for rule in RULES.values():
        layers = range(depths[rule.parts[0].split(".")[0]]) if rule.stacked else (None,)
        rows = [[part.format(l=layer) for part in rule.parts] for layer in layers]
        if rows[0][0] in names:
            yield rule, rows, heads[rule.heads]
