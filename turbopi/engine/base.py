"""What every engine offers: the three stages, and the facts that a receipt needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from ..config import ModelConfig
from ..model import ModelInput, Pi0, PrefixCache

Precision = Literal["fp32", "bf16"]

STAGES = ("encode_images", "prefill", "denoise")

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def precision_dtype(precision: str) -> torch.dtype:
    """The weights' dtype of a precision; raises ValueError that lists the known ones."""
    if precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(get_args(Precision))}")
    return DTYPES[precision]


class Engine(Protocol):
    """A way to run the three stages. Same inputs, same noise: bit-identical actions.

    Shapes are those of `turbopi.model.Pi0`; inputs may be on the CPU, results are on `device`.
    """

    name: str
    precision: Precision
    config: ModelConfig
    device: torch.device

    def encode_images(self, images: Tensor, image_mask: Tensor) -> Tensor:
        """Stage 1: (B,cameras,3,S,S) float32, (B,cameras) bool -> image tokens."""

    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Stage 2: image tokens and the prompt (B,T) int64, (B,T) bool -> PrefixCache."""

    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Stage 3: (B,32) and (B,H,32) float32 -> normalised actions (B,H,32) float32."""

    def synchronize(self) -> None:
        """Wait until everything asked for so far has been computed."""


@runtime_checkable
class TickEngine(Engine, Protocol):
    """An engine that also runs a whole tick at once, from host memory to host memory.

    Attributes:
        accepts_uint8: whether `ModelInput.images` may be uint8 (0 to 255), to be scaled on the device.
    """

    accepts_uint8: bool

    def sample_actions(self, input: ModelInput, noise: Tensor, steps: int) -> Tensor:  # noqa: A002
        """All three stages: (B,H,32) float32 noise -> normalised actions (B,H,32) float32, on the CPU.

        Raises NonFiniteActionsError where the actions hold NaN or infinite values.
        """

    def warm_up(self, cameras: int, steps: int, batch: int = 1, images: torch.dtype = torch.uint8) -> None:
        """Prepare for prompts of any length with `cameras` valid cameras, so that the first tick is like the next."""

    def describe(self) -> dict[str, Any]:
        """How it runs the stages, as JSON values, for receipts."""


def sample_actions(
    engine: Engine,
    input: ModelInput,  # noqa: A002
    noise: Tensor,
    steps: int,
    stage_ms: dict[str, float] | None = None,
) -> Tensor:
    """A whole tick on any engine: at once where it can do that, otherwise stage after stage.

    Args:
        engine: that computes.
        input: checked, on the CPU.
        noise: (B,H,32) float32.
        steps: flow-matching evaluations.
        stage_ms: where given, the wall time of each stage in milliseconds is put in; of a whole tick, nothing.

    Returns:
        normalised actions (B,H,32) float32 on the CPU.
    """
    if isinstance(engine, TickEngine):
        return engine.sample_actions(input, noise, steps)
    times = [time.perf_counter()]

    def finish_stage() -> None:
        if stage_ms is not None:
            engine.synchronize()
            times.append(time.perf_counter())

    image_tokens = engine.encode_images(input.images, input.image_mask)
    finish_stage()
    cache = engine.prefill(image_tokens, input.image_mask, input.tokens, input.token_mask)
    finish_stage()
    actions = engine.denoise(cache, input.state, noise, steps).cpu()
    finish_stage()
    if stage_ms is not None:
        stage_ms.update({stage: 1e3 * (b - a) for stage, a, b in zip(STAGES, times, times[1:], strict=False)})
    return actions


EngineFactory = Callable[[Pi0, Precision], Engine]
_FACTORIES: dict[str, EngineFactory] = {}


def register_engine(name: str) -> Callable[[EngineFactory], EngineFactory]:
    """Make an engine known under a name: a decorator for its class or factory."""

    def add(factory: EngineFactory) -> EngineFactory:
        _FACTORIES[name] = factory
        return factory

    return add


def create_engine(name: str, model: Pi0, precision: Precision) -> Engine:
    """An engine by name over a loaded model; raises ValueError that lists the known ones."""
    if name not in _FACTORIES:
        raise ValueError(f"unknown engine {name!r}; known: {', '.join(sorted(_FACTORIES))}")
    return _FACTORIES[name](model, precision)
