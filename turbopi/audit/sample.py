"""One observation as an audit runs it: a batch of one, its noise, and what is valid in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..model import ModelInput

ALLOWED = 2.0
"""How many times the plain run's root-mean-square error an operation's may be; a bug is seldom that small, and folding
weights or merging two roundings into one moves it by less (docs/audit.md has the figures)."""
ALLOWED_STAGE = 4.0
"""The same over a whole stage, in which rounding errors meet and grow by chance."""
Visit = Callable[[str, Tensor], Tensor | None]
"""Told of every tensor as it is made; what it returns, if anything, is computed on with instead."""


def wanted(visit: Visit, name: str) -> bool:
    """Whether a visitor is to be told of a tensor: of all, unless it has a `wants` that says otherwise.

    To tell costs a copy in the reference's layout, which is most of what an audit does.
    """
    wants = getattr(visit, "wants", None)
    return wants is None or bool(wants(name))


@dataclass(frozen=True, eq=False)
class Sample:
    """One frame.

    Attributes:
        inputs: a batch of one, float32 images, on the CPU.
        noise: (1,H,32) float32.
        steps: flow-matching evaluations.
        label: where the frame is from, for the receipt.
    """

    inputs: ModelInput
    noise: Tensor
    steps: int
    label: str = ""

    def __post_init__(self) -> None:
        if len(self.inputs.tokens) != 1 or len(self.noise) != 1:
            raise ValueError(f"an audit takes one frame at a time, got a batch of {len(self.inputs.tokens)}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    @property
    def cameras(self) -> tuple[int, ...]:
        """The cameras that are there."""
        return tuple(torch.nonzero(self.inputs.image_mask[0]).flatten().tolist())

    def valid_slots(self, tokens_per_camera: int) -> Tensor:
        """(L,) int64, on the CPU: the valid slots of an undropped prefix, in order."""
        images = self.inputs.image_mask[0].repeat_interleave(tokens_per_camera)
        return torch.nonzero(torch.cat((images, self.inputs.token_mask[0]))).flatten()


class Subject(Protocol):
    """Something that computes the three stages and tells of tensors on the way, as finely as it can.

    Attributes:
        name: ENGINE:PRECISION.
        granularity: how fine that is, in words.
        wide_logits: whether its attention keeps logits in float32, whatever the precision.
        allowed: how many times the plain run's error its own may be, between two tensors that it tells.
    """

    name: str
    granularity: str
    wide_logits: bool
    allowed: float

    def run(self, sample: Sample, visit: Visit) -> Tensor:
        """All stages -> actions (1,H,32). `visit` gets names of `tensor_names`, valid rows only, each at most once.

        Tensors that are told may be kept: the subject does not write over them.
        """
