"""Observations with prompts of given lengths and cameras that may be missing, and a recorder for no GPU."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from turbo_support import uint8_input

from turbopi import InputError, ModelInput, Pi0, preset
from turbopi.audit.golden import hash_model
from turbopi.config import ModelConfig
from turbopi.engine import Engine

TWO_CAMERAS = (True, True, False)


class Rerun:
    """Records by keeping the work itself; counts what it was asked to record."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        work()
        return work


def model(name: str = "pi05-tiny", device: str = "cpu", dtype: torch.dtype = torch.float32, **changes: object) -> Pi0:
    config: ModelConfig = dataclasses.replace(preset(name), **changes)  # type: ignore[arg-type]
    return hash_model(config, 7, dtype, device)


def observation(
    config: ModelConfig, lengths: Sequence[int], cameras: Sequence[Sequence[bool]] | None = None, seed: int = 0
) -> tuple[ModelInput, torch.Tensor]:
    """One sample a length, on the CPU; and noise."""
    g = torch.Generator().manual_seed(seed)
    batch, size, slots = len(lengths), config.vision.image_size, config.max_tokens
    inputs = ModelInput(
        images=torch.rand(batch, config.cameras, 3, size, size, generator=g) * 2 - 1,
        image_mask=torch.tensor(cameras or [TWO_CAMERAS] * batch),
        tokens=torch.randint(3, 1000, (batch, slots), generator=g),
        token_mask=torch.arange(slots) < torch.tensor(lengths)[:, None],
        state=torch.rand(batch, config.state_dim, generator=g) * 2 - 1,
    )
    return inputs, torch.randn(batch, config.horizon, config.action_dim, generator=g)


def unfit(x: ModelInput, noise: torch.Tensor) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """State and noise that a copy would broadcast or convert: what is wrong, state, noise."""
    return [
        ("state", x.state[:1], noise),
        ("state", x.state.double(), noise),
        ("noise", x.state, noise[:1]),
        ("noise", x.state, noise.double()),
    ]


def takes_only_what_fits(engine: Engine, reference: Pi0, steps: int) -> None:
    """A copy into static memory would take grey levels for floats, and one noise for every sample."""
    x, noise = observation(reference.config, [9, 20])
    grey, _ = uint8_input(x)
    for images in (grey.images, x.images[:, :, :, :1]):
        with pytest.raises(InputError, match=r"^images is "):
            engine.encode_images(images, x.image_mask)
    with torch.no_grad():
        cache = reference.prefill(reference.encode_images(x.images, x.image_mask), x.image_mask, x.tokens, x.token_mask)
    for what, state, start in unfit(x, noise):
        with pytest.raises(InputError, match=f"^{what} is .*float.*, expected"):
            engine.denoise(cache, state, start, steps)
