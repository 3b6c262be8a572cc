"""What every engine offers: the three stages, and the facts that a receipt needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar, get_args, runtime_checkable

import torch
from torch import Tensor

from ..config import ModelConfig
from ..model import ModelInput, Pi0, PrefixCache
from ..quant import PrecisionPlan, Quantisation

Precision = Literal["fp32", "bf16", "fp8", "int8", "w8a16", "w4a16", "nvfp4"]
FLOATS: tuple[Precision, ...] = ("fp32", "bf16")
"""Precisions without quantisation; every engine runs these unless it registers others."""

STAGES = ("encode_images", "prefill", "denoise")

DTYPES: dict[str, torch.dtype] = {
    name: torch.float32 if name == "fp32" else torch.bfloat16 for name in get_args(Precision)
}


def precision_dtype(precision: str) -> torch.dtype:
    """Of the loaded weights; quantisation starts from bf16. Raises ValueError that lists the known precisions."""
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
class DescribedEngine(Engine, Protocol):
    """An engine with more to tell than its name and precision."""

    def describe(self) -> dict[str, Any]:
        """How it runs the stages, as JSON values, for receipts."""


@runtime_checkable
class TickEngine(DescribedEngine, Protocol):
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


@runtime_checkable
class TimedEngine(TickEngine, Protocol):
    """An engine whose device can time whole ticks, without the host waiting for anything more."""

    def time_calls(self) -> bool:
        """From now on let the device time every `sample_actions`; whether it can."""

    def call_ms(self) -> float:
        """Device time of the latest, from before the first copy of its inputs to behind that of its actions."""


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


class EngineFactory(Protocol):
    """What makes an engine over a loaded model; `quantisation` is None for precisions without one."""

    def __call__(self, model: Pi0, precision: Precision, quantisation: Quantisation | None = None) -> Engine:
        """The engine. Raises ValueError for a model or device that it cannot run."""


Factory = TypeVar("Factory", bound=EngineFactory)
_FACTORIES: dict[str, EngineFactory] = {}
_PRECISIONS: dict[str, tuple[Precision, ...]] = {}


def register_engine(name: str, precisions: tuple[Precision, ...] = FLOATS) -> Callable[[Factory], Factory]:
    """Make an engine known under a name, with the precisions that it runs: a decorator for its class or factory."""

    def add(factory: Factory) -> Factory:
        _FACTORIES[name], _PRECISIONS[name] = factory, precisions
        return factory

    return add


class FamilyFactory(Protocol):
    """What makes an engine whose name has parts, such as "onnx:DIRECTORY"."""

    def __call__(self, name: str, model: Pi0, precision: Precision, quantisation: Quantisation | None = None) -> Engine:
        """The engine by its whole name. Raises ValueError for a name, model or device that it cannot run."""


Family = TypeVar("Family", bound=FamilyFactory)
_FAMILIES: dict[str, FamilyFactory] = {}


def register_family(mark: str) -> Callable[[Family], Family]:
    """Make a factory known for the names in which `mark` is the first of all marks."""

    def add(factory: Family) -> Family:
        _FAMILIES[mark] = factory
        return factory

    return add


def engines_for(precision: Precision) -> tuple[str, ...]:
    """Names of the engines that run a precision."""
    return tuple(sorted(name for name, precisions in _PRECISIONS.items() if precision in precisions))


def create_engine(name: str, model: Pi0, precision: Precision, quantisation: Quantisation | None = None) -> Engine:
    """An engine by name over a loaded model.

    Args:
        name: as registered; "onnx:DIRECTORY" for an export's files; "vision=onnx,prefill=turbo,denoise=turbo" for
            stages of several engines.
        model: in `precision_dtype(precision)`.
        precision: what to run it in.
        quantisation: of quantised precisions; None quantises every product alike, where that needs no calibration.

    Raises:
        ValueError: an unknown name; a precision that the engine cannot run, with those that it can; a plan that does
            not fit the model or the precision; a calibration that is missing or of another checkpoint.
    """
    marks = [mark for mark in _FAMILIES if mark in name]
    if marks:
        return _FAMILIES[min(marks, key=name.index)](name, model, precision, quantisation)
    if name not in _FACTORIES:
        raise ValueError(f"unknown engine {name!r}; known: {', '.join(sorted(_FACTORIES))}")
    precision_dtype(precision)
    if precision not in _PRECISIONS[name]:
        raise ValueError(
            f"engine {name!r} runs {', '.join(_PRECISIONS[name])}, not {precision!r}; "
            f"{precision!r} is run by {', '.join(engines_for(precision)) or 'no engine'}"
        )
    if precision == "fp32" or precision == "bf16":
        if quantisation is not None:
            raise ValueError(f"precision {precision!r} quantises nothing; give the plan's own precision, or no plan")
        return _FACTORIES[name](model, precision)
    chosen = quantisation or Quantisation(PrecisionPlan(precision))
    chosen.check(precision, model)
    return _FACTORIES[name](model, precision, chosen)
