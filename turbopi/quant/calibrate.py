"""From observations to a calibration and a report of its outliers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from ..model import ModelInput, Pi0
from .calibration import Calibration, Observer, model_hash
from .observe import input_ranges, outliers, synthetic_batches, watch

PERCENTILE = 99.99
"""Of the outlier report, and of the observer "percentile" unless another is asked for."""
SYNTHETIC_FRAMES = 16
SYNTHETIC = "noise, not observations: worth little"


def calibrate(
    model: Pi0,
    batches: Iterable[tuple[ModelInput, Tensor]],
    *,
    robot: str,
    source: str,
    steps: int = 10,
    observer: Observer = "max",
    percentile: float = PERCENTILE,
    synthetic: bool = False,
) -> tuple[Calibration, dict[str, Any]]:
    """Run a model over observations and measure the input of every product.

    Args:
        model: unquantised, in the dtype from which it will be quantised.
        batches: inputs and noise; a whole tick each.
        robot: whose observations.
        source: where they are from, for people.
        steps: flow-matching evaluations a tick, all of them looked at.
        observer: "max" keeps every value in range; "percentile" cuts off what lies above.
        percentile: for the observer "percentile", and in the report for both.
        synthetic: whether they are noise.

    Returns:
        The calibration, and by product what `outliers` says.

    Raises:
        InputError: an input that does not fit the model.
        ValueError: no observations, or products whose input is constant or not finite.
    """
    if not 0 < percentile < 100:
        raise ValueError(f"the percentile must lie between 0 and 100, got {percentile}")
    frames = 0

    def counted() -> Iterator[tuple[ModelInput, Tensor]]:
        nonlocal frames
        for inputs, noise in batches:
            frames += len(inputs.tokens)
            yield inputs, noise

    watched = watch(model, counted(), steps)
    if frames == 0:
        raise ValueError("there are no observations to calibrate with")
    kept = 100.0 if observer == "max" else percentile
    ranges = input_ranges(watched, observer, kept)
    found = Calibration(model_hash(model), robot, source, frames, observer, kept, ranges, synthetic)
    return found, outliers(watched, percentile)


def synthetic_calibration(
    model: Pi0, robot: str = "none", steps: int = 10, frames: int = SYNTHETIC_FRAMES
) -> Calibration:
    """A calibration from noise, for models that nobody shows real observations: hash weights, speed measurements."""
    batches = synthetic_batches(model.config, frames)
    return calibrate(model, batches, robot=robot, source=SYNTHETIC, steps=steps, synthetic=True)[0]
