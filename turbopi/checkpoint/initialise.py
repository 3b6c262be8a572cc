"""New checkpoints: random or hashed weights of any size, with all that a policy needs beside them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..config import PALIGEMMA_VOCAB, ModelConfig, preset
from ..model.numerics import MODEL_DTYPES, parameter_dtype
from ..transforms import DatasetStats, NormStats, get_robot, load_tokenizer, save_norm_stats, shipped_tokenizer
from .checkpoint import ASSETS, CONFIG, NORM_STATS
from .hashweights import hash_parameter, random_parameter
from .names import parameter_shapes
from .writing import new_directory, openpi_config, write_json, write_weights

Weights = Literal["random", "hash"]
TOKENIZER = "tokenizer.model"

# Ranges in which these robots move: q01 and q99 of state and actions, in the model's joint space.
_ARM = ([-2.6, -1.6, -2.6, -2.9, -2.6, 0.1, -2.6], [2.6, 1.6, 2.6, -0.2, 2.6, 3.6, 2.6])
_SIDE = ([-1.2, -1.0, -1.1, -1.3, -1.2, -1.5, 0.0], [1.2, 1.0, 1.1, 1.3, 1.2, 1.5, 1.0])
_RANGES: Mapping[str, Mapping[str, tuple[list[float], list[float]]]] = {
    "libero": {
        "state": (
            [-0.40, -0.30, 0.01, 1.50, -1.80, -1.10, 0.00, -0.04],
            [0.15, 0.33, 1.30, 3.60, 2.30, 0.95, 0.04, 0.00],
        ),
        "actions": ([-0.74, -0.66, -0.94, -0.11, -0.19, -0.18, -1.00], [0.94, 0.86, 0.94, 0.14, 0.19, 0.15, 1.00]),
    },
    "droid": {
        "state": ([*_ARM[0], 0.0], [*_ARM[1], 1.0]),
        "actions": (
            [-0.45, -0.80, -0.50, -0.85, -0.60, -0.65, -0.75, 0.0],
            [0.45, 0.80, 0.50, 0.85, 0.60, 0.65, 0.75, 1.0],
        ),
    },
    "aloha": {
        "state": (_SIDE[0] * 2, _SIDE[1] * 2),
        "actions": (_SIDE[0] * 2, _SIDE[1] * 2),
    },
}


def plausible_stats(robot: str) -> DatasetStats:
    """Statistics such as data of this robot could have, for checkpoints that were never trained.

    Raises ValueError for an unknown robot.
    """
    ranges = _RANGES[get_robot(robot).name]
    parts = {}
    for vector, (low, high) in ranges.items():
        q01, q99 = np.array(low), np.array(high)
        parts[vector] = NormStats(mean=(q01 + q99) / 2, std=(q99 - q01) / 4, q01=q01, q99=q99)
    return DatasetStats(**parts)


def init_checkpoint(
    directory: str | Path,
    model: str | ModelConfig,
    *,
    weights: Weights = "random",
    seed: int = 0,
    robot: str = "libero",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a new checkpoint in openpi's layout, one tensor at a time, so that any size fits in memory.

    Args:
        directory: must not exist yet.
        model: a preset's name or a configuration; written whole into config.json.
        weights: "random" (normal, scaled so that activations stay of order one) or "hash" (the golden fixtures').
        seed: of either; 7 gives the fixtures' weights.
        robot: whose statistics to write and whose asset id to use.
        dtype: float32, or bfloat16 with openpi's choice of parameters that stay float32.

    Returns:
        The directory.

    Raises:
        FileExistsError: `directory` exists.
        ValueError: unknown preset, robot, weights or dtype, or a model too small for the robot.
    """
    config = preset(model) if isinstance(model, str) else model
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}")
    if dtype not in MODEL_DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, MODEL_DTYPES))}")
    described, stats = get_robot(robot), plausible_stats(robot)
    if stats.state.dims > config.state_dim or stats.actions.dims > config.action_dim:
        raise ValueError(
            f"robot {robot!r} has {stats.state.dims} state and {stats.actions.dims} action numbers, the model takes "
            f"{config.state_dim} and {config.action_dim}; choose a larger state_dim and action_dim"
        )
    shapes = parameter_shapes(config)
    dtypes = {name: parameter_dtype(name, "openpi", dtype) for name in shapes}
    make = hash_parameter if weights == "hash" else random_parameter

    def read(name: str) -> Tensor:
        return make(name, shapes[name], seed).to(dtypes[name])

    target = Path(directory)
    with new_directory(target) as staging:
        write_weights(staging, config, dtypes, read)
        write_json(staging / CONFIG, openpi_config(config, dtype))
        asset = described.default(config.kind).asset_id or robot
        save_norm_stats(staging / ASSETS / asset / NORM_STATS, stats)
        if fits_shipped_tokenizer(config):
            shutil.copyfile(shipped_tokenizer(), staging / TOKENIZER)
    return target


def fits_shipped_tokenizer(config: ModelConfig) -> bool:
    """Whether this model's vocabulary is small, yet holds the shipped tokenizer's."""
    return config.vocab_size < PALIGEMMA_VOCAB and load_tokenizer(shipped_tokenizer()).vocab_size <= config.vocab_size
