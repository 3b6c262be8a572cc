"""Which denoise loop runs a batch: a fixed rule, told by the engine's `describe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ...config import ModelConfig
from .denoise import DenoiseLoop, RowsLoop, Schedules
from .fused import FusedLoop, fused_obstacles, suffix_attention_obstacles
from .many import ManyRowsLoop, many_obstacles
from .ops import TWINS, Ops
from .persistent import PersistentLoop, obstacles
from .weights import TurboWeights

LoopName = Literal["persistent", "fused", "many", "rows"]


def make_loop(
    config: ModelConfig,
    weights: TurboWeights,
    ops: Ops,
    schedules: Schedules,
    batch: int,
    first: LoopName = "persistent",
) -> DenoiseLoop:
    """From `first` on, the first without obstacles: all in one kernel, fused kernels, kernels for many rows, the rest.

    What a loop cannot run is never tried on it. Twins run one after another.
    """
    compiled = ops.name != TWINS
    if first == "persistent" and compiled and not obstacles(config, weights, batch):
        return PersistentLoop(config, weights, schedules)
    if first in ("persistent", "fused") and compiled and not fused_obstacles(config, weights, batch):
        return FusedLoop(config, weights, ops, schedules)
    if first != "rows" and compiled and not many_obstacles(config, weights, batch):
        return ManyRowsLoop(config, weights, ops, schedules)
    return RowsLoop(config, weights, ops, schedules)


def told(config: ModelConfig, weights: TurboWeights, loops: Mapping[int, DenoiseLoop]) -> dict[str, dict[str, str]]:
    """The loop of each batch size, and what stands in the way of the faster ones."""
    slower = {batch: loop for batch, loop in sorted(loops.items()) if loop.name != PersistentLoop.name}
    return {
        "denoise_loop": {str(batch): loop.name for batch, loop in sorted(loops.items())},
        "not_persistent": {str(batch): "; ".join(obstacles(config, weights, batch)) for batch in slower},
        "not_fused": {
            str(batch): "; ".join(fused_obstacles(config, weights, batch))
            for batch, loop in slower.items()
            if loop.name != FusedLoop.name
        },
        "not_many": {
            str(batch): "; ".join(many_obstacles(config, weights, batch))
            for batch, loop in slower.items()
            if loop.name == RowsLoop.name
        },
        "suffix_attention": {
            str(batch): "; ".join(suffix_attention_obstacles(config, weights)) or "cluster"
            for batch, loop in slower.items()
            if loop.name == FusedLoop.name
        },
    }
