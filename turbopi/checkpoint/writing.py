"""What every writer of a checkpoint shares: a directory that appears whole or not at all, and openpi's two files."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from .infer_config import TURBOPI, VARIANTS
from .names import EMBEDDING, EXPERT_HEAD, TIED_HEAD, head_shapes, parameter_shapes, to_openpi
from .tensors import WEIGHTS, TensorInfo, write_safetensors, write_shards

Rename = Callable[[str], str]


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends and vanishes if it fails.

    Raises FileExistsError if `target` is there already.
    """
    if target.exists():
        raise FileExistsError(f"{target} already exists and is not overwritten; remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        # mkdtemp's directories are private; a checkpoint is as readable as any other new directory.
        staging.chmod(0o755)
        yield staging
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def variants(config: ModelConfig) -> dict[str, str | None]:
    """openpi's and lerobot's names of the two Gemma sizes; null for sizes that neither knows."""
    named = {gemma: name for name, gemma in reversed(VARIANTS.items())}
    return {"paligemma_variant": named.get(config.vlm), "action_expert_variant": named.get(config.expert)}


def openpi_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """openpi's config.json, and our `turbopi` object in it."""
    return {
        "action_dim": config.action_dim,
        "action_horizon": config.horizon,
        **variants(config),
        "precision": dtype_name(dtype),
        TURBOPI: config.to_dict(),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as both ports write it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def write_weights(
    directory: Path,
    config: ModelConfig,
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
    *,
    rename: Rename = to_openpi,
    untied: bool = False,
    max_shard_bytes: int | None = None,
) -> None:
    """Write `model.safetensors` in a port's names, or shards of at most `max_shard_bytes`.

    `read` is asked for one tensor at a time. Both ports' loaders are strict, so the output heads are always written:
    the tied one is the embedding, and the expert's, which nothing reads, is zeros unless `dtypes` has it. `untied`
    stores the embedding under its own name too, as lerobot does; otherwise it stands under the head's name only, as
    openpi does.
    """
    shapes = parameter_shapes(config) | head_shapes(config)
    if not untied:
        del shapes[EMBEDDING]
    known = {TIED_HEAD: dtypes[EMBEDDING], EXPERT_HEAD: dtypes[EMBEDDING], **dtypes}
    ours = {rename(name): name for name in shapes}
    infos = {theirs: TensorInfo(shapes[name], known[name]) for theirs, name in ours.items()}

    def fetch(theirs: str) -> Tensor:
        name = ours[theirs]
        if name == EXPERT_HEAD and name not in dtypes:
            return torch.zeros(shapes[name], dtype=known[name])
        return read(EMBEDDING if name == TIED_HEAD else name)

    # safetensors' own loader follows this note to the name under which the tied tensor is kept.
    metadata = {} if untied else {rename(EMBEDDING): rename(TIED_HEAD)}
    if max_shard_bytes is None:
        write_safetensors(directory / WEIGHTS, infos, fetch, metadata)
    else:
        write_shards(directory, infos, fetch, metadata, max_shard_bytes)
