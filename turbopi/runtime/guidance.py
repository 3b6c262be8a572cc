"""What is left of a chunk becomes the steering of the next (SPEC 4.3, real-time chunking).

The robot goes on executing the old chunk while the next one is computed. What it will have executed by then is known;
the next chunk is made to begin with that, and to leave it smoothly.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..engine.integrate import FixedPrefix, Guidance

WeightSchedule = Literal["LINEAR", "EXP", "ONES", "ZEROS"]


def guidance_weights(actions: int, delay: int, horizon: int, schedule: WeightSchedule) -> Tensor:
    """How much each action of the next chunk is pulled, (actions,) float32: as LeRobot weighs them.

    Args:
        actions: H, of the chunk.
        delay: actions that will have been executed when the next chunk is there: weight 1.
        horizon: actions from which on nothing is pulled: weight 0.
        schedule: between the two: "LINEAR" falls in a line, "EXP" faster, "ONES" stays, "ZEROS" is 0 at once.
    """
    delay = min(delay, horizon)
    between = max(0, horizon - delay)
    line = torch.linspace(1.0, 0.0, between + 2)[1:-1]
    falls = {
        "LINEAR": line,
        "EXP": line * (torch.expm1(line) / (math.e - 1)),
        "ONES": torch.ones(between),
        "ZEROS": torch.zeros(between),
    }
    weights = torch.cat((torch.ones(delay), falls[schedule], torch.zeros(max(0, actions - delay - between))))
    return weights[:actions]


def guidance(
    left_over: Tensor,
    shape: tuple[int, int, int],
    delay: int,
    horizon: int,
    schedule: WeightSchedule,
    limit: float,
    true_jacobian: bool = False,
) -> Guidance:
    """Guidance towards (B,L,A') normalised actions, padded with zeros to `shape` (B,H,action_dim).

    Nothing is pulled from action min(horizon, L) on. Padded dimensions are pulled to 0 where the weight says so.
    """
    previous = padded(left_over, shape)
    weights = guidance_weights(shape[1], delay, min(horizon, left_over.shape[1]), schedule)
    return Guidance(previous, weights, limit, true_jacobian)


def fixed_prefix(left_over: Tensor, shape: tuple[int, int, int], delay: int) -> FixedPrefix:
    """The first `delay` actions of (B,L,A') fixed, at most as many as there are."""
    return FixedPrefix(padded(left_over, shape), min(delay, left_over.shape[1]))


def padded(left_over: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(B,L,A') float32 with zeros up to `shape`; what is beyond its actions is cut."""
    target = torch.zeros(shape)
    length = min(shape[1], left_over.shape[1])
    target[:, :length, : left_over.shape[2]] = left_over[:, :length]
    return target
