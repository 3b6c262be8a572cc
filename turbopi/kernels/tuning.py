"""Tile sizes: tuned ones from the files in `tuned/`, written by benchmarks/kernels.py; else defaults by shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._common import next_power_of_2

TUNED = Path(__file__).parent / "tuned"


def _power_of_2(name: str, value: int, least: int) -> None:
    if value < least or value != next_power_of_2(value):
        raise ValueError(f"{name} is {value}, expected a power of two of at least {least}")


@dataclass(frozen=True)
class GemmConfig:
    """How a product is cut.

    Attributes:
        block_m, block_n, block_k: a program's tile; for geglu_linear block_n columns of gate and as many of up.
        group_m: row tiles that are walked together, so that their weights are read from L2.
        warps, stages: of a program; stages is the depth of its load pipeline.
        splits: parts of K, summed in a second kernel in a fixed order; needs a `partial` buffer.
        descriptors: loads and stores through TMA (compute capability 9.0 and later).
        persistent: with descriptors: one program a multiprocessor walks over tiles.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    warps: int = 4
    stages: int = 3
    splits: int = 1
    descriptors: bool = False
    persistent: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            _power_of_2(name, getattr(self, name), 16)
        _power_of_2("warps", self.warps, 1)
        if min(self.group_m, self.stages, self.splits) < 1:
            raise ValueError(f"group_m, stages and splits must be at least 1: {self}")
        if self.descriptors and self.splits > 1:
            raise ValueError(f"a product is split or runs on descriptors, not both: {self}")
        if self.persistent and not self.descriptors:
            raise ValueError(f"a persistent grid needs descriptors: {self}")


@dataclass(frozen=True)
class AttentionConfig:
    """block_m rows, each a query and a head that share keys and values; block_n keys at a time."""

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        _power_of_2("block_m", self.block_m, 16)
        _power_of_2("block_n", self.block_n, 16)
        _power_of_2("warps", self.warps, 1)


@dataclass(frozen=True)
class PrefixAttentionConfig:
    """Of `prefix_attention`: dims of the values that are multiplied at once. Named for GPUs where it wins."""

    columns: int = 64

    def __post_init__(self) -> None:
        if self.columns not in (64, 128):
            raise ValueError(f"columns is {self.columns}, expected 64 or 128")


Config = TypeVar("Config", GemmConfig, AttentionConfig, PrefixAttentionConfig)


def gpu_file(device: torch.device) -> Path:
    """Where this GPU's tuned configs are."""
    return TUNED / f"{torch.cuda.get_device_name(device).lower().replace(' ', '-')}.json"


def key(dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    """A shape as the files name it, such as "bfloat16 552x2048x2048"."""
    return f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, sizes))}"


@cache
def _entries(file: Path) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    return json.loads(file.read_text())["configs"] if file.is_file() else {}


def entries(op: str, like: Tensor) -> Mapping[str, Mapping[str, Any]]:
    """What the file of the GPU of `like` holds for an op, by `key`; nothing elsewhere."""
    return _entries(gpu_file(like.device)).get(op, {}) if like.device.type == "cuda" else {}


def forget() -> None:
    """Read the files again at the next call, for a process that has just written one."""
    _entries.cache_clear()


def nearest(entries: Mapping[str, Any], dtype: torch.dtype, sizes: tuple[int, ...]) -> Any | None:
    """The entry of these sizes, or with another first size (rows): the next larger one, else the largest.

    Prompt lengths vary from bucket to bucket, and a tile that suits 552 rows suits 560.
    """
    wanted = key(dtype, (0, *sizes[1:]))
    rows = {}
    for entry in entries:
        kind, _, shape = entry.partition(" ")
        first, _, rest = shape.partition("x")
        if f"{kind} 0x{rest}" == wanted:
            rows[int(first)] = entry
    if not rows:
        return None
    larger = [m for m in rows if m >= sizes[0]]
    return entries[rows[min(larger) if larger else max(rows)]]


def tuned(op: str, kind: type[Config], like: Tensor, sizes: tuple[int, ...]) -> Config | None:
    """The tuned config of an op for `sizes` on the GPU and in the dtype of `like`; None where there is none."""
    if like.device.type != "cuda":
        return None
    entry = nearest(_entries(gpu_file(like.device)).get(op, {}), like.dtype, sizes)
    return None if entry is None else kind(**entry)
