"""The turbo engine, observed kernel by kernel: its buffers told under the reference's names, undoing what was folded.

The engine's assembly is its own; only its table of operations is wrapped. Should the assembly change, an audit stops
with an error that says where it no longer follows (`turbo_scripts`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..engine.capture import CudaGraphRecorder
from ..engine.turbo import TurboEngine
from ..engine.turbo.ops import Ops, twin_ops
from ..model import Pi0
from .names import place, tensor_names
from .sample import ALLOWED, Sample, Visit, wanted
from .turbo_scripts import ROLES, Expect, Script, Scripts
from .turbo_tell import Teller


class TurboSubject:
    """Turbo's kernels over the engine's weights; its denoise loop in the form that goes kernel by kernel.

    A stage of which nothing is to be told runs as a CUDA graph of the same kernels: most of an audit's runs replace
    tensors of one stage only, and telling takes the host much longer than the kernels take the GPU.

    Args:
        name: ENGINE:PRECISION.
        engine: any turbo engine; it is not changed.
        reference: in float32, for the norms' weights, which turbo has folded into products.
    """

    granularity = "every buffer between kernels"
    wide_logits = True
    allowed = ALLOWED

    def __init__(self, name: str, engine: TurboEngine, reference: Pi0) -> None:
        self.name, self.reference, self.deployed = name, reference, engine
        self._engine = engine.observed(self._wrapped)
        recorder = CudaGraphRecorder(engine.device) if engine.device.type == "cuda" else None
        self._unwatched = self._engine.beside(self._plain, recorder)
        self._script: Script | None = None
        self._expected: Expect | None = None

    @torch.no_grad()
    def run(self, sample: Sample, visit: Visit) -> Tensor:
        """See `Subject`."""
        self._script, self._expected = None, None
        x, scripts = sample.inputs, Scripts(Teller(visit, self._plain), self.reference, sample)
        told = {
            stage: any(wanted(visit, name) for name in names)
            for stage, names in _names_of_stages(self._engine.config, sample.cameras, sample.steps).items()
        }
        engine = self._begin(scripts.vision() if told["encode_images"] else None)
        tokens = engine.encode_images(x.images, x.image_mask)
        engine = self._begin(scripts.prefix() if told["prefill"] else None)
        cache = engine.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
        engine = self._begin(scripts.suffix() if told["denoise"] else None)
        actions = engine.denoise(cache, x.state, sample.noise, sample.steps)
        self._finish()
        return actions.cpu()

    def _begin(self, script: Script | None) -> TurboEngine:
        """What runs the next stage, told by a script or not at all."""
        self._finish()
        if script is None:
            return self._unwatched
        self._script, self._expected = script, next(script, None)
        return self._engine

    def _finish(self) -> None:
        if self._expected is not None:
            raise RuntimeError(f"the turbo engine's stage ended before {self._expected.role!r}; its assembly changed")

    def _wrapped(self, ops: Ops) -> Ops:
        self._plain, twins = ops, twin_ops()
        watched: dict[str, Any] = {
            f.name: self._watched(f.name, getattr(ops, f.name), _parameters(getattr(twins, f.name)))
            for f in fields(ops)
            if callable(getattr(ops, f.name))
        }
        return replace(ops, **watched)

    def _watched(self, name: str, operation: Callable[..., Any], parameters: tuple[str, ...]) -> Callable[..., Any]:
        """The operation, and the script told of its arguments under the names that its twin gives them."""
        role = ROLES.get(name, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = {**dict(zip(parameters, args, strict=False)), **kwargs, "op": name}
            self._check(name, role)
            if self._expected is not None and self._expected.before:
                self._send(arguments)
                self._check(name, role)
            arguments["result"] = result = operation(*args, **kwargs)
            self._send(arguments)
            return result

        return call

    def _check(self, name: str, role: str) -> None:
        if self._expected is None or self._expected.role != role:
            wanted = "nothing more" if self._expected is None else repr(self._expected.role)
            raise RuntimeError(f"the turbo engine runs {name}, an audit expects {wanted}; its assembly changed")

    def _send(self, arguments: dict[str, Any]) -> None:
        assert self._script is not None
        try:
            self._expected = self._script.send(arguments)
        except StopIteration:
            self._expected = None


@cache
def _names_of_stages(config: ModelConfig, cameras: tuple[int, ...], steps: int) -> dict[str, tuple[str, ...]]:
    """By stage, the tensors that are told while it runs: the cache is told as stage 3 reads it."""
    found: dict[str, list[str]] = {"encode_images": [], "prefill": [], "denoise": []}
    for name in tensor_names(config, cameras, steps):
        where = place(name)
        found["denoise" if where.tower == "cache" else where.stage].append(name)
    return {stage: tuple(names) for stage, names in found.items()}


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
