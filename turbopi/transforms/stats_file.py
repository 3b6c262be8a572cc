"""openpi's `norm_stats.json`, read and written (SPEC 2.4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .normalize import DatasetStats, NormStats

_FORM = '{"norm_stats": {"state": {"mean": [...], "std": [...], "q01": [...], "q99": [...]}, "actions": {...}}}'


def load_norm_stats(path: Path) -> DatasetStats:
    """Read a `norm_stats.json`. Quantiles may be null or absent; mean and std may not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not that format; names the file and the field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected the dataset's statistics there (openpi keeps them at "
            "CHECKPOINT/assets/ASSET_ID/norm_stats.json): copy them from the training run"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    vectors = document.get("norm_stats") if isinstance(document, dict) else None
    if not isinstance(vectors, dict):
        raise ValueError(f"{path} has no norm_stats object; expected {_FORM}")
    return DatasetStats(state=_read(vectors, "state", path), actions=_read(vectors, "actions", path))


def _read(vectors: dict[str, Any], name: str, path: Path) -> NormStats:
    values = vectors.get(name)
    if not isinstance(values, dict):
        raise ValueError(f"{path} has no statistics of the {name}; expected {_FORM}")
    for field in ("mean", "std"):
        if values.get(field) is None:
            raise ValueError(f"{path}: {name}.{field} is missing; expected {_FORM}")
    try:
        return NormStats(values["mean"], values["std"], values.get("q01"), values.get("q99"))
    except ValueError as error:
        raise ValueError(f"{path}, {name}: {error}") from error


def save_norm_stats(path: Path, stats: DatasetStats) -> None:
    """Write a `norm_stats.json`, making its directory. float64 survives exactly (`load_norm_stats` is the inverse).

    Raises:
        ValueError: mean or std is absent, which openpi's format requires.
    """
    vectors = {"state": stats.state, "actions": stats.actions}
    for name, values in vectors.items():
        if values.mean is None or values.std is None:
            raise ValueError(f"cannot write {path}: the {name} statistics have no mean and std, which the format needs")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"norm_stats": {name: values.to_dict() for name, values in vectors.items()}}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
