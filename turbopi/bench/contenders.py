"""Engines by name and precision, "turbo:fp8", over hash weights of one seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..checkpoint.hashweights import hash_parameter
from ..checkpoint.load import build_model
from ..config import ModelConfig
from ..engine import FLOATS, Engine, Precision, create_engine, precision_dtype
from ..model import Pi0
from ..quant import Format, PrecisionPlan, Quantisation, synthetic_calibration

Progress = Callable[[str], None]
WEIGHT_BYTES: dict[Precision, float] = {
    "fp32": 4,
    "bf16": 2,
    "fp8": 1,
    "int8": 1,
    "w8a16": 1,
    "w4a16": 0.5,
    "nvfp4": 0.5625,
}
"""Of one weight of a product; scales of channels are not counted, those of NVFP4's blocks are."""
CALIBRATION_FRAMES = 2


@dataclass(frozen=True)
class Contender:
    """An engine as it was asked for: `name` is "turbo" or "turbo:fp8"."""

    name: str
    engine: str
    precision: Precision

    @property
    def product_dtype(self) -> torch.dtype:
        """Of the operands that its products multiply."""
        return torch.float8_e4m3fn if self.precision == "fp8" else precision_dtype(self.precision)


def contenders(names: Sequence[str], default: Precision) -> tuple[Contender, ...]:
    """Of names such as "turbo" and "turbo:fp8". Raises ValueError for an unknown precision, and for one named twice."""
    found = []
    for name in names:
        engine, _, precision = name.partition(":")
        chosen = precision or default
        precision_dtype(chosen)
        found.append(Contender(name, engine, cast("Precision", chosen)))
    if len({(each.engine, each.precision) for each in found}) < len(found):
        raise ValueError(f"an engine is named twice: {', '.join(names)}")
    return tuple(found)


def hash_weights(config: ModelConfig, device: torch.device, precision: Precision, seed: int) -> Pi0:
    """A model whose weights are a function of their names: it times, it certifies nothing."""

    def fill(name: str, kept: Tensor) -> None:
        kept.copy_(hash_parameter(name, tuple(kept.shape), seed, device))

    return build_model(config, device, precision_dtype(precision), fill)


def make_engines(
    asked: Sequence[Contender],
    sizes: ModelConfig,
    device: torch.device,
    seed: int,
    plan: PrecisionPlan | None = None,
    progress: Progress = lambda _: None,
) -> tuple[dict[str, Engine], dict[str, float]]:
    """Every engine by its name, and the seconds that making it took.

    Engines of one dtype share one model. Quantised ones get the plan, by default every product alike, and a calibration
    from noise, which is made first and not counted.

    Raises ValueError or RuntimeError if an engine cannot be had here.
    """
    models: dict[torch.dtype, Pi0] = {}
    engines, made_s = {}, {}
    for each in asked:
        dtype = precision_dtype(each.precision)
        if dtype not in models:
            progress(f"hash weights in {dtype}")
            models[dtype] = hash_weights(sizes, device, each.precision, seed)
        progress(f"{each.name}: engine")
        quantisation = None if each.precision in FLOATS else _quantisation(models[dtype], each.precision, plan)
        start = time.perf_counter()
        engines[each.name] = create_engine(each.engine, models[dtype], each.precision, quantisation)
        engines[each.name].synchronize()
        made_s[each.name] = time.perf_counter() - start
    return engines, made_s


def _quantisation(model: Pi0, precision: Precision, plan: PrecisionPlan | None) -> Quantisation:
    chosen = plan or PrecisionPlan(cast("Format", precision))
    if not chosen.needs_calibration(model.config):
        return Quantisation(chosen)
    return Quantisation(chosen, synthetic_calibration(model, steps=1, frames=CALIBRATION_FRAMES))
