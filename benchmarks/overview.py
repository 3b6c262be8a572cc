"""README's picture: what a tick takes, engine by engine, and what a policy still does.

    python benchmarks/overview.py

Drawn from receipts alone into docs/images/overview.svg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from closed_loop_docs import rates_and_whiskers
from doc_tables import IMAGES, RESULTS, receipt, save_picture
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BEST_PUBLIC_MS = 17.5
"""torch.compile with every product tuned, on an H200 (PEERS, measured)."""
FAST, SLOW, GOOD, BAD = "tab:blue", "lightsteelblue", "tab:green", "tab:red"
SHOWN = {
    "reference": "all of it, 10 steps",
    "steps3_every1": "3 steps",
    "steps1_every1": "1 step",
    "tokens0.95": "prefix reused behind a gate at 0.95",
    "delay1": "1 tick late",
    "delay2": "2 ticks late",
    "delay4": "4 ticks late",
    "delay2_rtc": "2 late, real-time chunking's default",
    "steps10_every2": "prefix reused at every 2nd inference",
    "steps10_every3": "prefix reused at every 3rd inference",
}
"""Rows of the closed loop, and what to call them."""


@dataclass(frozen=True)
class Options:
    """Where from, and where to."""

    results: Path = RESULTS
    """Directory of the receipts."""
    picture: Path = IMAGES / "overview.svg"
    """The picture."""


def main() -> None:
    """Draw it."""
    options = tyro.cli(Options, description=__doc__)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_ticks(left, ticks(options.results))
    draw_success(right, success(options.results))
    save_picture(figure, options.picture)
    print(f"wrote {options.picture}")


def found(name: str, results: Path) -> Mapping[str, Any]:
    """A receipt's results; raises FileNotFoundError without it."""
    content = receipt(name, results)
    if content is None:
        raise FileNotFoundError(f"{results} has no receipt {name}.json, which the picture is drawn from")
    return content["results"]


def ticks(results: Path) -> dict[str, float]:
    """Device milliseconds of a `libero` tick at full size on an H200, by what it is; the slowest first."""
    beside = found("bench_libero_engines_h200", results)["runs"][0]["subjects"]
    fp8 = found("bench_libero_fp8_h200", results)["runs"][0]
    return {
        "eager, bf16": found("latency_pi05_eager_bf16_h200", results)["tick"]["device"]["median_ms"],
        "graphed, bf16": beside["graphed:bf16"]["device_ms"],
        "compiled, bf16": beside["compiled:bf16"]["device_ms"],
        "best public engine, bf16": BEST_PUBLIC_MS,
        "turbo, bf16": beside["turbo:bf16"]["device_ms"],
        "turbo, fp8": fp8["subjects"]["turbo:fp8"]["device_ms"],
    }


def success(results: Path) -> dict[str, Mapping[str, Any]]:
    """The closed loop's rows that are shown."""
    rows = {row["name"]: row for row in found("runtime_closed_loop", results)["settings"]}
    return {label: rows[name] for name, label in SHOWN.items() if name in rows}


def draw_ticks(axes: Axes, measured: Mapping[str, float]) -> None:
    """A bar each."""
    names = list(reversed(measured))
    bars = axes.barh(names, [measured[n] for n in names], color=[FAST if "turbo" in n else SLOW for n in names])
    axes.bar_label(bars, [f"{measured[n]:.3g} ms, {1e3 / measured[n]:.0f} Hz" for n in names], padding=3, fontsize=8)
    axes.set(xlim=(0, 1.35 * max(measured.values())))
    axes.set_title("A tick of full-size π0.5 on an H200", fontsize=10)
    axes.set_xlabel("device milliseconds: 2 cameras, 40 prompt tokens, 10 actions, 10 steps", fontsize=9)
    axes.tick_params(labelsize=9)


def draw_success(axes: Axes, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """A bar each with its 95 % interval; red where the paired test shows it to be worse."""
    names = list(reversed(rows))
    rates, whiskers = rates_and_whiskers([rows[n] for n in names])
    worse = [rows[n]["p_value"] < 0.05 and rows[n]["only_reference"] > rows[n]["only_this"] for n in names]
    colours = [BAD if each else GOOD for each in worse]
    axes.barh(names, rates, xerr=whiskers, color=colours, alpha=0.75, error_kw={"capsize": 2, "lw": 1})
    for index, name in enumerate(names):
        axes.text(103, index, f"{rows[name]['successes']}", va="center", fontsize=8)
    axes.set(xlim=(0, 112))
    axes.set_title("Successes of 200 paired episodes; red: worse", fontsize=10)
    axes.set_xlabel("success in LIBERO, % (95 % interval)", fontsize=9)
    axes.tick_params(labelsize=9)


if __name__ == "__main__":
    main()
