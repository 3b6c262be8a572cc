"""Two runs over the same episodes: did the change cost, or gain, success?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .episodes_file import EpisodeKey, EpisodeRecord, differences, read_config, read_records
from .statistics import CONFIDENCE, PairedTable, paired_table, wilson
from .summary import latest

SIGNIFICANCE = 0.05


def compare(a: Path, b: Path, minimum: int) -> dict[str, Any]:
    """Compare two runs' directories, episode by episode.

    Args:
        a: of the first run, the one to be measured against.
        b: of the second.
        minimum: pairs below which there is no verdict.

    Returns:
        "tasks": per task that has pairs, "suite", "task", "pairs", "both", "only_a", "only_b", "neither", and the
        discordant episodes' initial states, "states_only_a" and "states_only_b"; "total": the same counts, "rate_a",
        "rate_b", their Wilson "interval_a" and "interval_b", the paired "difference" (B - A) and its interval, and
        McNemar's exact "p_value"; "left_out": episodes that only one run has; "configuration": what differs;
        "enough" and "verdict".

    Raises:
        FileNotFoundError: not a run's directory.
        ValueError: a damaged run, or two runs that share no episode.
    """
    first, second = _outcomes(a), _outcomes(b)
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError(
            f"the runs share no episode: {a} has {_span(first)}; {b} has {_span(second)}; "
            "evaluate both with the same suite, tasks, initial states and seed"
        )
    table = paired_table(first, second)
    tasks = sorted({key[:2] for key in shared})
    total = {**_counts(table), **_rates(table)}
    return {
        "a": str(a),
        "b": str(b),
        "minimum": minimum,
        "confidence": CONFIDENCE,
        "tasks": [_task(suite, task, first, second, shared) for suite, task in tasks],
        "total": total,
        "left_out": {"a": len(first) - len(shared), "b": len(second) - len(shared)},
        "configuration": _configuration_changes(a, b),
        "enough": table.pairs >= minimum,
        "verdict": paired_verdict(table, minimum),
    }


def paired_verdict(table: PairedTable, minimum: int) -> str:
    """What may be said of the difference."""
    discordant = f"{table.only_a} episodes only A finished, {table.only_b} only B"
    if table.pairs < minimum:
        return f"no verdict: {table.pairs} pairs ({discordant}), a verdict takes at least {minimum}"
    low, high = table.difference()
    evidence = (
        f"p = {table.p_value:.3g}, {table.pairs} pairs, {discordant}; the difference B - A lies between "
        f"{100 * low:+.1f} and {100 * high:+.1f} points (approximate {100 * CONFIDENCE:.0f} % interval)"
    )
    if table.p_value >= SIGNIFICANCE:
        return f"no difference shown, which does not show that there is none: {evidence}"
    return f"B succeeds {'more' if table.only_b > table.only_a else 'less'} often than A: {evidence}"


def _outcomes(directory: Path) -> dict[EpisodeKey, bool]:
    records: list[EpisodeRecord] = latest(read_records(directory))
    return {r.key: r.success for r in records if r.error is None}


def _span(outcomes: dict[EpisodeKey, bool]) -> str:
    if not outcomes:
        return "no finished episode"
    suites, tasks, states, seeds = (sorted({key[i] for key in outcomes}) for i in range(4))
    return f"{', '.join(map(str, suites))}, tasks {_list(tasks)}, initial states {_list(states)}, seed {_list(seeds)}"


def _list(values: Sequence[Any]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _counts(table: PairedTable) -> dict[str, int]:
    return {
        "pairs": table.pairs,
        "both": table.both,
        "only_a": table.only_a,
        "only_b": table.only_b,
        "neither": table.neither,
    }


def _rates(table: PairedTable) -> dict[str, Any]:
    a, b = table.both + table.only_a, table.both + table.only_b
    return {
        "rate_a": a / table.pairs,
        "rate_b": b / table.pairs,
        "interval_a": list(wilson(a, table.pairs)),
        "interval_b": list(wilson(b, table.pairs)),
        "difference": (b - a) / table.pairs,
        "difference_interval": list(table.difference()),
        "p_value": table.p_value,
    }


def _task(
    suite: str, task: int, a: dict[EpisodeKey, bool], b: dict[EpisodeKey, bool], shared: Sequence[EpisodeKey]
) -> dict[str, Any]:
    keys = [key for key in shared if key[:2] == (suite, task)]
    table = paired_table({k: a[k] for k in keys}, {k: b[k] for k in keys})
    return {
        "suite": suite,
        "task": task,
        **_counts(table),
        "states_only_a": [k[2] for k in keys if a[k] and not b[k]],
        "states_only_b": [k[2] for k in keys if b[k] and not a[k]],
    }


def _configuration_changes(a: Path, b: Path) -> list[str]:
    first, second = read_config(a), read_config(b)
    parts = ("config", "policy")
    return differences({p: first.get(p) for p in parts}, {p: second.get(p) for p in parts})
