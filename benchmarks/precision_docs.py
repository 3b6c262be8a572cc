"""The tables of docs/precision.md, made from receipts and from nothing else.

    python benchmarks/precision_docs.py           # prints the tables
    python benchmarks/precision_docs.py --write   # puts them into docs/precision.md

What no receipt tells says "not run yet". A table stands between the lines `<!-- NAME -->` and `<!-- end of NAME -->`.
Receipts, all in benchmarks/results/: `precision_errors*.json` (benchmarks/precision_errors.py; the first that knows a
row tells it), `precisions.json` (benchmarks/precisions.py), `bench_precisions_*.json` and `bench_*_fp8_*.json`
(turbo-pi bench, of one observation), `audit_libero_small_*.json` (turbo-pi audit), `observers_*.json`
(benchmarks/precision_errors.py --calibration).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from doc_tables import RESULTS, ROOT, Options, fill, markdown_table
from paired_runs import success_cells

PAGE = ROOT / "docs" / "precision.md"
NOT_RUN = "not run yet"
REFERENCE = "eager:fp32"
"""Of errors."""
BF16 = "turbo:bf16"
"""Of success."""
RUNS = (
    REFERENCE,
    "eager:bf16",
    BF16,
    "eager:fp8",
    "turbo:fp8",
    "eager:int8",
    "eager:w8a16",
    "eager:w4a16",
    "eager:nvfp4",
)
"""ENGINE:PRECISION, a row each; others that a receipt holds follow."""
SIMULATED = ("eager:fp8", "eager:nvfp4")
"""Computed in float32: their time says nothing."""
LEVEL = 0.05
MOST_LOST = 0.02
"""A precision passes if its success is not below bf16's: by the exact test, and by at most two points."""
PAIRS = 200
"""Below which no verdict is given."""


Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Receipts:
    """What is known: errors, success, audits and ticks (of each workload) by ENGINE:PRECISION, bytes by precision."""

    errors: Rows
    full_size: Mapping[str, Mapping[str, int]]
    success: Rows
    ticks: Mapping[str, Rows]
    audits: Rows
    observers: Sequence[Mapping[str, Any]]

    @property
    def names(self) -> tuple[str, ...]:
        """All runs of which something is known or will be."""
        timed = [name for rows in self.ticks.values() for name in rows]
        return tuple(dict.fromkeys((*RUNS, *self.errors, *self.success, *timed)))


def main() -> None:
    """Print or write the tables."""
    options = tyro.cli(Options, description=__doc__)
    receipts = read(RESULTS)
    fill(PAGE, {name: partial(make, receipts) for name, make in TABLES.items()}, options.write)


def read(results: Path) -> Receipts:
    """Everything that the receipts of a directory tell."""
    errors: dict[str, Any] = {}
    full_size: dict[str, Any] = {}
    for file in sorted(results.glob("precision_errors*.json")):
        found = json.loads(file.read_text())["results"]
        errors = {f"{row['engine']}:{row['precision']}": row for row in found["rows"]} | errors
        full_size = found["full_size_bytes"] | full_size
    ticks: dict[str, dict[str, Any]] = {}
    for file in sorted({*results.glob("bench_precisions_*.json"), *results.glob("bench_*_fp8_*.json")}):
        receipt = json.loads(file.read_text())
        if receipt["what"] != "bench latency" or receipt["results"]["runs"][0]["batch"] != 1:
            continue
        known, subjects = receipt["config"], receipt["results"]["runs"][0]["subjects"]
        named = {name if ":" in name else f"{name}:{known['precision']}": row for name, row in subjects.items()}
        ticks.setdefault(known["workload"]["name"], {}).update(
            {name: {**row, "gain": _gain(name, named)} for name, row in named.items()}
        )
    played = results / "precisions.json"
    runs = json.loads(played.read_text())["results"]["runs"] if played.is_file() else []
    audited = [json.loads(file.read_text())["results"] for file in sorted(results.glob("audit_libero_small_*.json"))]
    audits = {found["candidate"]: found for found in audited if {"candidate", "over_budget"} <= set(found)}
    files = sorted(results.glob("observers_*.json"))
    observers = [row for file in files for row in json.loads(file.read_text())["results"]["rows"]]
    return Receipts(errors, full_size, {row["run"]: row for row in runs}, ticks, audits, observers)


def _gain(name: str, subjects: Rows) -> float | None:
    """How much faster a tick is than the same engine's in bf16, in the same run of the benchmark."""
    plain = f"{name.partition(':')[0]}:bf16"
    return None if plain == name or plain not in subjects else _ms(subjects[plain]) / _ms(subjects[name])


def _ms(measured: Mapping[str, Any]) -> float:
    return float(measured.get("device_ms") or measured["call"]["median_ms"])


def precision_table(receipts: Receipts) -> str:
    """Speed, memory, error, success and verdict, a row a run."""
    header = (
        "engine:precision",
        "tick `libero`, ms (stages)",
        "tick `full`, ms",
        "weights, GB",
        "error of the actions, median (worst)",
        "audit",
        "success of 200",
        "interval",
        "p against bf16",
        "verdict",
    )
    return markdown_table(header, [_row(name, receipts) for name in receipts.names])


def _row(name: str, receipts: Receipts) -> tuple[str, ...]:
    error, success = receipts.errors.get(name), receipts.success.get(name)
    far = NOT_RUN
    if name == REFERENCE:
        far = "0, the reference"
    elif error is not None:
        far = f"{error['median_frame']:.1e} ({error['worst_frame']:.1e})"
    cells = (NOT_RUN, "", "") if success is None else success_cells(success)
    if name == BF16 and success is not None:
        cells = (*cells[:2], "")
    ticks = [_tick(name, receipts.ticks.get(workload, {}).get(name)) for workload in ("libero", "full")]
    return f"`{name}`", *ticks, _size(name, receipts), far, _audit(name, receipts), *cells, verdict(name, success)


def _size(name: str, receipts: Receipts) -> str:
    """Gigabytes at full size: as an engine of its own tells, or as counted for the reference."""
    engine, _, precision = name.partition(":")
    if engine in ("eager", "graphed"):
        held = receipts.full_size.get(precision)
    else:
        held = receipts.ticks.get("libero", {}).get(name, {}).get("engine", {}).get("weight_bytes")
    return NOT_RUN if held is None else f"{sum(held.values()) / 1e9:.2f}"


def _audit(name: str, receipts: Receipts) -> str:
    """Operations that cost more than correct arithmetic of the precision; the reference's own sets what that is."""
    if name.startswith("eager:"):
        return "sets the budget"
    found = receipts.audits.get(name)
    if found is None:
        return NOT_RUN
    ours, plain = found["actions"]["candidate"], found["actions"]["plain"]
    return f"{found['over_budget']} over budget; actions {ours:.1e}, {plain:.1e} is the format's"


def _tick(name: str, measured: Mapping[str, Any] | None) -> str:
    """On the GPU where that is known, else the whole call; and how much less than in bf16."""
    if name in SIMULATED:
        return "simulated"
    if measured is None:
        return NOT_RUN
    stages = " + ".join(f"{stage['median_ms']:.1f}" for stage in measured.get("stages", {}).values())
    gain = measured["gain"]
    return f"{_ms(measured):.1f}{f' ({stages})' if stages else ''}{'' if gain is None else f', {gain:.2f} × bf16'}"


def verdict(name: str, success: Mapping[str, Any] | None) -> str:
    """What the closed loop says; an error alone allows no verdict."""
    if name == BF16:
        return "the reference"
    if success is None or success["episodes"] < PAIRS:
        return NOT_RUN
    lost, p = -success["difference"], success["p_value"]
    if lost > 0 and p <= LEVEL:
        return f"worse: {100 * lost:.1f} points lost"
    if lost > MOST_LOST:
        return f"not shown to be as good: {100 * lost:.1f} points lost, p = {p:.2g}"
    return "as good as bf16"


def memory_table(receipts: Receipts) -> str:
    """Bytes of the weights, a row a precision, at full size and of the small checkpoint."""
    header = ("precision", "products, full size, GB", "the rest, GB", "in all, of bf16's", "pi05-libero-small, MB")
    full = receipts.full_size
    if not full:
        return NOT_RUN
    whole = sum(full["bf16"].values())
    rows = []
    for precision, held in full.items():
        small = receipts.errors.get(f"eager:{precision}", {}).get("weight_bytes")
        rows.append(
            (
                precision,
                f"{held['products'] / 1e9:.2f}",
                f"{held['rest'] / 1e9:.2f}",
                f"{sum(held.values()) / whole:.2f}",
                NOT_RUN if small is None else f"{sum(small.values()) / 1e6:.1f}",
            )
        )
    return markdown_table(header, rows)


def error_table(receipts: Receipts) -> str:
    """Error of each stage against float32, a row a run."""
    header = (
        "engine:precision",
        "image tokens",
        "keys",
        "values",
        "actions",
        "median frame",
        "worst frame",
        "largest difference",
        "cosine",
    )
    rows = []
    for name, row in receipts.errors.items():
        if name == REFERENCE:
            continue
        stages = [f"{row['relative_error'][stage]:.1e}" for stage in ("image_tokens", "keys", "values", "actions")]
        closer = [f"{row[figure]:.1e}" for figure in ("median_frame", "worst_frame", "largest_difference")]
        rows.append((f"`{name}`", *stages, *closer, f"{row['cosine']:.5f}"))
    return markdown_table(header, rows) if rows else NOT_RUN


def observer_table(receipts: Receipts) -> str:
    """Median error of the actions by observer, a column a precision."""
    errors: dict[str, dict[str, float]] = {}
    rows = [row for row in receipts.errors.values() if row["engine"] == "eager"]
    for row in (*rows, *receipts.observers):
        made = row["calibration"]
        if made is not None:
            observer = made["observer"] if made["observer"] == "max" else f"percentile {made['percentile']:g}"
            errors.setdefault(observer, {}).setdefault(row["precision"], row["median_frame"])
    precisions = tuple(dict.fromkeys(precision for found in errors.values() for precision in found))
    cells = [
        (observer, *(f"{found[p]:.1e}" if p in found else NOT_RUN for p in precisions))
        for observer, found in errors.items()
    ]
    return markdown_table(("observer", *precisions), cells) if cells else NOT_RUN


TABLES: dict[str, Callable[[Receipts], str]] = {
    "precisions": precision_table,
    "memory": memory_table,
    "errors": error_table,
    "observers": observer_table,
}


if __name__ == "__main__":
    main()
