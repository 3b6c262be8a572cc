"""What is timed: how many cameras, prompt tokens and actions, and the observation that has them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig
from ..model import ModelInput


@dataclass(frozen=True)
class Workload:
    """The shape of a tick.

    Attributes:
        name: for the receipt.
        views: cameras that are there, of the model's slots.
        prompt_tokens: valid ones.
        horizon: actions per chunk.
        steps: flow-matching evaluations.
    """

    name: str
    views: int
    prompt_tokens: int
    horizon: int
    steps: int = 10

    def __post_init__(self) -> None:
        if self.views < 0 or self.prompt_tokens < 0 or self.views + self.prompt_tokens == 0:
            raise ValueError(f"a workload needs cameras or prompt tokens, got {self.views} and {self.prompt_tokens}")
        if min(self.horizon, self.steps) < 1:
            raise ValueError(f"horizon and steps must be at least 1, got {self.horizon} and {self.steps}")

    def fit(self, config: ModelConfig) -> ModelConfig:
        """The configuration with this horizon, and prompt slots enough. Raises ValueError for too many views."""
        if self.views > config.cameras:
            raise ValueError(
                f"workload {self.name!r} has {self.views} views, the model has {config.cameras} camera slots"
            )
        slots = max(config.max_tokens, self.prompt_tokens)
        return dataclasses.replace(config, horizon=self.horizon, max_tokens=slots)

    def prefix_tokens(self, config: ModelConfig) -> int:
        """Valid tokens of the prefix."""
        return self.views * config.vision.tokens + self.prompt_tokens


WORKLOADS: dict[str, Workload] = {
    "libero": Workload("libero", views=2, prompt_tokens=40, horizon=10),
    "droid": Workload("droid", views=2, prompt_tokens=80, horizon=15),
    "full": Workload("full", views=3, prompt_tokens=200, horizon=50),
}


def workload(name: str) -> Workload:
    """The workload of that name; raises ValueError that lists the known ones."""
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; known: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def observation(config: ModelConfig, shape: Workload, batch: int, seed: int = 0) -> tuple[ModelInput, Tensor]:
    """`batch` random observations as a policy hands them over, on the CPU with all slots; and noise.

    Images are float32 made of whole grey values, so that `as_uint8` gives the same picture.
    """
    g = torch.Generator().manual_seed(seed)
    size, slots = config.vision.image_size, config.max_tokens
    inputs = ModelInput(
        images=torch.randint(0, 256, (batch, config.cameras, 3, size, size), generator=g).float() / 255 * 2 - 1,
        image_mask=torch.arange(config.cameras).expand(batch, -1) < shape.views,
        tokens=torch.randint(3, config.vocab_size, (batch, slots), generator=g),
        token_mask=torch.arange(slots).expand(batch, -1) < shape.prompt_tokens,
        state=torch.rand(batch, config.state_dim, generator=g) * 2 - 1,
    )
    return inputs, torch.randn(batch, config.horizon, config.action_dim, generator=g)


def as_uint8(inputs: ModelInput) -> ModelInput:
    """The same observation with images as uint8, for engines that scale them on the device."""
    images = ((inputs.images + 1) * 127.5).round().to(torch.uint8)
    return dataclasses.replace(inputs, images=images)
