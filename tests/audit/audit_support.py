"""Small models and frames for the audit's tests."""

import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from turbopi import Pi0, preset
from turbopi.audit.golden import hash_model
from turbopi.audit.graph import ReferenceGraph
from turbopi.audit.sample import Sample
from turbopi.bench.workloads import Workload, observation
from turbopi.config import InvalidTokens, ModelConfig
from turbopi.engine import EagerEngine, Precision, TurboEngine, precision_dtype
from turbopi.engine.turbo.ops import twin_ops

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

SHAPE = Workload("small", views=2, prompt_tokens=30, horizon=10)
STEPS = 2


def config_of(name: str, invalid_tokens: InvalidTokens = "dropped") -> ModelConfig:
    return ModelConfig.from_dict(preset(name).to_dict() | {"invalid_tokens": invalid_tokens})


@cache
def weights(config: ModelConfig, dtype: torch.dtype, whose: str = "candidate") -> Pi0:
    return hash_model(config, 7, dtype)


def sample(config: ModelConfig, seed: int = 0, steps: int = STEPS) -> Sample:
    return Sample(*observation(config, SHAPE, 1, seed), steps, f"seed {seed}")


def graph_of(config: ModelConfig, seed: int = 0, steps: int = STEPS) -> ReferenceGraph:
    return ReferenceGraph(weights(config, torch.float32, "reference"), sample(config, seed, steps))


def eager(config: ModelConfig, precision: Precision = "fp32") -> EagerEngine:
    return EagerEngine(weights(config, precision_dtype(precision)), precision)


def turbo(config: ModelConfig, precision: Precision = "fp32") -> TurboEngine:
    return TurboEngine(weights(config, precision_dtype(precision)), precision, twin_ops(), None)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())
