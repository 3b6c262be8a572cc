"""What the times of the denoise loop decide, computed by the reference's functions and written as constants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.flow import time_embedding, time_schedule
from ..model.numerics import PROFILES
from .layers import Modulation
from .weights import Weights
from .writer import GraphWriter


@dataclass(frozen=True)
class StepConstants:
    """The constants of one step.

    Attributes:
        step: which, from 0.
        steps: how many there are.
        norms: π0.5: (3, width) scale with its 1 added, shift and gate by norm, the last norm last; π0: none.
        time_bias_array: π0: (width,) what the time adds within the action-time MLP; π0.5: None.
    """

    step: int
    steps: int
    norms: tuple[np.ndarray, ...]
    time_bias_array: np.ndarray | None

    def _modulation(self, w: GraphWriter, index: int) -> Modulation:
        name = f"expert.modulations.{index}.step{self.step}of{self.steps}"
        scale, shift, gate = self.norms[index]
        return Modulation(
            w.derived(f"{name}.scale", scale), w.derived(f"{name}.shift", shift), w.derived(f"{name}.gate", gate)
        )

    def modulations(self, w: GraphWriter, layer: int) -> tuple[Modulation | None, Modulation | None]:
        """Of a layer's two norms; None for π0, whose norms have weights."""
        if not self.norms:
            return None, None
        return self._modulation(w, 2 * layer), self._modulation(w, 2 * layer + 1)

    def last(self, w: GraphWriter) -> Modulation | None:
        """Of the final norm; None for π0."""
        return self._modulation(w, len(self.norms) - 1) if self.norms else None

    def time_bias(self, w: GraphWriter) -> ir.Value:
        """π0: (width,), the time embedding through its part of the action-time MLP, bias included."""
        assert self.time_bias_array is not None
        return w.derived(f"expert.time_bias.step{self.step}of{self.steps}", self.time_bias_array)


def action_weight(w: GraphWriter) -> ir.Value:
    """π0: (width, width), the action half of the action-time MLP's first linear, transposed."""
    width = w.weights.config.expert.width
    name = "action_time_mlp_in.weight"
    return w.shared(f"{name}.actions", lambda: w.transpose(w.split(w.parameter(name), (width, width), axis=1)[0], 1, 0))


def step_constants(weights: Weights, steps: int) -> list[StepConstants]:
    """The constants of all steps, in order."""
    config, profile = weights.config, PROFILES[weights.config.numerics]
    angles = torch.float32 if profile.float32_time_angles else torch.float64
    times = torch.tensor(time_schedule(steps, profile.time), dtype=torch.float32)
    embedded = time_embedding(times, config.expert.width, config.min_period, config.max_period, angles)
    if config.kind == "pi0":
        second = weights.tensor("action_time_mlp_in.weight")[:, config.expert.width :]
        biases = F.linear(embedded, second, weights.tensor("action_time_mlp_in.bias"))
        return [StepConstants(i, steps, (), row.numpy()) for i, row in enumerate(biases)]
    cond = F.silu(_linear(weights, "time_mlp_out", F.silu(_linear(weights, "time_mlp_in", embedded))))
    names = [
        f"expert.layers.{layer}.{norm}"
        for layer in range(config.expert.depth)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    by_norm = []
    for name in (*names, "expert.norm"):
        # (steps, 3, width): scale, shift, gate, as the reference cuts them.
        three = _linear(weights, f"{name}.dense", cond).unflatten(-1, (3, config.expert.width)).clone()
        three[:, 0] += 1.0
        by_norm.append(three.numpy())
    return [StepConstants(i, steps, tuple(norm[i] for norm in by_norm), None) for i in range(steps)]


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights.tensor(f"{name}.weight"), weights.tensor(f"{name}.bias"))
