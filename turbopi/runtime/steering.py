"""What the caller knows of the chunk before, made into the steering of the next."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config import ModelConfig
from ..engine.integrate import Steering
from .config import RtcConfig
from .guidance import fixed_prefix, guidance


@dataclass(frozen=True)
class Follow:
    """Actions of the last chunk that were executed before an inference begins, and those executed during it."""

    executed: int
    delay: int

    def __post_init__(self) -> None:
        if self.executed < 0 or self.delay < 0:
            raise ValueError(f"executed and delay count actions, got {self.executed} and {self.delay}")


def steering_of(config: RtcConfig, left_over: Tensor, delay: int, model: ModelConfig) -> Steering | None:
    """The steering towards what is left of a chunk; None where nothing is.

    Args:
        config: of real-time chunking.
        left_over: (1,L,A') float32, normalised actions that were not executed, in the robot's dimensions.
        delay: of them, those that will have been executed when the next chunk is there.
        model: whose chunk it will be.
    """
    if left_over.shape[1] == 0:
        return None
    shape = (1, model.horizon, model.action_dim)
    if config.method == "conditioned":
        return fixed_prefix(left_over, shape, delay)
    horizon = left_over.shape[1] if config.horizon is None else config.horizon
    return guidance(left_over, shape, delay, horizon, config.schedule, config.limit, config.method == "guided_vjp")
