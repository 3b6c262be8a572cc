"""Small models and calibrations for the tests of number formats."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from turbopi import ModelConfig, ModelInput, Pi0, preset
from turbopi.audit.golden import hash_model
from turbopi.quant import Calibration, InputRange, input_width, model_hash, product_names
from turbopi.quant.observe import input_ranges, synthetic_batches, watch
from turbopi.quant.plan import NORMED_KINDS

CONFIG = preset("pi05-tiny")


def hashed(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.bfloat16) -> Pi0:
    return hash_model(config, 7, dtype)


def batches(count: int, config: ModelConfig = CONFIG) -> Iterator[tuple[ModelInput, Tensor]]:
    return iter(synthetic_batches(config, count))


def ranges(config: ModelConfig = CONFIG) -> dict[str, InputRange]:
    """Made up."""
    rng = np.random.default_rng(0)
    found = {}
    for product in product_names(config):
        channels = tuple(rng.uniform(0.1, 4.0, input_width(config, product)).tolist())
        normed = channels if product.rsplit(".", 1)[1] in NORMED_KINDS else None
        found[product] = InputRange(max(channels), channels, None if normed is None else max(normed), normed)
    return found


def calibration(model: Pi0) -> Calibration:
    """Made up."""
    return Calibration(model_hash(model), "libero", "made up", 1, "max", 100.0, ranges(model.config))


@cache
def calibrated() -> tuple[Pi0, Calibration]:
    """A model in bf16 and what was seen of it."""
    model = hashed()
    found = input_ranges(watch(model, batches(4), 4), "max", 100.0)
    return model, Calibration(model_hash(model), "libero", "noise", 4, "max", 100.0, found, synthetic=True)
