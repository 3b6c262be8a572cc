"""From a checkpoint and some frames to what an audit runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import open_checkpoint
from ..checkpoint.load import load_opened
from ..config import InvalidTokens, NumericsName
from ..engine import EagerEngine, precision_dtype
from ..frames import model_inputs
from ..model import Pi0
from ..policy import Policy, load_policy, load_quantisation
from .sample import Sample
from .subjects import Pair, SubjectName, make_pair


@dataclass(frozen=True)
class Checkpointed:
    """What is loaded, and how; the options mean what they mean to `load_policy`.

    Attributes:
        checkpoint: its directory.
        candidate: engine and precision.
        device: where everything is.
        robot: None: what the checkpoint says.
        steps: flow-matching evaluations.
        plan, calibration: of a quantised candidate.
        numerics, invalid_tokens: of both sides.
        tokenizer: its file.
    """

    checkpoint: Path
    candidate: SubjectName
    device: str
    robot: str | None = None
    steps: int = 10
    plan: Path | None = None
    calibration: Path | None = None
    numerics: NumericsName | None = None
    invalid_tokens: InvalidTokens | None = None
    tokenizer: Path | None = None

    def reference(self) -> Policy:
        """The float32 reference with the checkpoint's transforms. Raises as `load_policy`."""
        return load_policy(
            self.checkpoint,
            robot=self.robot,
            steps=self.steps,
            precision="fp32",
            device=self.device,
            numerics=self.numerics,
            invalid_tokens=self.invalid_tokens,
            tokenizer=self.tokenizer,
        )

    def pair(self, reference: Pi0) -> Pair:
        """The candidate and what sets its budget. Raises as `load_policy` and `create_engine`."""
        checkpoint = open_checkpoint(self.checkpoint)
        precision = self.candidate.precision
        quantisation = load_quantisation(checkpoint.path, precision, checkpoint.config, self.plan, self.calibration)
        model = load_opened(
            checkpoint,
            self.device,
            precision_dtype(precision),
            config=checkpoint.config,
            numerics=self.numerics,
            invalid_tokens=self.invalid_tokens,
        )
        return make_pair(self.candidate, model, reference, quantisation)

    def policy_options(self, name: SubjectName) -> dict[str, Any]:
        """The same for `CheckpointSource`, which loads a policy in every worker."""
        quantised = name == self.candidate
        return {
            "robot": self.robot,
            "engine": name.engine,
            "steps": self.steps,
            "precision": name.precision,
            "device": self.device,
            "numerics": self.numerics,
            "invalid_tokens": self.invalid_tokens,
            "tokenizer": self.tokenizer,
            "plan": self.plan if quantised else None,
            "calibration": self.calibration if quantised else None,
        }


def reference_model(policy: Policy) -> Pi0:
    """The model of a policy on the eager engine."""
    assert isinstance(policy.engine, EagerEngine)
    return policy.engine.model


def make_samples(
    policy: Policy, observations: Sequence[Mapping[str, Any]], count: int, steps: int, seed: int
) -> list[Sample]:
    """`count` of the observations, evenly spread, with seeded noise.

    Raises:
        InputError: an observation that the policy cannot use; names it.
        ValueError: more frames than there are.
    """
    if not 1 <= count <= len(observations):
        raise ValueError(f"--count {count}: give at least 1 and at most {len(observations)}, the frames that there are")
    places = [round(i) for i in np.linspace(0, len(observations) - 1, count)]
    chosen = [observations[place] for place in places]
    inputs = model_inputs(policy, chosen, minimum=1, seed=seed)
    return [Sample(x, noise, steps, f"frame {place}") for place, (x, noise) in zip(places, inputs, strict=True)]
