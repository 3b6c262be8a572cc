"""Tables and plots of docs/closed-loop.md, made from the receipts and from nothing else.

    python benchmarks/closed_loop_docs.py           # prints the tables
    python benchmarks/closed_loop_docs.py --write   # puts them into docs/closed-loop.md, draws docs/images/

A table stands between the lines `<!-- NAME -->` and `<!-- end of NAME -->`. Where a receipt is missing, it stays as it
is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from doc_tables import IMAGES, RESULTS, ROOT, fill, markdown_table, receipt, save_picture
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paired_runs import success_cells

from turbopi.sim.compare import compare
from turbopi.sim.episodes_file import EPISODES_FILE, read_records
from turbopi.sim.summary import summarize

PAGE = ROOT / "docs" / "closed-loop.md"
OWN, OTHER = RESULTS / "libero_spatial_h200", RESULTS / "libero_spatial_other_bowl"
ERRORS = (5e-4, 5.0)
"""The span of relative errors that is drawn; the unbroken policy is a line."""
COLOURS = {"model": "tab:blue", "transforms": "tab:orange", "camera": "tab:purple"}


@dataclass(frozen=True)
class Options:
    """What to do."""

    write: bool = False
    """Put the tables into the page and draw the plots, instead of printing."""
    own: Path = OWN
    """Run of `turbo-pi eval` with the tasks' own prompts."""
    other_bowl: Path = OTHER
    """Run of `turbo-pi eval --prompts other-bowl` over the same episodes."""


def main() -> None:
    """Print or write what there are receipts for."""
    options = tyro.cli(Options, description=__doc__)
    fill(PAGE, {name: partial(make, options) for name, make in TABLES.items()}, options.write)
    if options.write:
        for draw, name in ((draw_mistakes, "planted_mistakes"), (draw_knobs, "classic_knobs")):
            found = receipt(name, RESULTS)
            if found is not None:
                draw(found["results"], IMAGES / f"{name}.svg")


def mistakes_table(_: Options) -> str | None:
    """Success beside error, a row a mistake."""
    found = receipt("planted_mistakes", RESULTS)
    if found is None:
        return None
    results = found["results"]
    header = ("mistake", "success", "interval", "p against unbroken", "relative error", "first step", "cosine")
    rows = []
    for row in results["mistakes"]:
        audit, first = row["audit"], row["audit"]["first_step_relative_error"]
        success, interval, p = success_cells(row)
        numbers = (f"{audit['relative_error']:.1e}", "" if first is None else f"{first:.1e}", f"{audit['cosine']:.4f}")
        rows.append((row["title"], success, interval, "" if row["name"] == results["reference"] else p, *numbers))
    return markdown_table(header, rows)


def knobs_table(_: Options) -> str | None:
    """Success and cost, a row a setting."""
    found = receipt("classic_knobs", RESULTS)
    if found is None:
        return None
    results = found["results"]
    header = ("steps", "replan", "success", "interval", "p against 10 and 5", "median steps of successes")
    rows = []
    for row in results["settings"]:
        success, interval, p = success_cells(row)
        usual = f"steps{row['steps']}_replan{row['replan']}" == results["reference"]
        median = row["median_steps_of_successes"]
        numbers = (success, interval, "" if usual else p, "" if median is None else f"{median:g}")
        rows.append((str(row["steps"]), str(row["replan"]), *numbers))
    return markdown_table(header, rows)


def language_table(options: Options) -> str | None:
    """Success with the own and with the other bowl's prompt, a row a task."""
    if not all((directory / EPISODES_FILE).is_file() for directory in (options.own, options.other_bowl)):
        return None
    own, other = (summarize(read_records(directory), 1) for directory in (options.own, options.other_bowl))
    rows = [language_row(str(b["task"]), a, b) for a, b in zip(own["tasks"], other["tasks"], strict=True)]
    total = language_row("all", own["total"], other["total"])
    header = ("task", "own prompt", "asked for the other bowl: own bowl placed", "the asked-for bowl placed")
    verdict = compare(options.own, options.other_bowl, 1)["verdict"]
    return f"{markdown_table(header, [*rows, total])}\n\n{verdict}"


def language_row(label: str, own: dict[str, Any], other: dict[str, Any]) -> tuple[str, ...]:
    """Counts of a task or of all."""
    counts = (f"{s['successes']}/{s['episodes']}" for s in (own, other))
    return label, *counts, f"{other['asked']}/{other['episodes']}"


TABLES: dict[str, Callable[[Options], str | None]] = {
    "planted mistakes": mistakes_table,
    "steps and replan": knobs_table,
    "language": language_table,
}


def draw_mistakes(results: dict[str, Any], picture: Path) -> Path:
    """Success against relative error; returns the picture's path."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    unbroken = next(r for r in results["mistakes"] if r["name"] == results["reference"])
    axes.axhline(100 * unbroken["rate"], color="tab:green", label="unbroken")
    axes.axhspan(*(100 * end for end in unbroken["interval"]), color="tab:green", alpha=0.12)
    noise = [r for r in results["mistakes"] if r["where"] == "noise"]
    if noise:
        points(axes, [r["audit"]["relative_error"] for r in noise], noise, "tab:gray", "white noise", line=True)
    for where, colour in COLOURS.items():
        rows = [r for r in results["mistakes"] if r["where"] == where]
        if rows:
            points(axes, [r["audit"]["relative_error"] for r in rows], rows, colour, where)
        for r in rows:  # slanted, so that neighbours can be told apart
            place = (r["audit"]["relative_error"], 100 * r["rate"])
            offset, turn = ((4, -4), -50) if r["rate"] > 0.5 else ((2, 4), 50)
            style = {"va": "top" if r["rate"] > 0.5 else "bottom", "rotation": turn, "rotation_mode": "anchor"}
            axes.annotate(r["name"], place, offset, textcoords="offset points", fontsize=8, **style)
    axes.set(xscale="log", xlim=ERRORS, ylim=(-4, 104))
    axes.set(xlabel="relative error of the normalised actions", ylabel="success, %")
    return finished(figure, axes, picture)


def draw_knobs(results: dict[str, Any], picture: Path) -> Path:
    """Success against each knob that was turned, the other at its usual place; returns the picture's path."""
    turned = {}
    for knob, other, usual in (("steps", "replan", 5), ("replan", "steps", 10)):
        rows = sorted((r for r in results["settings"] if r[other] == usual), key=lambda r: r[knob])
        if len(rows) > 1:
            turned[knob] = (f"{other} {usual}", rows)
    figure = Figure(figsize=(4.5 * len(turned), 3.6), layout="constrained")
    for place, (knob, (fixed, rows)) in enumerate(turned.items()):
        axes = figure.add_subplot(1, len(turned), place + 1)
        points(axes, [r[knob] for r in rows], rows, "tab:blue", fixed, line=True)
        axes.set(ylim=(-4, 104), xlabel=knob, ylabel="" if place else "success, %")
        finished(figure, axes, picture)
    return picture


def rates_and_whiskers(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Success rates in percent, and how far their intervals reach below and above."""
    rates = [100 * r["rate"] for r in rows]
    low = [rate - 100 * r["interval"][0] for rate, r in zip(rates, rows, strict=True)]
    high = [100 * r["interval"][1] - rate for rate, r in zip(rates, rows, strict=True)]
    # An interval's end may lie a rounding error inside the rate.
    return rates, [[max(0.0, v) for v in side] for side in (low, high)]


def points(axes: Axes, x: list[float], rows: list[dict[str, Any]], colour: str, label: str, line: bool = False) -> None:
    """Success rates with their intervals."""
    rates, whiskers = rates_and_whiskers(rows)
    axes.errorbar(x, rates, whiskers, fmt="o-" if line else "o", color=colour, capsize=3, label=label)


def finished(figure: Figure, axes: Axes, picture: Path) -> Path:
    """Grid and legend, and the file."""
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    save_picture(figure, picture)
    return picture


if __name__ == "__main__":
    main()
