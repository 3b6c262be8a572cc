"""Flow matching: time schedule, time embedding, and the training target (SPEC 1.4 and 1.5).

t = 1 is noise and t = 0 is data. Noise, actions and time stay float32 in every mode.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def time_schedule(steps: int, mode: Literal["accumulated", "indexed"]) -> list[float]:
    """The `steps` times from 1 down to 1/steps at which the velocity is evaluated, as float32 values.

    "accumulated" adds a float32 dt step by step (openpi); "indexed" rounds 1 + s·dt once (lerobot).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if mode == "indexed":
        return [torch.tensor(1.0 + s * (-1.0 / steps), dtype=torch.float32).item() for s in range(steps)]
    dt = torch.tensor(-1.0 / steps, dtype=torch.float32)
    time = torch.tensor(1.0, dtype=torch.float32)
    times = []
    for _ in range(steps):
        times.append(time.item())
        time = time + dt
    return times


def time_embedding(
    time: Tensor, width: int, min_period: float, max_period: float, angle_dtype: torch.dtype = torch.float64
) -> Tensor:
    """(B,) float32 times -> (B,width) float32: sines, then cosines, periods spaced geometrically.

    Angles in float32, as the JAX original computes them, are off by up to 1e-4 near t = 1.
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=angle_dtype, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    angles = (1.0 / period * 2 * math.pi)[None, :] * time[:, None]
    return torch.cat((angles.sin(), angles.cos()), dim=1).to(time.dtype)


def sample_time(batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """(batch,) float32 training times: Beta(1.5, 1) · 0.999 + 0.001, so that noisy times are seen more often."""
    uniform = torch.rand(batch, generator=generator, device=device)
    return uniform ** (1 / 1.5) * 0.999 + 0.001


def noised(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The point x_t on the straight path and the velocity to learn.

    actions, noise (B,H,D) float32, time (B,) -> x_t = t·noise + (1-t)·actions and noise - actions.
    """
    t = time[:, None, None]
    return t * noise + (1 - t) * actions, noise - actions
