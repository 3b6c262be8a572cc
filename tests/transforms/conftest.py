"""openpi's recorded numbers, and a tokenizer that can be read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transforms_support import DATA, LetterTokenizer

from turbopi.transforms import DatasetStats, NormStats


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def letters() -> LetterTokenizer:
    return LetterTokenizer()


@pytest.fixture(scope="session")
def recorded() -> dict[str, np.ndarray]:
    with np.load(DATA / "io" / "prepost_fixture.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def recorded_prompts() -> dict[str, list[list[Any]]]:
    return json.loads((DATA / "io" / "prepost_prompts.json").read_text())


@pytest.fixture(scope="session")
def recorded_stats(recorded: dict[str, np.ndarray]) -> DatasetStats:
    names = ("mean", "std", "q01", "q99")
    return DatasetStats(*(NormStats(*(recorded[f"stats.{v}.{n}"] for n in names)) for v in ("state", "actions")))
