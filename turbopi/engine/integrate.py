"""Stage 3 step by step: other times than the uniform ones, and steering towards a chunk that is being executed.

`denoise` is the usual way. `integrate` is the same Euler loop with its times given, and with something done to the
velocity or to x_t at every step (SPEC 4.3, real-time chunking).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..config import ModelConfig
from ..model import Pi0, PrefixCache
from ..model.expert import suffix_visibility
from ..model.flow import time_embedding, time_schedule
from ..model.gemma import AdaRMSNorm, Block, attention_bias, gated_residual
from ..model.numerics import PROFILES
from .base import Engine


@dataclass(frozen=True)
class EulerStep:
    """One evaluation: the velocity at `time`, rounded to float32, then x_t += delta · v."""

    time: float
    delta: float


def uniform_steps(config: ModelConfig, steps: int) -> tuple[EulerStep, ...]:
    """The reference's own schedule: the times of the model's numerics profile, -1/steps each.

    LeRobot's times are kept in double: it computes the strength of its guidance from them.
    """
    delta, mode = -1.0 / steps, PROFILES[config.numerics].time
    times = time_schedule(steps, mode)
    if mode == "indexed":
        times = [1.0 + index * delta for index in range(steps)]
    return tuple(EulerStep(time, delta) for time in times)


def steps_at(times: Sequence[float]) -> tuple[EulerStep, ...]:
    """Evaluations at given times, from 1 (noise) downwards; the last step goes to 0 (actions).

    Raises ValueError unless the times begin at 1, decrease and stay above 0.
    """
    numbers = all(isinstance(time, int | float) and not isinstance(time, bool) for time in times)
    decreasing = numbers and all(a > b for a, b in pairwise(times))
    if not times or not decreasing or times[0] != 1.0 or not times[-1] > 0.0:
        raise ValueError(f"times must begin at 1, decrease and stay above 0, got {tuple(times)}")
    ends = (*times[1:], 0.0)
    return tuple(EulerStep(time, end - time) for time, end in zip(times, ends, strict=True))


@dataclass(frozen=True, eq=False)
class Guidance:
    """Real-time chunking by guidance: the actions to come are pulled towards what is left of the chunk before.

    Attributes:
        previous: (B,H,action_dim) float32, normalised, what is left of the chunk before, then 0.
        weights: (H,) float32, how much each action is pulled.
        limit: of the guidance strength.
        true_jacobian: multiply the pull by the Jacobian of the predicted actions, as the paper does; LeRobot's code
            takes the identity for it (SPEC 4.3).
    """

    previous: Tensor
    weights: Tensor
    limit: float
    true_jacobian: bool = False

    def to(self, device: torch.device) -> Guidance:
        """The same on another device."""
        return replace(self, previous=self.previous.to(device), weights=self.weights.to(device))


@dataclass(frozen=True, eq=False)
class FixedPrefix:
    """Real-time chunking by conditioning: the first actions are given, and marked as such by their own time 0.

    For models that were trained so. `previous` is (B,H,action_dim) float32; its first `count` actions stand fixed.
    """

    previous: Tensor
    count: int

    def to(self, device: torch.device) -> FixedPrefix:
        """The same on another device."""
        return replace(self, previous=self.previous.to(device))


Steering = Guidance | FixedPrefix


@runtime_checkable
class IntegratingEngine(Engine, Protocol):
    """An engine whose stage 3 takes times and steering."""

    def integrate(
        self,
        cache: PrefixCache,
        state: Tensor,
        noise: Tensor,
        steps: tuple[EulerStep, ...],
        steering: Steering | None = None,
    ) -> Tensor:
        """Stage 3 as `denoise`, over `steps`. Raises ValueError for a steering that the engine cannot do."""


def guidance_strength(time: float, limit: float) -> float:
    """How strongly the pull acts at a time: (1-τ)/τ · ((1-τ)²+τ²)/(1-τ)² at τ = 1 - time, at most `limit`."""
    tau = torch.tensor(1 - time, dtype=torch.float32)
    squared = (1 - tau) ** 2
    strength = (1 - tau) / tau * ((squared + tau**2) / squared)
    return min(float(torch.nan_to_num(strength, posinf=limit)), limit)


def guided(x_t: Tensor, v_t: Tensor, time: float, guidance: Guidance) -> Tensor:
    """The velocity with the pull in it, the Jacobian taken as the identity; all (B,H,action_dim) float32."""
    pull = (guidance.previous - (x_t - time * v_t)) * guidance.weights[:, None]
    return v_t - guidance_strength(time, guidance.limit) * pull


def integrate_model(
    model: Pi0,
    cache: PrefixCache,
    state: Tensor,
    noise: Tensor,
    steps: Sequence[EulerStep],
    steering: Steering | None,
) -> Tensor:
    """The Euler loop over the reference; tensors on its device. Differentiates only for `true_jacobian`."""
    x_t = noise
    for step in steps:
        time = torch.full((len(noise),), step.time, dtype=torch.float32, device=noise.device)
        if isinstance(steering, FixedPrefix):
            x_t = _clamped(x_t, steering)
            v_t = conditioned_velocity(model, cache, state, x_t, time, steering.count)
        elif isinstance(steering, Guidance) and steering.true_jacobian:
            v_t = _pulled_back(partial(_velocity, model, cache, state, time), x_t, step.time, steering)
        else:
            v_t = model.velocity(cache, state, x_t, time)
            if steering is not None:
                v_t = guided(x_t, v_t, step.time, steering)
        x_t = x_t + step.delta * v_t
    return _clamped(x_t, steering) if isinstance(steering, FixedPrefix) else x_t


def _velocity(model: Pi0, cache: PrefixCache, state: Tensor, time: Tensor, x_t: Tensor) -> Tensor:
    return model.velocity(cache, state, x_t, time)


def _clamped(x_t: Tensor, steering: FixedPrefix) -> Tensor:
    return torch.cat((steering.previous[:, : steering.count], x_t[:, steering.count :]), dim=1)


def _pulled_back(velocity: Callable[[Tensor], Tensor], x_t: Tensor, time: float, guidance: Guidance) -> Tensor:
    """As `guided`, with the vector-Jacobian product of the predicted actions."""
    with torch.enable_grad():
        x = x_t.detach().requires_grad_(True)
        v_t = velocity(x)
        predicted = x - time * v_t
        error = (guidance.previous - predicted.detach()) * guidance.weights[:, None]
        (pull,) = torch.autograd.grad(predicted, x, error)
    return v_t.detach() - guidance_strength(time, guidance.limit) * pull


def conditioned_velocity(
    model: Pi0, cache: PrefixCache, state: Tensor, x_t: Tensor, time: Tensor, count: int
) -> Tensor:
    """The velocity where the first `count` actions have time 0 and the rest `time` (B,): every token its own norms.

    With `count` 0 it is `Pi0.velocity`. cache of B samples, state (B,32), x_t (B,H,32) -> (B,H,32) float32.
    """
    config, expert = model.config, model.expert
    batch, horizon, _ = x_t.shape
    times = time[:, None].expand(batch, horizon).clone()
    times[:, :count] = 0.0
    embs, cond = _suffix_of_times(model, state, x_t, times)
    positions = cache.lengths[:, None] + torch.arange(config.suffix_tokens, device=x_t.device)
    h = embs.to(expert.dtype)
    cos, sin = expert.rope(positions, expert.dtype)
    bias = _suffix_bias(config, cache)
    for layer, block in enumerate(expert.blocks):
        normed, gate = _normed(block.input_layernorm, h, cond)
        k, v = block.self_attn.keys_values(normed, cos, sin)
        k, v = torch.cat((cache.keys[layer], k), dim=2), torch.cat((cache.values[layer], v), dim=2)
        h = _finished(block, h, gate, block.self_attn(normed, cos, sin, k, v, bias), cond)
    out, _ = _normed(expert.norm, h, cond)
    return model.action_out_proj(out[:, -horizon:].float())


def _suffix_of_times(model: Pi0, state: Tensor, x_t: Tensor, times: Tensor) -> tuple[Tensor, Tensor | None]:
    """`Pi0.embed_suffix` with a time an action: times (B,H) -> suffix tokens, and π0.5's conditions (B,H,width)."""
    config = model.config
    angles = torch.float32 if model.numerics.float32_time_angles else torch.float64
    te = time_embedding(times.flatten(), config.expert.width, config.min_period, config.max_period, angles)
    te = te.unflatten(0, times.shape)
    silu = torch.nn.functional.silu
    actions = model.action_in_proj(x_t)
    if config.kind == "pi05":
        return actions, silu(model.time_mlp_out(silu(model.time_mlp_in(te))))
    mixed = model.action_time_mlp_out(silu(model.action_time_mlp_in(torch.cat((actions, te), dim=-1))))
    return torch.cat((model.state_proj(state)[:, None], mixed), dim=1), None


def _suffix_bias(config: ModelConfig, cache: PrefixCache) -> Tensor | None:
    if cache.valid is None and config.kind == "pi05":
        return None
    return attention_bias(suffix_visibility(config, cache.visible))


def _normed(norm: torch.nn.Module, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A norm with a condition a token: tokens stand as samples of one token, each with its own condition."""
    if cond is None or not isinstance(norm, AdaRMSNorm):
        normed, gate = norm(x, None)
        return normed, gate
    normed, gate = norm(x.flatten(0, 1)[:, None], cond.flatten(0, 1))
    return normed.view(x.shape), gate.view(x.shape)


def _finished(block: Block, x: Tensor, gate: Tensor | None, attended: Tensor, cond: Tensor | None) -> Tensor:
    x = gated_residual(x, attended, gate)
    normed, gate = _normed(block.post_attention_layernorm, x, cond)
    return gated_residual(x, block.mlp(normed), gate)
