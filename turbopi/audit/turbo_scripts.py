"""Which operation of turbo's assembly follows which, and what its buffers hold when it has run.

A script yields what operation comes next and gets its arguments, by name, once it has run (or before). Where a product
is in fp8, its result waits beside the residual stream for the next norm to add it; elsewhere the product adds it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model import Pi0
from .sample import Sample
from .turbo_tell import Arguments, Teller

ROLES = {
    "patches": "patches",
    "matmul": "product",
    "fp8_matmul": "product",
    "fp8_sums": "product",
    "fp8_gelu_matmul": "product",
    "gelu": "activation",
    "geglu_matmul": "gated product",
    "tiled_geglu": "gated product",
    "fp8_geglu_matmul": "gated product",
    "vision_attention": "attention",
    "embed_tokens": "embedding",
    "layer_norm": "norm",
    "residual_layer_norm": "norm",
    "rms_norm": "norm",
    "gated_residual_norm": "norm",
    "rotate_and_store": "rotation",
    "attention": "attention",
    "attention_split": "attention",
    "action_in": "actions in",
    "action_out": "actions out",
}
ADDING = ("residual_layer_norm", "gated_residual_norm")


@dataclass(frozen=True)
class Expect:
    """The next operation; its arguments are sent when it has run, or before it runs."""

    role: str
    before: bool = False


Script = Generator[Expect, Arguments, None]


def _columns(done: Arguments) -> Tensor:
    """By what each column of a product's result is to be multiplied: bare sums are scaled by their reader."""
    return done["weight"].scale if done["op"] == "fp8_sums" else done["out"].new_ones(1, dtype=torch.float32)


class Scripts:
    """The three stages for one sample.

    Args:
        teller: is told of the buffers.
        reference: the float32 model, for its sizes and its norms' weights.
        sample: what is run.
    """

    def __init__(self, teller: Teller, reference: Pi0, sample: Sample) -> None:
        self.teller, self.reference, self.config, self.sample = teller, reference, reference.config, sample
        self.length = len(sample.valid_slots(self.config.vision.tokens))

    # Stage 1

    def vision(self) -> Script:
        """`vision.encode`; all cameras at once."""
        if not self.sample.cameras:
            return
        tower = self.reference.vision
        blocks: list[Any] = list(tower.encoder.layers)
        yield Expect("patches")
        yield Expect("product")
        done = yield Expect("norm")
        self._each("embeddings", done["stream"])
        self._each_norm("layers.0.norm1", done, blocks[0].layer_norm1)
        for layer, block in enumerate(blocks):
            yield from self._vision_layer(layer, block)
            done = yield Expect("norm")
            self._each_sum(f"layers.{layer}.stream", done)
            if layer + 1 < len(blocks):
                self._each_norm(f"layers.{layer + 1}.norm1", done, blocks[layer + 1].layer_norm1)
        self._each_norm("norm", done, tower.post_layernorm)
        done = yield Expect("product")
        self._each("tokens", done["out"])

    def _vision_layer(self, layer: int, block: Any) -> Script:
        vision, own = self.config.vision, f"layers.{layer}."
        done = yield Expect("product")
        parts = done["out"].split(vision.width, dim=1)
        for tensor, part in zip("qkv", parts, strict=True):
            self._each(own + tensor, part, scale=(vision.width // vision.heads) ** 0.5 if tensor == "q" else 1.0)
        done = yield Expect("attention")
        self._each(f"{own}attended", done["result"])
        done = yield Expect("product")
        if done.get("residual") is None:
            self._each(f"{own}out", done["out"])
        done = yield Expect("norm")
        self._each_sum(f"{own}mid", done)
        self._each_norm(f"{own}norm2", done, block.layer_norm2)
        done = yield Expect("product")
        if done["op"] == "matmul" and done.get("activation", "none") == "none":
            done = yield Expect("activation")
        self._each(f"{own}hidden", done["out"][:, : vision.mlp_dim])
        done = yield Expect("product")
        added = done.get("residual") is not None
        self._each(f"{own}stream" if added else f"{own}fc2", done["out"])

    def _each(self, tensor: str, buffer: Tensor, scale: float = 1.0) -> bool:
        """Rows of every camera; whether any was replaced."""
        size, replaced = self.config.vision.tokens, False
        for place, camera in enumerate(self.sample.cameras):
            rows = buffer[place * size : (place + 1) * size]
            replaced |= self.teller.rows(f"vision.cam{camera}.{tensor}", rows, scale)
        return replaced

    def _each_norm(self, tensor: str, done: Arguments, norm: Any) -> None:
        size = self.config.vision.tokens
        for place, camera in enumerate(self.sample.cameras):
            rows = done["out"][place * size : (place + 1) * size]
            self.teller.norm(f"vision.cam{camera}.{tensor}", rows, norm)

    def _each_sum(self, tensor: str, done: Arguments) -> None:
        if done["op"] in ADDING and self._each(tensor, done["x"]):
            self.teller.renorm(done)

    # Stage 2

    def prefix(self) -> Script:
        """`prefill.prefill`; the rows of valid tokens."""
        tell, length, own = self.teller, self.length, ""
        done = yield Expect("embedding")
        tell.rows("prefix.embs", done["out"][:length])
        for layer, block in enumerate(self.reference.vlm.blocks):
            before, own = own, f"prefix.layers.{layer}."
            done = yield Expect("norm")
            self._sum(f"{before}stream", done)
            tell.norm(f"{own}norm1", done["out"][:length], block.input_layernorm)
            last = layer + 1 == self.config.vlm.depth
            yield from self._projections(own, slice(0, length), queries=not last)
            if last:
                return
            done = yield Expect("attention")
            tell.rows(f"{own}attended", done["out"][:length])
            done = yield Expect("product")
            tell.rows(own + ("out" if done.get("residual") is None else "mid"), done["out"][:length], _columns(done))
            done = yield Expect("norm")
            self._sum(f"{own}mid", done)
            tell.norm(f"{own}norm2", done["out"][:length], block.post_attention_layernorm)
            done = yield Expect("gated product")
            tell.rows(f"{own}hidden", done["out"][:length])
            done = yield Expect("product")
            tell.rows(
                own + ("down" if done.get("residual") is None else "stream"), done["out"][:length], _columns(done)
            )

    def _sum(self, name: str, done: Arguments) -> None:
        """The prefix's stream behind an operation that adds and norms at once."""
        if done["op"] in ADDING and self.teller.rows(name, done["x"][: self.length]):
            self.teller.renorm(done)

    def _projections(self, own: str, slots: slice, queries: bool = True, cache: int | None = None) -> Script:
        """Queries, keys and values; the rows take `slots` in the cache, of layer `cache` if what was there is read."""
        tell, vlm, count = self.teller, self.config.vlm, slots.stop - slots.start
        keys = vlm.kv_heads * vlm.head_dim
        done = yield Expect("product")
        widths = [vlm.heads * vlm.head_dim if queries else 0, keys, keys]
        q, k, _ = done["out"][:count].split(widths, dim=1)
        of_q, of_k, _ = _columns(done).expand(sum(widths)).split(widths)
        if queries:
            tell.rows(f"{own}q_raw", q, of_q * vlm.head_dim**0.5)
        tell.rows(f"{own}k_raw", k, of_k)
        done = yield Expect("rotation")
        if queries:
            tell.heads(f"{own}q", done["q_out"][:count], vlm.head_dim)
        for tensor, held in (("k", done["keys"]), ("v", done["values"])):
            if cache is not None:
                tell.tell(f"cache.layers.{cache}.{tensor}", held[:, :, : slots.start])
            tell.tell(own + tensor, held[:, :, slots])

    # Stage 3

    def suffix(self) -> Script:
        """`RowsLoop.run`."""
        tell, expert, adaptive = self.teller, self.reference.expert, self.config.kind == "pi05"
        for step in range(self.sample.steps):
            root = f"step{step}."
            done = yield Expect("actions in", before=True)
            if step == 0:
                tell.rows("step0.x_t", done["x_t"])
            yield Expect("actions in")
            if not adaptive:
                yield Expect("product")
            done = yield Expect("norm", before=True)
            tell.rows(f"{root}embs", done["x"])
            done = yield Expect("norm")
            tell.norm(f"{root}layers.0.norm1", done["out"], expert.blocks[0].input_layernorm)
            for layer in range(self.config.expert.depth):
                yield from self._expert_layer(root, layer, step)
            done = yield Expect("actions out")
            last = step + 1 == self.sample.steps
            tell.rows("actions" if last else f"step{step + 1}.x_t", done["x_t"])

    def _expert_layer(self, root: str, layer: int, step: int) -> Script:
        tell, expert, own = self.teller, self.reference.expert, f"{root}layers.{layer}."
        slots = slice(self.length, self.length + self.config.suffix_tokens)
        yield from self._projections(own, slots, cache=layer if step == 0 else None)
        done = yield Expect("attention")
        tell.rows(f"{own}attended", done["out"])
        done = yield Expect("product")
        tell.rows(f"{own}out", done["out"])
        done = yield Expect("norm")
        self._modulated(f"{own}mid", f"{own}gate1", done)
        tell.norm(f"{own}norm2", done["out"], expert.blocks[layer].post_attention_layernorm)
        done = yield Expect("gated product")
        tell.rows(f"{own}hidden", done["out"])
        done = yield Expect("product")
        tell.rows(f"{own}down", done["out"])
        done = yield Expect("norm")
        self._modulated(f"{own}stream", f"{own}gate2", done)
        final = layer + 1 == self.config.expert.depth
        following: Any = expert.norm if final else expert.blocks[layer + 1].input_layernorm
        tell.norm(f"{root}norm" if final else f"{root}layers.{layer + 1}.norm1", done["out"], following)

    def _modulated(self, stream: str, gate: str, done: Arguments) -> None:
        """Gates are part of the schedule, which all runs share: told, not replaced."""
        if done.get("gate") is not None:
            self.teller.tell(gate, done["gate"], lambda t: t[None, None], back=None)
        if self.teller.rows(stream, done["x"]):
            self.teller.renorm(done)
