"""Stage 3 over static buffers: noise to actions in Euler steps (SPEC 1.4 and 1.5).

`DenoiseLoop` is the seam: `RowsLoop` runs any batch and any configuration; a loop made for one case stands beside it.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ...config import ModelConfig
from ...model import Pi0
from ...quant.fold import FoldedState, Schedule, fold_times, make_schedule, schedule_part
from ..integrate import EulerStep
from .buffers import Buffers, DenoiseBuffers, RequestBuffers
from .graphs import ieee_float32
from .ops import Ops
from .products import Product, Target, multiply, multiply_geglu, target
from .weights import TurboWeights

Steps = int | EulerStep
"""So many uniform steps, or a single one at a time of its own."""


class DenoiseLoop(Protocol):
    """A way to run all steps for one batch."""

    name: str

    def prepare(self, steps: Steps) -> None:
        """Make everything that depends on the number of steps. Allocates; done before a capture, not in it."""

    def run(self, request: RequestBuffers, buffers: Buffers, steps: Steps) -> None:
        """From request.noise, request.state and the cache in buffers.prefill to buffers.denoise.x_t.

        Only launches: no allocation, no waiting. `prepare(steps)` came before.
        """


class Schedules:
    """The folded schedules of the numbers of steps that were asked for, made once each and shared by all loops.

    Keeps only what they are made of: the towers' weights can be freed.
    """

    def __init__(self, model: Pi0) -> None:
        self._model = schedule_part(model)
        self._made: dict[Steps, Schedule] = {}

    def __call__(self, steps: Steps) -> Schedule:
        """The schedule of `steps`; raises ValueError if that is less than 1."""
        if steps not in self._made:
            with ieee_float32(), torch.no_grad():
                if isinstance(steps, EulerStep):
                    self._made[steps] = fold_times(self._model, [steps.time], steps.delta)
                else:
                    self._made[steps] = make_schedule(self._model, steps)
        return self._made[steps]


class RowsLoop:
    """Products over all rows of the batch, one kernel after another: any batch, any configuration."""

    name = "rows"

    def __init__(self, config: ModelConfig, weights: TurboWeights, ops: Ops, schedules: Schedules) -> None:
        self._config = config
        self._weights = weights
        self._ops = ops
        self._schedules = schedules

    def prepare(self, steps: Steps) -> None:
        """Fold the schedule."""
        self._schedules(steps)

    def run(self, request: RequestBuffers, buffers: Buffers, steps: Steps) -> None:
        """See `DenoiseLoop`."""
        schedule, b = self._schedules(steps), buffers.denoise
        state = self._weights.expert.state
        b.x_t.copy_(request.noise.view_as(b.x_t))
        if state is not None:
            torch.addmm(state.state.bias, request.state, state.state.weight.t(), out=b.state_token)
        for step in range(schedule.steps):
            self._begin(schedule, step, b)
            self._tower(modulation_of(schedule, step), request, buffers)
            self._end(schedule, step, b)

    def _begin(self, schedule: Schedule, step: int, b: DenoiseBuffers) -> None:
        """x_t to the stream and, normed, to the first layer."""
        self._suffix(schedule, step, self._weights.expert.state, b)
        scale, shift, _ = norm_of(modulation_of(schedule, step), 0)
        normed = target(self._weights.expert.blocks[0].qkv, b.normed, b.normed_fp8)
        self._ops.rms_norm(b.x, normed.tensor, scale, shift, inverse=normed.inverse)

    def _end(self, schedule: Schedule, step: int, b: DenoiseBuffers) -> None:
        """One Euler step of x_t."""
        out = schedule.action_out
        self._ops.action_out(b.normed, out.weight, out.bias, b.x_t, self._config.horizon)

    def _suffix(self, schedule: Schedule, step: int, state: FoldedState | None, b: DenoiseBuffers) -> None:
        """x_t to suffix rows. For π0 the state token comes first, and actions pass the rest of the action-time MLP."""
        into, horizon = schedule.action_in, self._config.horizon
        if state is None:
            self._ops.action_in(b.x_t, into.weight, into.bias[step], b.x, horizon)
            return
        self._ops.action_in(b.x_t, into.weight, into.bias[step], b.mixed, horizon, "silu")
        self._ops.matmul(b.mixed, state.mix.weight, b.projected, bias=state.mix.bias)
        by_sample = b.x.view(len(b.state_token), horizon + 1, -1)
        by_sample[:, 0].copy_(b.state_token)
        by_sample[:, 1:].copy_(b.projected.view(len(b.state_token), horizon, -1))

    def _tower(self, modulation: Tensor | None, request: RequestBuffers, buffers: Buffers) -> None:
        """b.x, its norm made, through layers and final norm into b.normed; modulation (2·depth+1, 3, width) or None."""
        b, cache, ops, weights = buffers.denoise, buffers.prefill, self._ops, self._weights
        tables, suffix = (weights.cos, weights.sin, request.lengths), self._config.suffix_tokens
        blocks = weights.expert.blocks
        readers: list[Product | None] = [*(block.qkv for block in blocks), None]
        _, _, gate = norm_of(modulation, 0)
        normed = target(readers[0], b.normed, b.normed_fp8)
        for layer, block in enumerate(blocks):
            multiply(ops, normed.tensor, block.qkv, b.qkv)
            ops.rotate_and_store(b.qkv, *tables, b.q, cache.keys[layer], cache.values[layer], suffix)
            attended = target(block.out, b.attended, b.attended_fp8)
            self._attention(layer, request, buffers, attended)
            multiply(ops, attended.tensor, block.out, b.update)
            normed = target(block.gate_up, b.normed, b.normed_fp8)
            scale, shift, next_gate = norm_of(modulation, 2 * layer + 1)
            ops.gated_residual_norm(b.x, b.update, gate, scale, shift, normed.tensor, inverse=normed.inverse)
            hidden = target(block.down, b.hidden, b.hidden_fp8)
            self._hidden(layer, normed.tensor, b, hidden)
            multiply(ops, hidden.tensor, block.down, b.update)
            normed = target(readers[layer + 1], b.normed, b.normed_fp8)
            scale, shift, gate = norm_of(modulation, 2 * layer + 2)
            ops.gated_residual_norm(b.x, b.update, next_gate, scale, shift, normed.tensor, inverse=normed.inverse)

    def _attention(self, layer: int, request: RequestBuffers, buffers: Buffers, into: Target) -> None:
        """Of b.q over the prefix's keys and those of the suffix behind them."""
        b, cache, suffix = buffers.denoise, buffers.prefill, self._config.suffix_tokens
        self._ops.attention_split(
            b.q,
            cache.keys[layer],
            cache.values[layer],
            request.lengths,
            into.tensor,
            suffix,
            b.partial,
            b.partial_lse,
            extra=suffix,
            state_token=self._config.kind == "pi0",
            inverse=into.inverse,
        )

    def _hidden(self, layer: int, x: Tensor, b: DenoiseBuffers, into: Target) -> None:
        """Gate and up, with GeGLU."""
        multiply_geglu(self._ops, x, self._weights.expert.blocks[layer].gate_up, b.gate_up, into)


def note_finite(buffers: Buffers) -> None:
    """buffers.finite: 1.0 where all of x_t is finite, else 0.0. Two launches; `isfinite` and `all` make seven."""
    largest = torch.linalg.vector_norm(buffers.denoise.x_t, math.inf)
    torch.lt(largest, math.inf, out=buffers.finite.view(()))


def modulation_of(schedule: Schedule, step: int) -> Tensor | None:
    """All norms' of one step, (2·depth+1, 3, width) float32, or None where there are none."""
    return None if schedule.modulation is None else schedule.modulation[step]


def norm_of(modulation: Tensor | None, index: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Scale, shift and gate of one norm, each (width,) float32, or nothing for a plain norm."""
    if modulation is None:
        return None, None, None
    scale, shift, gate = modulation[index]
    return scale, shift, gate
