"""A trained model into a checkpoint directory, with all that a policy needs beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from ..model import Pi0
from ..transforms import DatasetStats, get_robot, save_norm_stats
from .checkpoint import ASSETS, CONFIG, NORM_STATS
from .initialise import TOKENIZER
from .writing import new_directory, openpi_config, write_json, write_weights


def save_checkpoint(
    directory: str | Path,
    model: Pi0,
    stats: DatasetStats,
    robot: str,
    tokenizer: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
) -> Path:
    """Write `model` in openpi's layout.

    Args:
        directory: must not exist yet.
        model: its configuration is written whole into config.json.
        stats: of the data that it was trained on, in the model's joint space.
        robot: whose asset id to use.
        tokenizer: the `.model` file that it was trained with.
        dtype: in which every weight is stored; float32, or bfloat16 (as openpi's own converter rounds them all).
        max_shard_bytes: write shards of at most this size instead of one file.

    Returns:
        The directory.

    Raises:
        FileExistsError: `directory` exists.
        ValueError: unknown robot.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    asset = get_robot(robot).default(model.config.kind).asset_id or robot

    def read(name: str) -> Tensor:
        return weights[name].to(dtype)

    target = Path(directory)
    with new_directory(target) as staging:
        write_weights(staging, model.config, dict.fromkeys(weights, dtype), read, max_shard_bytes=max_shard_bytes)
        write_json(staging / CONFIG, openpi_config(model.config, dtype))
        save_norm_stats(staging / ASSETS / asset / NORM_STATS, stats)
        shutil.copyfile(tokenizer, staging / TOKENIZER)
    return target
