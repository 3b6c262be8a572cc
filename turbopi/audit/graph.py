"""The reference as a graph of named tensors, each computed by the reference's own modules from the tensors before it.

That makes two questions answerable for any engine that tells some of its tensors: what would the reference have made of
*this* input (an operation alone, nothing accumulated), and what does the reference make of the whole (everything
accumulated). Where an engine does not tell an input, the graph computes it from the nearest ones that it does tell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model import Pi0
from ..model.expert import suffix_visibility
from ..model.flow import time_schedule
from ..model.gemma import Block, attention_bias, gated_residual, rotate
from ..model.siglip import Block as VisionBlock
from .names import Place, place, tensor_names
from .sample import Sample

Values = Mapping[str, Tensor]
Rule = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Cell:
    """How one tensor is made: the names that it is made from, and the rule."""

    inputs: tuple[str, ...]
    rule: Rule


class ReferenceGraph:
    """The reference in float32, for one sample.

    Args:
        model: in float32; never patched, only its modules are called.
        sample: whose frame it is.
    """

    def __init__(self, model: Pi0, sample: Sample) -> None:
        if model.vlm.dtype != torch.float32:
            raise ValueError(f"an audit's reference is float32, this model is {model.vlm.dtype}; load it as fp32")
        self.model, self.sample, self.config = model, sample, model.config
        self.device = model.action_in_proj.weight.device
        self.names = tensor_names(self.config, sample.cameras, sample.steps)
        self.known = frozenset(self.names)
        self.inputs = sample.inputs.to(self.device)
        self.noise = sample.noise.to(self.device)
        self.prefix_length = len(sample.valid_slots(self.config.vision.tokens))
        self._times = time_schedule(sample.steps, model.numerics.time)
        self._rotary = {}
        for tower, first, count in (
            ("prefix", 0, self.prefix_length),
            ("expert", self.prefix_length, self.config.suffix_tokens),
        ):
            positions = first + torch.arange(count, device=self.device)[None]
            self._rotary[tower] = model.vlm.rope(positions, torch.float32)
        visible = torch.ones(1, self.prefix_length, dtype=torch.bool, device=self.device)
        self._suffix_bias = attention_bias(suffix_visibility(self.config, visible))
        self._cells: dict[str, Cell] = {}

    @cached_property
    def truth(self) -> Tensor:
        """The reference's own actions (1,H,32) float32."""
        return self.recording()["actions"]

    def recording(self) -> dict[str, Tensor]:
        """Every tensor of the reference's own run."""
        told = dict(self.sweep({}))
        self.truth = told["actions"]
        return told

    @torch.no_grad()
    def sweep(self, given: Values) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in order, float32, made from those in `given` as far as they go, else from the graph's own.

        With nothing given this is the reference's own run.
        """
        made: dict[str, Tensor] = {}
        for name in self.names:
            cell = self._cell(name)
            inputs = [given[i].float() if i in given else made[i] for i in cell.inputs]
            made[name] = cell.rule(*inputs)
            yield name, made[name]

    @torch.no_grad()
    def value(self, name: str, given: Values, made: dict[str, Tensor]) -> Tensor:
        """One tensor, from the nearest given ones; what is computed on the way is kept in `made`."""
        stack = [name]
        while stack:
            top = stack[-1]
            cell = self._cell(top)
            missing = [i for i in cell.inputs if i not in given and i not in made]
            if missing:
                stack += missing
                continue
            stack.pop()
            made[top] = cell.rule(*(given[i].float() if i in given else made[i] for i in cell.inputs))
        return made[name]

    def sources(self, names: Collection[str], told: Collection[str]) -> frozenset[str]:
        """Of the tensors told, those from which `value` computes the ones named."""
        found: set[str] = set()
        seen: set[str] = set()
        stack = list(names)
        while stack:
            for name in self._cell(stack.pop()).inputs:
                if name in told:
                    found.add(name)
                elif name not in seen:
                    seen.add(name)
                    stack.append(name)
        return frozenset(found)

    def _cell(self, name: str) -> Cell:
        if name not in self._cells:
            self._cells[name] = self._make_cell(name)
        return self._cells[name]

    def _make_cell(self, name: str) -> Cell:
        where = place(name)
        if where.tower == "vision":
            return self._vision_cell(where)
        if where.tower == "cache":
            return Cell((f"prefix.layers.{where.layer}.{where.tensor}",), lambda held: held)
        if where.tower == "prefix":
            if where.tensor == "embs":
                tokens = tuple(f"vision.cam{c}.tokens" for c in self.sample.cameras)
                return Cell(tokens, self._embed)
            return self._layer_cell("prefix", where)
        if where.layer is not None:
            return self._layer_cell(f"step{where.index}", where)
        return self._step_cell(name, where)

    def _vision_cell(self, where: Place) -> Cell:
        tower, root = self.model.vision, f"vision.cam{where.index}"
        last = f"{root}.layers.{self.config.vision.depth - 1}.stream"
        if where.tensor == "embeddings":
            return Cell((), lambda: tower.embeddings(self.inputs.images[:, where.index]))
        if where.layer is None:
            rule: Rule = tower.post_layernorm if where.tensor == "norm" else self.model.projector
            return Cell((last if where.tensor == "norm" else f"{root}.norm",), rule)
        block = tower.encoder.layers[where.layer]
        assert isinstance(block, VisionBlock)
        stream = f"{root}.embeddings" if where.layer == 0 else f"{root}.layers.{where.layer - 1}.stream"
        own = f"{root}.layers.{where.layer}"
        attention, mlp = block.self_attn, block.mlp
        cells: dict[str, tuple[tuple[str, ...], Rule]] = {
            "norm1": ((stream,), block.layer_norm1),
            "q": ((f"{own}.norm1",), attention.q_proj),
            "k": ((f"{own}.norm1",), attention.k_proj),
            "v": ((f"{own}.norm1",), attention.v_proj),
            "attended": ((f"{own}.q", f"{own}.k", f"{own}.v"), self._vision_attention),
            "out": ((f"{own}.attended",), attention.out_proj),
            "mid": ((stream, f"{own}.out"), torch.add),
            "norm2": ((f"{own}.mid",), block.layer_norm2),
            "fc1": ((f"{own}.norm2",), mlp.fc1),
            "hidden": ((f"{own}.fc1",), lambda x: F.gelu(x, approximate="tanh")),
            "fc2": ((f"{own}.hidden",), mlp.fc2),
            "stream": ((f"{own}.mid", f"{own}.fc2"), torch.add),
        }
        return Cell(*cells[where.tensor])

    def _vision_attention(self, *projected: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.config.vision.heads, -1)).transpose(1, 2) for t in projected)
        out = F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return out.transpose(1, 2).flatten(2)

    def _embed(self, *image_tokens: Tensor) -> Tensor:
        valid = self.inputs.tokens[:, self.inputs.token_mask[0]]
        return torch.cat((*image_tokens, self.model.vlm.embed(valid)), dim=1)

    def _layer_cell(self, root: str, where: Place) -> Cell:
        """A Gemma layer of the prefix or, at one step, of the expert."""
        assert where.layer is not None
        expert = where.tower == "expert"
        block: Block = (self.model.expert if expert else self.model.vlm).blocks[where.layer]
        attention, mlp = block.self_attn, block.mlp
        own = f"{root}.layers.{where.layer}"
        stream = f"{root}.embs" if where.layer == 0 else f"{root}.layers.{where.layer - 1}.stream"
        adaptive = expert and self.config.kind == "pi05"
        cond = (f"{root}.cond",) if adaptive else ()
        gates = [(f"{own}.gate{i}",) if adaptive else () for i in (1, 2)]
        cos, sin = self._rotary[where.tower]
        before = [(f"cache.layers.{where.layer}.{t}",) if expert else () for t in ("k", "v")]

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        def residual(x: Tensor, update: Tensor, gate: Tensor | None = None) -> Tensor:
            return gated_residual(x, update, gate)

        cells: dict[str, tuple[tuple[str, ...], Rule]] = {
            "norm1": ((stream, *cond), lambda x, c=None: block.input_layernorm(x, c)[0]),
            "gate1": ((stream, *cond), lambda x, c: block.input_layernorm(x, c)[1]),
            "q_raw": ((f"{own}.norm1",), attention.q_proj),
            "k_raw": ((f"{own}.norm1",), attention.k_proj),
            "v": ((f"{own}.norm1",), lambda x: heads(attention.v_proj(x))),
            "q": ((f"{own}.q_raw",), lambda x: rotate(heads(x), cos, sin)),
            "k": ((f"{own}.k_raw",), lambda x: rotate(heads(x), cos, sin)),
            "logits": (
                (f"{own}.q", *before[0], f"{own}.k"),
                lambda q, *k: self._logits(q, k, self._suffix_bias if expert else None),
            ),
            "probs": ((f"{own}.logits",), lambda x: x.softmax(dim=-1)),
            "attended": ((f"{own}.probs", *before[1], f"{own}.v"), self._mix),
            "out": ((f"{own}.attended",), attention.o_proj),
            "mid": ((stream, f"{own}.out", *gates[0]), residual),
            "norm2": ((f"{own}.mid", *cond), lambda x, c=None: block.post_attention_layernorm(x, c)[0]),
            "gate2": ((f"{own}.mid", *cond), lambda x, c: block.post_attention_layernorm(x, c)[1]),
            "gate": ((f"{own}.norm2",), mlp.gate_proj),
            "up": ((f"{own}.norm2",), mlp.up_proj),
            "hidden": ((f"{own}.gate", f"{own}.up"), lambda g, u: F.gelu(g, approximate="tanh") * u),
            "down": ((f"{own}.hidden",), mlp.down_proj),
            "stream": ((f"{own}.mid", f"{own}.down", *gates[1]), residual),
        }
        return Cell(*cells[where.tensor])

    def _logits(self, q: Tensor, keys: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        k = torch.cat(keys, dim=2).repeat_interleave(q.shape[1] // keys[0].shape[1], dim=1)
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        return logits if bias is None else logits + bias

    def _mix(self, probs: Tensor, *values: Tensor) -> Tensor:
        v = torch.cat(values, dim=2).repeat_interleave(probs.shape[1] // values[0].shape[1], dim=1)
        return (probs @ v).transpose(1, 2).flatten(2)

    def _suffix(self, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and condition; without a condition, embeddings twice."""
        embs, cond = self.model.embed_suffix(self.inputs.state, x_t, time)
        return embs, embs if cond is None else cond

    def _step_cell(self, name: str, where: Place) -> Cell:
        model, horizon, steps = self.model, self.config.horizon, self.sample.steps
        if where.tensor in ("x_t", "actions"):
            step = steps if name == "actions" else where.index
            assert step is not None
            if step == 0:
                return Cell((), lambda: self.noise)
            return Cell((f"step{step - 1}.x_t", f"step{step - 1}.v_t"), lambda x, v: x + (-1.0 / steps) * v)
        assert where.index is not None
        root = f"step{where.index}"
        time = torch.full((1,), self._times[where.index], device=self.device)
        if where.tensor in ("cond", "embs"):
            part = 1 if where.tensor == "cond" else 0
            return Cell((f"{root}.x_t",), lambda x: self._suffix(x, time)[part])
        if where.tensor == "v_t":
            return Cell((f"{root}.norm",), lambda x: model.action_out_proj(x[:, -horizon:]))
        cond = (f"{root}.cond",) if self.config.kind == "pi05" else ()
        last = f"{root}.layers.{self.config.expert.depth - 1}.stream"
        return Cell((last, *cond), lambda x, c=None: model.expert.norm(x, c)[0])
