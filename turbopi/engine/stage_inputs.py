"""What goes into a stage, checked: a copy into static memory would broadcast or convert what does not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError


def check_stage_input(name: str, value: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise InputError unless a tensor has this shape and one of these dtypes; looks at no value."""
    if tuple(value.shape) != shape or value.dtype not in dtypes:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        raise InputError(f"{name} is {got}, expected {shape} {known}")


def check_images(config: ModelConfig, images: Tensor, batch: int, *, uint8: bool = False) -> None:
    """Raise InputError unless images are (B,cameras,3,S,S) float32, or uint8 where the engine scales them itself."""
    size = config.vision.image_size
    dtypes = (torch.float32, torch.uint8) if uint8 else (torch.float32,)
    check_stage_input("images", images, (batch, config.cameras, 3, size, size), dtypes)


def check_state_and_noise(config: ModelConfig, state: Tensor, noise: Tensor, batch: int) -> None:
    """Raise InputError unless state is (B,32) and noise (B,H,32), both float32, for the cache's B."""
    check_stage_input("state", state, (batch, config.state_dim), (torch.float32,))
    check_stage_input("noise", noise, (batch, config.horizon, config.action_dim), (torch.float32,))
