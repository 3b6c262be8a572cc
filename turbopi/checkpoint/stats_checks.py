"""The doctor's look at normalisation statistics: present, finite, wide enough, as long as the robot's vectors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..config import ModelConfig
from ..errors import CheckpointError
from ..transforms import DatasetStats, NormMode, NormStats, Robot
from . import lerobot
from .checkpoint import Checkpoint
from .report import Check, Fact

NAME = "norm stats"
_NEEDED: dict[NormMode, tuple[str, str]] = {"mean_std": ("mean", "std"), "quantile": ("q01", "q99")}
_AGAIN = "compute the dataset's statistics again and put them in place of these"


def stats_facts(stats: DatasetStats, modes: dict[str, NormMode]) -> Iterator[Fact]:
    """The ranges that the normalisation maps to about [-1, 1], and their lengths."""
    for vector, part in (("state", stats.state), ("actions", stats.actions)):
        low_name, high_name = _NEEDED[modes[vector]]
        low, high = getattr(part, low_name), getattr(part, high_name)
        text = "absent" if low is None or high is None else f"{low_name} {_row(low)}, {high_name} {_row(high)}"
        yield Fact(f"{vector} stats", f"{part.dims} numbers, {modes[vector]}: {text}")


def _row(values: np.ndarray) -> str:
    return "[" + ", ".join(f"{v:.3g}" for v in values) + "]"


def check_stats(
    checkpoint: Checkpoint, config: ModelConfig | None, robot: Robot | None, asset_id: str | None
) -> tuple[list[Fact], list[Check]]:
    """Load and judge the statistics. `robot`: whose vectors they must fit, None if unknown."""
    try:
        stats, modes = checkpoint.norm_stats(asset_id), checkpoint.norm_modes
    except (CheckpointError, FileNotFoundError) as error:
        remedy = f"{_AGAIN}; a policy cannot run without them"
        return [], [Check(NAME, "fail", str(error), remedy)]
    checks = []
    for vector, part in (("state", stats.state), ("actions", stats.actions)):
        checks += list(_vector(vector, part, modes[vector], config, robot))
    if checkpoint.format == "lerobot":
        checks += list(_lerobot(checkpoint.processors))
    return list(stats_facts(stats, modes)), checks


def _vector(
    vector: str, part: NormStats, mode: NormMode, config: ModelConfig | None, robot: Robot | None
) -> Iterator[Check]:
    name = f"{NAME}: {vector}"
    low, high = (getattr(part, field) for field in _NEEDED[mode])
    if low is None or high is None:
        absent = " and ".join(field for field in _NEEDED[mode] if getattr(part, field) is None)
        other = "mean and std" if mode == "quantile" else "quantiles"
        yield Check(name, "fail", f"{absent} absent, but this policy normalises by {mode} (only {other} there)", _AGAIN)
        return
    yield _length(name, vector, part, config, robot)
    used = _used_dims(vector, part, robot)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        bad = np.flatnonzero(~(np.isfinite(low) & np.isfinite(high))).tolist()
        yield Check(name, "fail", f"NaN or infinite values in dimensions {bad}", f"remove bad frames, then {_AGAIN}")
        return
    width = (high - low if mode == "quantile" else high)[:used]
    narrow, negative = np.flatnonzero(width == 0).tolist(), np.flatnonzero(width < 0).tolist()
    if negative:
        what = "q99 below q01" if mode == "quantile" else "negative std"
        yield Check(name, "fail", f"{what} in dimensions {negative}", _AGAIN)
    if narrow:
        yield Check(
            name,
            "fail",
            f"zero width in dimensions {narrow}: any deviation there is blown up about a million times",
            f"{_AGAIN} over data in which these dimensions move, or widen them by hand to the joint's range",
        )
    if not (narrow or negative):
        yield Check(name, "pass", f"{part.dims} numbers, finite, all of {used} used dimensions have width")


def _used_dims(vector: str, part: NormStats, robot: Robot | None) -> int:
    """Dimensions that data fills: the robot's, or all but a tail of zeros left by padding."""
    if robot is not None:
        return min(part.dims, robot.state_dim if vector == "state" else robot.action_dim)
    values = np.stack([v for v in (part.mean, part.std, part.q01, part.q99) if v is not None])
    filled = np.flatnonzero((values != 0).any(axis=0))
    return int(filled[-1]) + 1 if filled.size else part.dims


def _length(name: str, vector: str, part: NormStats, config: ModelConfig | None, robot: Robot | None) -> Check:
    padded = None if config is None else (config.state_dim if vector == "state" else config.action_dim)
    own = None if robot is None else (robot.state_dim if vector == "state" else robot.action_dim)
    name = f"{name} length"
    if padded is not None and part.dims > padded:
        return Check(
            name, "fail", f"{part.dims} numbers, the model takes at most {padded}", "use this model's own stats"
        )
    if own is not None and part.dims not in (own, padded):
        return Check(
            name,
            "fail",
            f"{part.dims} numbers, robot {robot.name if robot else ''} has {own}",
            "take the statistics of this robot's data, or name the right robot",
        )
    return Check(name, "pass", f"{part.dims} numbers" + (f", as robot {robot.name} has" if robot else ""))


def _lerobot(processors: lerobot.Processors) -> Iterator[Check]:
    name = "lerobot processors"
    action = {k: v for k, v in processors.arrays.items() if k.startswith("action.")}
    before = processors.pre_action
    differing = [k for k in action if k in before and not np.array_equal(action[k], before[k], equal_nan=True)]
    if differing:
        yield Check(
            name,
            "fail",
            f"pre- and postprocessor disagree on {', '.join(sorted(differing))}",
            "save the policy again: actions would be un-normalised by other numbers than they were trained with",
        )
    if processors.eps != lerobot.EPS:
        yield Check(
            name,
            "warn",
            f"eps is {processors.eps}, computed with {lerobot.EPS}",
            "set eps to 1e-8 in both processor files",
        )
    if not differing and processors.eps == lerobot.EPS:
        yield Check(name, "pass", "pre- and postprocessor agree")
