"""One layout into another: openpi, lerobot and openpi's JAX tree, weights bit for bit (SPEC 3).

What the target's own format cannot say (the asset id, whose arithmetic the weights were trained with, a lerobot
configuration) travels in the `turbopi_origin` object, so that converting back restores it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..transforms import ROBOTS, DatasetStats, save_norm_stats
from ..transforms.tokenizer import CHECKPOINT_FILES
from . import lerobot
from .checkpoint import ASSETS, CONFIG, FORMATS, NORM_STATS, ORIGIN, Checkpoint, Format, open_checkpoint
from .infer_config import TURBOPI
from .names import EMBEDDING, EXPERT_HEAD, TIED_HEAD, to_lerobot
from .orbax import write_orbax
from .tensors import read_tensor
from .writing import dtype_name, new_directory, openpi_config, variants, write_json, write_weights

_SIZE_KEYS = {
    "type",
    "dtype",
    "chunk_size",
    "max_state_dim",
    "max_action_dim",
    "image_resolution",
    "tokenizer_max_length",
}


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote, and what its user should know about it.

    Attributes:
        path: the new directory.
        format: its layout.
        notes: sentences about what the target's format cannot carry, or its owner will do differently.
    """

    path: Path
    format: Format
    notes: tuple[str, ...]


def convert(source: str | Path, target: str | Path, to: Format, *, asset_id: str | None = None) -> Conversion:
    """Write the checkpoint `source` as a new directory `target` in layout `to`.

    Weights keep their bits and dtypes, statistics their values. The expert's unused output head is carried where
    the source has it; otherwise zeros are written for openpi and lerobot, whose loaders ask for it.

    Args:
        source: a checkpoint directory of any other layout.
        target: must not exist; it appears whole or not at all.
        to: "openpi", "lerobot" or "jax".
        asset_id: which statistics a lerobot directory gets, if the source has several; or their name in the
            target, if the source is lerobot's.

    Raises:
        FileExistsError: `target` exists.
        CheckpointError: the source is corrupt, incomplete, ambiguous, or not representable in the target's layout.
        ValueError: unknown layout, or the one that the source has already.
    """
    if to not in FORMATS:
        raise ValueError(f"cannot convert to {to!r}; known layouts: {', '.join(FORMATS)}")
    checkpoint = open_checkpoint(source)
    if checkpoint.format == to:
        raise ValueError(f"{source} is in layout {to!r} already; copy the directory instead")
    config, target, notes = checkpoint.config, Path(target), _notes(checkpoint, to)
    with new_directory(target) as staging:
        if to == "jax":
            write_orbax(staging, checkpoint.tensors, config)
        else:
            _write_torch(staging, checkpoint, to)
        if to == "lerobot":
            stats = _write_lerobot(staging, checkpoint, asset_id)
        else:
            stats = _write_openpi(staging, checkpoint, to, asset_id)
        if not stats:
            notes.append("the source has no normalisation statistics, so the target has none: add them before use")
        for name in CHECKPOINT_FILES:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, staging / name)
    return Conversion(target, to, tuple(notes))


def _reader(checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    return lambda name: read_tensor(checkpoint.tensors, name)


def _write_torch(staging: Path, checkpoint: Checkpoint, to: Format) -> None:
    dtypes = {name: info.dtype for name, info in checkpoint.tensors.infos.items() if name != TIED_HEAD}
    names: dict[str, Any] = {"rename": to_lerobot, "untied": True} if to == "lerobot" else {}
    write_weights(staging, checkpoint.config, dtypes, _reader(checkpoint), **names)


def _write_openpi(staging: Path, checkpoint: Checkpoint, to: Format, asset_id: str | None) -> bool:
    """config.json and assets of openpi's two layouts. Returns whether there are statistics."""
    config, origin = checkpoint.config, dict(checkpoint.origin)
    written = openpi_config(config, _precision(checkpoint)) if to == "openpi" else {TURBOPI: config.to_dict()}
    if checkpoint.format == "lerobot":
        origin["convention"] = checkpoint.convention
        if checkpoint.lerobot_config is not None:
            skipped = (TURBOPI, ORIGIN)
            origin["lerobot_config"] = {k: v for k, v in checkpoint.lerobot_config.items() if k not in skipped}
        if checkpoint.asset_ids:
            origin["norm_modes"] = checkpoint.norm_modes
            name = asset_id or checkpoint.asset_id()
            save_norm_stats(staging / ASSETS / name / NORM_STATS, _complete(checkpoint.norm_stats()))
    elif checkpoint.asset_ids:
        shutil.copytree(checkpoint.path / ASSETS, staging / ASSETS)
    write_json(staging / CONFIG, {**written, **({ORIGIN: origin} if origin else {})})
    return bool(checkpoint.asset_ids)


def _write_lerobot(staging: Path, checkpoint: Checkpoint, asset_id: str | None) -> bool:
    """config.json, processors and our side file. Returns whether there are statistics."""
    config, origin = checkpoint.config, dict(checkpoint.origin)
    chosen = checkpoint.asset_id(asset_id) if checkpoint.asset_ids else None
    stats = checkpoint.norm_stats(chosen) if chosen else None
    modes = checkpoint.norm_modes
    written = {
        **lerobot.config_json(config, stats, modes),
        **variants(config),
        "dtype": dtype_name(_precision(checkpoint)),
    }
    # What an earlier lerobot directory said beyond the model's own sizes: features, camera names, training settings.
    carried = origin.pop("lerobot_config", {})
    written |= {key: value for key, value in carried.items() if key not in _SIZE_KEYS}
    write_json(staging / CONFIG, written)
    if stats:
        lerobot.write_processors(staging, written, stats)
    origin |= {"convention": checkpoint.convention, "norm_modes": modes, **({"asset_id": chosen} if chosen else {})}
    write_json(staging / lerobot.SIDE_FILE, {TURBOPI: config.to_dict(), ORIGIN: origin})
    return stats is not None


def _precision(checkpoint: Checkpoint) -> torch.dtype:
    return checkpoint.tensors.infos[EMBEDDING].dtype


def _complete(stats: DatasetStats) -> DatasetStats:
    for vector, part in (("state", stats.state), ("actions", stats.actions)):
        if part.mean is None or part.std is None:
            raise CheckpointError(
                f"the {vector} statistics have no mean and std, which openpi's norm_stats.json must hold; compute the "
                "dataset's statistics again with them"
            )
    return stats


def _notes(checkpoint: Checkpoint, to: Format) -> list[str]:
    config, infos, notes = checkpoint.config, checkpoint.tensors.infos, []
    if to == "jax" and EXPERT_HEAD in infos:
        notes.append("the expert's unused output head is left out: the JAX tree has none")
    if to != "jax" and EXPERT_HEAD not in infos:
        notes.append(f"the source has no expert output head; zeros are written, which no inference reads ({to} asks)")
    if to != "lerobot" and TIED_HEAD in infos:
        head, embedding = (read_tensor(checkpoint.tensors, name) for name in (TIED_HEAD, EMBEDDING))
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            notes.append("the source's output head differs from its embedding and is dropped: inference never reads it")
    if to == "lerobot" and config.kind == "pi05" and config.state_in_prompt is not True:
        notes.append(
            "lerobot always spells the state in π0.5's prompt; this checkpoint does not say that it was trained so"
        )
    if to == "lerobot" and checkpoint.convention == "openpi":
        notes.append("lerobot normalises without openpi's 1e-6: its numbers differ by 1e-6 over each statistic's width")
    described = ROBOTS.get(checkpoint.robot or "")
    if to == "lerobot" and described and described.default(config.kind).absolute_mask is not None:
        notes.append(
            f"openpi's {config.kind} for {described.name} learns actions relative to the state; the lerobot config "
            "written says absolute: set use_relative_actions there if this policy was trained so"
        )
    if to != "lerobot" and checkpoint.convention == "lerobot":
        notes.append("openpi itself adds 1e-6 to each statistic's width, which this policy was trained without")
    if to != "lerobot" and checkpoint.lerobot_config is not None:
        relative = "relative" if checkpoint.lerobot_config.get("use_relative_actions") else "absolute"
        notes.append(
            f"this policy's actions are {relative}: use a robot description that takes them so (π0 on LIBERO "
            "and every ALOHA policy of openpi take relative ones)"
        )
    if to != "lerobot" and checkpoint.asset_ids:
        mode = "quantile" if config.kind == "pi05" else "mean_std"
        if set(checkpoint.norm_modes.values()) != {mode}:
            notes.append(
                f"openpi itself would normalise by {mode}, this policy was trained with {checkpoint.norm_modes}"
            )
    return notes
