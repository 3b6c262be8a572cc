"""One run in numbers: success per task and in all with intervals, latency, control rate, and a verdict or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .episodes_file import EpisodeRecord
from .statistics import CONFIDENCE, wilson

SUMMARY_FILE = "summary.json"
CONTROL_HZ = 20.0
"""LIBERO's rate: an action lasts 1/20 s."""


def latest(records: Sequence[EpisodeRecord]) -> list[EpisodeRecord]:
    """One record per episode: an episode that first ended in an error and was played again counts as the latter."""
    return list({record.key: record for record in records}.values())


def summarize(records: Sequence[EpisodeRecord], minimum: int) -> dict[str, Any]:
    """Summarise a run.

    Args:
        records: of its directory.
        minimum: episodes below which there is no verdict.

    Returns:
        "tasks": a map per task with "task", "prompt", "episodes", "successes", "rate", "interval" (None without
        episodes), "asked" (see `asked`); "total": the same over all; "latency"; "control"; "errors": suite, task,
        initial_state and error of the episodes without an outcome, which count nowhere; "verdict": text, and "enough":
        whether it is one.
    """
    episodes = latest(records)
    played = [r for r in episodes if r.error is None]
    failed = [r for r in episodes if r.error is not None]
    tasks = sorted({(r.suite, r.task) for r in episodes})
    total = _success(played)
    return {
        "minimum": minimum,
        "confidence": CONFIDENCE,
        "tasks": [_task(suite, task, played) for suite, task in tasks],
        "total": total,
        "latency": latency(played),
        "control": control_rate(played),
        "errors": [
            {"suite": r.suite, "task": r.task, "initial_state": r.initial_state, "error": r.error} for r in failed
        ],
        "enough": total["episodes"] >= minimum,
        "verdict": verdict(total, minimum, len(failed)),
    }


def _task(suite: str, task: int, played: Sequence[EpisodeRecord]) -> dict[str, Any]:
    mine = [r for r in played if (r.suite, r.task) == (suite, task)]
    return {"suite": suite, "task": task, "prompt": mine[0].prompt if mine else "", **_success(mine)}


def _success(played: Sequence[EpisodeRecord]) -> dict[str, Any]:
    episodes, successes = len(played), sum(r.success for r in played)
    steps = [r.steps for r in played if r.success]
    return {
        "episodes": episodes,
        "successes": successes,
        "rate": successes / episodes if episodes else None,
        "interval": list(wilson(successes, episodes)) if episodes else None,
        "median_steps_of_successes": float(np.median(steps)) if steps else None,
        "asked": asked(played),
    }


def asked(played: Sequence[EpisodeRecord]) -> int | None:
    """How many episodes reached what their prompt asked for; None unless all ask for something else than the task."""
    reached = [r.asked for r in played if r.asked is not None]
    return sum(reached) if reached and len(reached) == len(played) else None


def latency(played: Sequence[EpisodeRecord]) -> dict[str, float] | None:
    """Milliseconds per inference, "p50_ms", "p95_ms", "p99_ms", "mean_ms", and how many "inferences"; None without."""
    values = np.array([ms for record in played for ms in record.infer_ms])
    if values.size == 0:
        return None
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    return {
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        "mean_ms": float(values.mean()),
        "inferences": int(values.size),
    }


def control_rate(played: Sequence[EpisodeRecord]) -> dict[str, float] | None:
    """Actions per second; None without inferences.

    "effective_hz": what a robot gets that plays its actions at 20 Hz and stands still during each inference.
    "ceiling_hz": what inference alone allows: actions executed per second of inference.
    """
    steps = sum(r.steps for r in played)
    seconds = sum(sum(r.infer_ms) for r in played) / 1e3
    if seconds == 0:
        return None
    return {"effective_hz": steps / (steps / CONTROL_HZ + seconds), "ceiling_hz": steps / seconds}


def verdict(total: dict[str, Any], minimum: int, errors: int) -> str:
    """What may be said of the success rate."""
    tail = f"; {errors} more ended in an error and count nowhere" if errors else ""
    episodes, successes = total["episodes"], total["successes"]
    if episodes < minimum:
        return f"no verdict: {episodes} episodes ({successes} succeeded), a verdict takes at least {minimum}{tail}"
    low, high = total["interval"]
    return (
        f"succeeds in {100 * total['rate']:.1f} % of {episodes} episodes "
        f"({100 * CONFIDENCE:.0f} % interval {100 * low:.1f} to {100 * high:.1f} %){tail}"
    )
