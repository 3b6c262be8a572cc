"""Tables that more than one command prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

TIMINGS = ("transforms_ms", "model_ms", "encode_images_ms", "prefill_ms", "denoise_ms", "infer_ms")


def action_table(actions: np.ndarray, title: str = "actions") -> Table:
    """A chunk of actions (H, dims), a row a step."""
    table = Table("step", *(f"a{i}" for i in range(actions.shape[1])), title=title)
    for step, row in enumerate(actions):
        table.add_row(str(step), *(f"{value:+.4f}" for value in row))
    return table


def timing_table(
    timings: Sequence[Mapping[str, float]], title: str = "milliseconds per stage", names: Sequence[str] = TIMINGS
) -> Table:
    """Median, p99 and largest of each stage over several calls' `policy_timing`, or of other `names` measured so.

    What an engine does not tell apart has no row.
    """
    table = Table("stage", "median", "p99", "max", title=title)
    told = [name for name in names if all(name in timing for timing in timings)]
    for name in told:
        values = np.array([timing[name] for timing in timings])
        cells = (np.median(values), np.percentile(values, 99), values.max())
        table.add_row(name.removesuffix("_ms"), *(f"{value:.1f}" for value in cells))
    return table
