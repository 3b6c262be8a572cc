"""Observations as a model takes them, with noise to start from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..model import ModelInput
from ..policy import Policy

MINIMUM_FRAMES = 8
"""Fewer do not show how far a model's activations reach."""


def model_inputs(
    policy: Policy, observations: Sequence[Mapping[str, Any]], *, minimum: int = MINIMUM_FRAMES, seed: int = 0
) -> Iterator[tuple[ModelInput, Tensor]]:
    """Each observation through the policy's transforms, as a batch of one on the CPU, with seeded noise (1,H,32).

    Images are float32, whatever the policy's engine takes.

    Raises:
        InputError: fewer than `minimum` observations, or one that the policy cannot use; says which.
    """
    if len(observations) < minimum:
        raise InputError(f"{len(observations)} frames are too few, at least {minimum} are needed; collect more")
    return _inputs(policy, observations, torch.Generator().manual_seed(seed))


def _inputs(
    policy: Policy, observations: Iterable[Mapping[str, Any]], generator: torch.Generator
) -> Iterator[tuple[ModelInput, Tensor]]:
    config = policy.engine.config
    transforms = replace(policy.transforms, uint8_images=False)
    for index, observation in enumerate(observations):
        try:
            arrays, _ = transforms.inputs(observation)
            values = {f.name: torch.from_numpy(getattr(arrays, f.name))[None] for f in fields(ModelInput)}
            inputs = ModelInput(**values)
            inputs.check(config)
        except InputError as error:
            name = policy.transforms.robot.name
            raise InputError(f"frame {index} is none of robot {name!r} for this checkpoint: {error}") from error
        yield inputs, torch.randn((1, config.horizon, config.action_dim), generator=generator)
