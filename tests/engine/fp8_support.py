"""Calibrated small models for the tests of fp8 in the turbo engine."""

from collections.abc import Mapping

import torch
from captured_support import model

from turbopi import Pi0
from turbopi.quant import Calibration, Format, PrecisionPlan, Quantisation, model_hash
from turbopi.quant.observe import input_ranges, synthetic_batches, watch


def with_bare_norms(reference: Pi0) -> Pi0:
    """Norms without effect of their own: folding them changes no weight, so the reference rounds the same numbers."""
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "norm" in name and "dense" not in name:
                layer_norm_weight = "layer_norm" in name or "layernorm" in name.split(".")[1]
                parameter.fill_(1.0 if layer_norm_weight and name.endswith("weight") else 0.0)
    return reference


def calibrated(name: str, dtype: torch.dtype, device: str = "cpu", bare: bool = False, **changes: object) -> Pi0:
    """A model whose `calibration_of` can be had."""
    reference = model(name, device, dtype, **changes)
    return with_bare_norms(reference) if bare else reference


def calibration_of(reference: Pi0, frames: int = 2) -> Calibration:
    """From noise."""
    ranges = input_ranges(watch(reference, synthetic_batches(reference.config, frames), 2), "max", 100.0)
    return Calibration(model_hash(reference), "libero", "noise", frames, "max", 100.0, ranges, True)


def quantisation_of(
    reference: Pi0, default: Format = "fp8", exceptions: Mapping[str, Format] | None = None
) -> Quantisation:
    """A plan and what it needs."""
    return Quantisation(PrecisionPlan(default, exceptions or {}), calibration_of(reference))
