"""Dataset statistics, and the normalisations that openpi and lerobot make of them, each with its inverse (SPEC 2.4).

A model sees states and actions near [-1, 1]. The two ports share the statistics but not the arithmetic: openpi adds
1e-6 to every width, lerobot only guards against division by zero, and lerobot works in the data's own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

NormMode = Literal["mean_std", "quantile"]
Convention = Literal["openpi", "lerobot"]

NORM_MODES: tuple[NormMode, ...] = ("mean_std", "quantile")
CONVENTIONS: tuple[Convention, ...] = ("openpi", "lerobot")

_NEEDED: dict[NormMode, tuple[str, str]] = {"mean_std": ("mean", "std"), "quantile": ("q01", "q99")}
_OPENPI_EPS = 1e-6
_LEROBOT_EPS = 1e-8


@dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics of one vector: each (dims,) float64, or None where the dataset does not have it.

    Anything numpy can read is taken and converted; values are not judged here (a doctor must be able to look at bad
    ones), only shapes are.
    """

    mean: np.ndarray | None
    std: np.ndarray | None
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None

    def __post_init__(self) -> None:
        lengths = {}
        for name in ("mean", "std", "q01", "q99"):
            value = getattr(self, name)
            if value is None:
                continue
            try:
                array = np.array(value, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"norm stats {name} is not a list of numbers: {error}") from error
            if array.ndim != 1 or not array.size:
                raise ValueError(f"norm stats {name} has shape {array.shape}, expected one non-empty row of numbers")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
            lengths[name] = array.size
        if not lengths:
            raise ValueError("norm stats hold neither mean and std nor q01 and q99")
        if len(set(lengths.values())) > 1:
            raise ValueError(f"norm stats disagree on their length: {lengths}")

    @property
    def dims(self) -> int:
        """Length of the vector that the statistics describe."""
        return next(v.size for v in (self.mean, self.std, self.q01, self.q99) if v is not None)

    def to_dict(self) -> dict[str, list[float] | None]:
        """Plain JSON values; None stays None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: None if value is None else value.tolist() for name, value in values.items()}


@dataclass(frozen=True, eq=False)
class DatasetStats:
    """The statistics that a policy needs: of the state it is shown and of the actions it was trained on."""

    state: NormStats
    actions: NormStats


def stats_from_lerobot(arrays: Mapping[str, Any]) -> DatasetStats:
    """Read the tensors of lerobot's normaliser files.

    Args:
        arrays: numpy arrays by names such as "observation.state.q01" and "action.mean".

    Raises:
        ValueError: a vector has no statistics at all, or malformed ones.
    """
    found = {}
    for vector in ("observation.state", "action"):
        values = {name: arrays.get(f"{vector}.{name}") for name in ("mean", "std", "q01", "q99")}
        if all(value is None for value in values.values()):
            raise ValueError(
                f"the lerobot statistics have no {vector}.mean, .std, .q01 or .q99 (found: "
                f"{', '.join(sorted(arrays)) or 'nothing'}); take the normalizer file of the checkpoint's preprocessor"
            )
        found[vector] = NormStats(**values)
    return DatasetStats(state=found["observation.state"], actions=found["action"])


@dataclass(frozen=True, eq=False)
class Normalizer:
    """One vector's normalisation, in one mode and one port's arithmetic.

    Attributes:
        stats: of the vector.
        mode: "mean_std" (π0 in openpi) or "quantile" (π0.5).
        convention: whose epsilons and dtypes.
        vector: "state" or "actions", for messages.

    Statistics longer than the data are cut to it. Dimensions beyond the statistics pass through, except in openpi's
    inverse of mean_std, which treats them as mean 0 and std 1 and so scales them by 1 + 1e-6.

    openpi's statistics are float64, so numpy computes and answers in float64; lerobot's take the data's dtype.
    """

    stats: NormStats
    mode: NormMode
    convention: Convention
    vector: str

    def __post_init__(self) -> None:
        if self.mode not in NORM_MODES:
            raise ValueError(f"normalisation mode must be one of {', '.join(NORM_MODES)}, got {self.mode!r}")
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {self.convention!r}")
        for name in _NEEDED[self.mode]:
            value = getattr(self.stats, name)
            if value is None:
                raise ValueError(
                    f"norm stats of the {self.vector} have no {name}, which mode {self.mode!r} needs; compute the "
                    "statistics again with it, or choose the mode that the model was trained with"
                )
            if not np.isfinite(value).all():
                raise ValueError(f"norm stats of the {self.vector} have NaN or infinite values in {name}: {value}")

    def _arrays(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = (getattr(self.stats, name)[: x.shape[-1]] for name in _NEEDED[self.mode])
        if self.convention == "lerobot":
            return low.astype(x.dtype), high.astype(x.dtype)
        return low, high

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """(..., dims) robot units to the model's. float64 for openpi, the data's dtype for lerobot."""
        head, tail = self._split(x)
        a, b = self._arrays(head)
        if self.mode == "mean_std":
            head = (head - a) / (b + self._eps(head))
        elif self.convention == "openpi":
            head = (head - a) / (b - a + _OPENPI_EPS) * 2.0 - 1.0
        else:
            head = 2 * (head - a) / _lerobot_width(a, b) - 1
        return _join(head, tail)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `normalize`: (..., dims) model units to the robot's."""
        head, tail = self._split(x)
        a, b = self._arrays(head)
        if self.mode == "mean_std":
            if self.convention == "openpi":
                return _join(head * (b + _OPENPI_EPS) + a, tail * np.full(tail.shape[-1], 1.0 + _OPENPI_EPS))
            head = head * b + a
        elif self.convention == "openpi":
            head = (head + 1.0) / 2.0 * (b - a + _OPENPI_EPS) + a
        else:
            head = (head + 1) * _lerobot_width(a, b) / 2 + a
        return _join(head, tail)

    def _split(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if x.dtype.kind != "f":
            x = x.astype(np.float64 if self.convention == "openpi" else np.float32)
        return x[..., : self.stats.dims], x[..., self.stats.dims :]

    def _eps(self, x: np.ndarray) -> float | np.floating[Any]:
        return _OPENPI_EPS if self.convention == "openpi" else x.dtype.type(_LEROBOT_EPS)


def _lerobot_width(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    width = high - low
    return np.where(width == 0, width.dtype.type(_LEROBOT_EPS), width)


def _join(head: np.ndarray, tail: np.ndarray) -> np.ndarray:
    return np.concatenate([head, tail], axis=-1) if tail.shape[-1] else head
