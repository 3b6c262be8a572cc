"""The reference through torch.compile, in CUDA graphs: the easy fast way on any CUDA GPU, and the baseline to beat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..model import Pi0, PrefixCache
from ..model.flow import time_schedule
from ..quant import Quantisation
from .base import Precision, register_engine
from .capture import CudaGraphRecorder, require_cuda
from .graphed import GraphedEngine, StageGraphs

BUCKET = 16
"""Prefix lengths are multiples of this: a compilation takes tens of seconds, 15 more tokens nearly nothing."""
SHAPES = 64
"""Compiled shapes of one stage, beyond which torch.compile refuses: more than `graphed.CAPACITY` stay captured."""
MODES = {"compiled": "default", "compiled-max": "max-autotune-no-cudagraphs"}
"""torch.compile's mode by engine name. Graphs are captured here, not by the compiler: its own own their memory."""

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


class CompiledFunctions:
    """The stages compiled whole, except that one evaluation of `denoise` is compiled and its loop stays outside.

    Unrolled, ten steps would take ten times as long to compile and give the same kernels.
    """

    def __init__(self, model: Pi0, compiler: Compiler) -> None:
        self.model = model
        self._encode = compiler(lambda images: model._encode_camera(images, None))
        self._prefill = compiler(self._prefix_tensors)
        self._advance = compiler(self._one_step)

    def _prefix_tensors(self, embs: Tensor, valid: Tensor | None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        cache = self.model.vlm(embs, valid)
        return list(cache.keys), list(cache.values), cache.lengths

    def _one_step(
        self,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        lengths: Tensor,
        valid: Tensor | None,
        state: Tensor,
        x_t: Tensor,
        time: Tensor,
        dt: Tensor,
    ) -> Tensor:
        return x_t + dt * self.model.velocity(PrefixCache(keys, values, lengths, valid), state, x_t, time)

    def encode(self, images: Tensor) -> Tensor:
        """See `StageFunctions`."""
        tokens: Tensor = self._encode(images)
        return tokens

    def prefill(self, embs: Tensor, valid: Tensor | None) -> PrefixCache:
        """See `StageFunctions`."""
        keys, values, lengths = self._prefill(embs, valid)
        return PrefixCache(tuple(keys), tuple(values), lengths, valid)

    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """See `StageFunctions`."""
        # Tensors, not numbers: a number would be compiled in, and each step would be compiled anew.
        dt = torch.full((), -1.0 / steps, dtype=torch.float32, device=noise.device)
        x_t = noise
        for t in time_schedule(steps, self.model.numerics.time):
            time = torch.full((len(noise),), t, dtype=torch.float32, device=noise.device)
            x_t = self._advance(cache.keys, cache.values, cache.lengths, cache.valid, state, x_t, time, dt)
        return x_t


def inductor(mode: str) -> Compiler:
    """torch.compile for fixed shapes; a graph break or too many shapes are errors, not a quiet return to eager."""

    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

        def call(*inputs: Any) -> Any:
            with torch._dynamo.config.patch(recompile_limit=SHAPES):
                return compiled(*inputs)

        return call

    return compiler


class CompiledEngine(GraphedEngine):
    """`Pi0` through torch.compile, captured. Equal to eager within rounding; a new shape is compiled when first seen.

    Prefix lengths are rounded up to multiples of 16 and the rest hidden by a mask, so that a prompt that changes by
    a few tokens is not compiled again. See `StageGraphs` for how long results are valid.
    """

    def __init__(self, model: Pi0, precision: Precision, name: str = "compiled") -> None:
        self.name = name
        self._details = {}
        self.model = model
        self.precision = precision
        self.config = model.config
        self.device = require_cuda(next(model.parameters()).device, name)
        functions = CompiledFunctions(model, inductor(MODES[name]))
        self._graphs = StageGraphs(model, functions, CudaGraphRecorder(self.device), bucket=BUCKET)


@register_engine("compiled")
def _default(model: Pi0, precision: Precision, quantisation: Quantisation | None = None) -> CompiledEngine:
    return CompiledEngine(model, precision, "compiled")


@register_engine("compiled-max")
def _max_autotune(model: Pi0, precision: Precision, quantisation: Quantisation | None = None) -> CompiledEngine:
    return CompiledEngine(model, precision, "compiled-max")
