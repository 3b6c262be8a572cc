"""Tiny models, one observation, and calibrations for the tests of exported graphs."""

from __future__ import annotations

from functools import cache

import torch

from turbopi import ModelInput, Pi0, preset
from turbopi.audit.golden import hash_model
from turbopi.config import ModelConfig
from turbopi.quant import Calibration, Quantisation, model_hash
from turbopi.quant.observe import input_ranges, synthetic_batches, watch
from turbopi.quant.plan import Format, PrecisionPlan

STEPS = 2
PROMPT = 20
"""Valid prompt tokens, in a bucket of 32: some slots are empty."""
BUCKET = 32


@cache
def model(name: str = "pi05-tiny") -> Pi0:
    return hash_model(preset(name), 7, torch.float32)


def observation(
    config: ModelConfig, cameras: tuple[bool, ...] = (True, False, True)
) -> tuple[ModelInput, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    size = config.vision.image_size
    inputs = ModelInput(
        images=torch.rand(1, config.cameras, 3, size, size, generator=g) * 2 - 1,
        image_mask=torch.tensor([cameras]),
        tokens=torch.randint(3, 1000, (1, config.max_tokens), generator=g),
        token_mask=torch.arange(config.max_tokens)[None] < PROMPT,
        state=torch.rand(1, config.state_dim, generator=g) * 2 - 1,
    )
    return inputs, torch.randn(1, config.horizon, config.action_dim, generator=g)


@cache
def calibration(name: str = "pi05-tiny") -> Calibration:
    found = input_ranges(watch(model(name), iter(synthetic_batches(preset(name), 2)), 2), "max", 100.0)
    return Calibration(model_hash(model(name)), "libero", "noise", 2, "max", 100.0, found, synthetic=True)


def quantisation(chosen: Format, exceptions: dict[str, Format] | None = None, name: str = "pi05-tiny") -> Quantisation:
    return Quantisation(PrecisionPlan(chosen, exceptions or {}), calibration(name))
