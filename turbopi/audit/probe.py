"""Every tensor of the reference, or of an edited copy of it, told as it is made, and replaced where that is asked for.

The model's code stays as it is. While it is being probed, its modules' `forward` are wrapped on the instances, and the
two things that happen between modules are caught where they are called: products in attention, and residual additions.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..engine import EagerEngine
from ..engine.base import sample_actions
from ..model import Pi0
from .sample import ALLOWED, Sample, Visit

PRODUCTS = ("matmul", "__matmul__", "bmm")
ELEMENTWISE = ("mul", "__mul__", "add", "__add__", "div", "__truediv__")
ACCESSORS = ("__get__", "dim", "size")
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class ModuleSubject:
    """The eager engine, or whatever has the reference's modules under their names."""

    granularity = "every operation"
    wide_logits = False
    allowed = ALLOWED

    def __init__(self, name: str, engine: EagerEngine) -> None:
        self.name, self.engine = name, engine

    @torch.no_grad()
    def run(self, sample: Sample, visit: Visit) -> Tensor:
        """See `Subject`."""
        with Probe(self.engine.model, sample, visit).installed():
            return sample_actions(self.engine, sample.inputs, sample.noise.clone(), sample.steps)


class Probe:
    """The wrappers for one run of one sample."""

    def __init__(self, model: Pi0, sample: Sample, visit: Visit) -> None:
        self.model, self.sample, self.visit = model, sample, visit
        self._undo: list[Callable[[], None]] = []
        device = model.action_in_proj.weight.device
        self._valid: Tensor | None = None
        cameras = list(sample.cameras)
        if model.config.invalid_tokens == "masked":
            self._valid = sample.valid_slots(model.config.vision.tokens).to(device)
            cameras = list(range(model.config.cameras))
        self._camera_order = cameras
        self._camera, self._step = -1, -1
        self._calls = 0
        self._block, self._residuals = "", 0
        self._products: _AttentionProducts | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrapped within, as before afterwards."""
        try:
            self._install()
            yield
        finally:
            for undo in reversed(self._undo):
                undo()

    # Telling

    def tell(self, name: str, value: Tensor, *rows: int) -> Tensor:
        """Tell of a tensor; its replacement, if there is one. `rows` are dimensions over prefix slots."""
        index = self._index(value, rows)
        given = self.visit(name, value if index is None else value[index])
        if given is None:
            return value
        given = given.to(value)
        if index is None:
            return given.view_as(value)
        # Of attention weights the invalid keys get none; elsewhere invalid rows stay as they are.
        result = torch.zeros_like(value) if len(rows) > 1 else value.clone()
        result[index] = given
        return result

    def _index(self, value: Tensor, rows: tuple[int, ...]) -> tuple[Any, ...] | None:
        if self._valid is None or not rows:
            return None
        index: list[Any] = [slice(None)] * value.ndim
        for position, dim in enumerate(rows):
            slots = self._valid
            beyond = value.shape[dim] - self.model.config.prefix_slots
            if beyond:
                slots = torch.cat((slots, self.model.config.prefix_slots + torch.arange(beyond, device=slots.device)))
            index[dim] = slots[:, None] if len(rows) > 1 and position == 0 else slots
        return tuple(index)

    def _see_camera(self, tensor: str, value: Tensor) -> Tensor:
        return self.tell(f"vision.cam{self._camera}.{tensor}", value)

    def _see(self, expert: bool, tensor: str, value: Tensor, dim: int = 1) -> Tensor:
        """A tensor of a Gemma tower, whose prefix rows are dimension `dim`."""
        return self.tell(f"step{self._step}.{tensor}", value) if expert else self.tell(f"prefix.{tensor}", value, dim)

    # Wrapping

    def _patch(self, owner: Any, name: str, wrap: Wrap) -> None:
        original = getattr(owner, name)
        held = name in vars(owner)

        def undo() -> None:
            if held:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

        setattr(owner, name, wrap(original))
        self._undo.append(undo)

    def _output(self, module: nn.Module, tell: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> None:
        """Tell of what a module returns, rounded to `dtype` where the model rounds it next."""
        self._patch(
            module,
            "forward",
            lambda forward: lambda *inputs: tell(self._alone(forward, *inputs).to(dtype)),
        )

    def _both(self, module: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        self._patch(module, "forward", lambda forward: lambda x: after(self._alone(forward, before(x))))

    def _alone(self, forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Products inside a projection are its own business."""
        watching, self._products = self._products, None
        try:
            return forward(*inputs)
        finally:
            self._products = watching

    def _install(self) -> None:
        model = self.model
        self._install_vision()
        for expert, tower in ((False, model.vlm), (True, model.expert)):
            for layer, block in enumerate(tower.blocks):
                self._install_block(expert, layer, block)
        gemma = sys.modules[type(model.vlm.blocks[0]).__module__]
        self._patch(gemma, "gated_residual", self._wrap_residual)
        self._patch(model.vlm, "forward", self._wrap_prefix)
        self._patch(model.expert, "forward", self._wrap_expert)
        self._patch(model.expert.norm, "forward", self._wrap_norm(True, "norm", None))
        self._patch(model, "velocity", self._wrap_velocity)
        self._patch(model, "denoise", self._wrap_denoise)

    def _install_vision(self) -> None:
        model, tower = self.model, self.model.vision
        cameras = iter(self._camera_order)

        def encode(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(*inputs: Any) -> Tensor:
                self._camera = next(cameras)
                return original(*inputs)

            return call

        def see(tensor: str) -> Callable[[Tensor], Tensor]:
            return lambda value: self._see_camera(tensor, value)

        self._patch(model, "_encode_camera", encode)
        self._output(tower.embeddings, see("embeddings"), tower.dtype)
        blocks: list[Any] = list(tower.encoder.layers)
        for layer, block in enumerate(blocks):
            own, attention, mlp = f"layers.{layer}.", block.self_attn, block.mlp
            self._output(block.layer_norm1, see(f"{own}norm1"))
            for tensor in ("q", "k", "v"):
                self._output(getattr(attention, f"{tensor}_proj"), see(own + tensor))
            self._both(attention.out_proj, see(f"{own}attended"), see(f"{own}out"))
            self._patch(block.layer_norm2, "forward", self._wrap_vision_middle(own))
            self._output(mlp.fc1, see(f"{own}fc1"))
            self._both(mlp.fc2, see(f"{own}hidden"), see(f"{own}fc2"))
            self._output(block, see(f"{own}stream"))
        self._output(tower.post_layernorm, see("norm"))
        self._output(model.projector, see("tokens"))

    def _wrap_vision_middle(self, own: str) -> Wrap:
        def wrap(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def call(x: Tensor) -> Tensor:
                # The stream past the norm is out of reach here: it is told, not replaced.
                self._see_camera(f"{own}mid", x)
                return self._see_camera(f"{own}norm2", forward(x))

            return call

        return wrap

    def _install_block(self, expert: bool, layer: int, block: Any) -> None:
        own = f"layers.{layer}."

        def see(tensor: str) -> Callable[[Tensor], Tensor]:
            return lambda value: self._see(expert, own + tensor, value)

        attention, mlp = block.self_attn, block.mlp
        self._patch(block.input_layernorm, "forward", self._wrap_norm(expert, f"{own}norm1", f"{own}gate1"))
        self._patch(block.post_attention_layernorm, "forward", self._wrap_norm(expert, f"{own}norm2", f"{own}gate2"))
        self._output(attention.q_proj, see("q_raw"))
        self._output(attention.k_proj, see("k_raw"))
        self._both(attention.o_proj, see("attended"), see("out"))
        self._output(mlp.gate_proj, see("gate"))
        self._output(mlp.up_proj, see("up"))
        self._both(mlp.down_proj, see("hidden"), see("down"))
        self._patch(attention, "keys_values", self._wrap_keys_values(expert, own))
        self._patch(attention, "forward", self._wrap_attention(expert, own))
        self._patch(block, "finish", self._wrap_finish(expert, own))

    def _wrap_norm(self, expert: bool, tensor: str, gate_name: str | None) -> Wrap:
        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def call(x: Tensor, cond: Tensor | None = None) -> Any:
                normed, gate = forward(x, cond)
                normed = self._see(expert, tensor, normed)
                if gate is not None and gate_name is not None:
                    gate = self._see(expert, gate_name, gate)
                return normed, gate

            return call

        return wrap

    def _wrap_keys_values(self, expert: bool, own: str) -> Wrap:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*inputs: Any) -> Any:
                k, v = original(*inputs)
                return self._see(expert, f"{own}k", k, 2), self._see(expert, f"{own}v", v, 2)

            return call

        return wrap

    def _wrap_attention(self, expert: bool, own: str) -> Wrap:
        def wrap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(*inputs: Any) -> Tensor:
                self._products = _AttentionProducts(self, expert, own)
                mode: AbstractContextManager[object] = self._products
                try:
                    with mode if self._products is not None else nullcontext():
                        return original(*inputs)
                finally:
                    self._products = None

            return call

        return wrap

    def see_attention(self, expert: bool, tensor: str, value: Tensor) -> Tensor:
        """Queries (1,H,N,head_dim), or logits and weights (1,H,N,keys)."""
        if tensor.endswith(".q"):
            return self._see(expert, tensor, value, 2)
        name = f"step{self._step}.{tensor}" if expert else f"prefix.{tensor}"
        return self.tell(name, value, *((3,) if expert else (2, 3)))

    def watching(self, products: _AttentionProducts) -> bool:
        """Whether attention itself is computing, and not a projection within it."""
        return self._products is products

    def _wrap_finish(self, expert: bool, own: str) -> Wrap:
        def wrap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(*inputs: Any) -> Tensor:
                self._block, self._residuals, self._expert = own, 0, expert
                return original(*inputs)

            return call

        return wrap

    def _wrap_residual(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Any) -> Tensor:
            tensor = "mid" if self._residuals == 0 else "stream"
            self._residuals += 1
            return self._see(self._expert, f"{self._block}{tensor}", original(*inputs))

        return call

    def _wrap_prefix(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(embs: Tensor, valid: Tensor | None, *rest: Any) -> Any:
            return original(self._see(False, "embs", embs.to(self.model.vlm.dtype)), valid, *rest)

        return call

    def _wrap_expert(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(cache: Any, embs: Tensor, cond: Tensor | None, *rest: Any) -> Tensor:
            cond = None if cond is None else self._see(True, "cond", cond)
            return original(cache, self._see(True, "embs", embs.to(self.model.expert.dtype)), cond, *rest)

        return call

    def _wrap_velocity(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(cache: Any, state: Tensor, x_t: Tensor, *rest: Any) -> Tensor:
            self._step += 1
            # In place: the loop adds the velocity to the tensor that it holds itself.
            told = self.tell(f"step{self._step}.x_t", x_t.clone())
            if not torch.equal(told, x_t):
                x_t.copy_(told)
            return self.tell(f"step{self._step}.v_t", original(cache, state, x_t, *rest))

        return call

    def _wrap_denoise(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(cache: Any, *rest: Any) -> Tensor:
            held = {}
            for name in ("keys", "values"):
                layers = enumerate(getattr(cache, name))
                held[name] = tuple(self.tell(f"cache.layers.{i}.{name[0]}", layer, 2) for i, layer in layers)
            self._step = -1
            return self.tell("actions", original(dataclasses.replace(cache, **held), *rest))

        return call


class _AttentionProducts(TorchFunctionMode):
    """Catches what an attention computes itself.

    Queries and weights are the left sides of its two products, logits what becomes of the first product by scaling and
    adding, before anything else reads it.
    """

    def __init__(self, probe: Probe, expert: bool, own: str) -> None:
        super().__init__()
        self.probe, self.expert, self.own, self.seen = probe, expert, own, 0
        self._logits: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if not self.probe.watching(self):
            return func(*args, **kwargs)
        if self._logits is not None and args and args[0] is self._logits and name not in ACCESSORS:
            if name in ELEMENTWISE:
                self._logits = func(*args, **kwargs)
                return self._logits
            args = (self.probe.see_attention(self.expert, f"{self.own}logits", self._logits), *args[1:])
            self._logits = None
        if name not in PRODUCTS:
            return func(*args, **kwargs)
        self.seen += 1
        tensor = {1: "q", 2: "probs"}.get(self.seen)
        if tensor is not None:
            args = (self.probe.see_attention(self.expert, self.own + tensor, args[0]), *args[1:])
        result = func(*args, **kwargs)
        if self.seen == 1:
            self._logits = result
        return result
