"""Tables and plots of docs/runtime.md, made from the receipts and from nothing else.

    python benchmarks/runtime_docs.py           # prints the tables
    python benchmarks/runtime_docs.py --write   # puts them into docs/runtime.md, draws docs/images/runtime_*.svg

A table stands between the lines `<!-- NAME -->` and `<!-- end of NAME -->`. Where a receipt is missing, it stays as it
is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from closed_loop_docs import finished, points
from doc_tables import IMAGES, RESULTS, ROOT, fill, markdown_table
from matplotlib.figure import Figure
from paired_runs import success_cells
from runtime_closed_loop import mode_settings

from turbopi.report.pareto import Point, pareto_front

PAGE = ROOT / "docs" / "runtime.md"
NOT_RUN = "*not run yet*"
Rows = dict[str, dict[str, Any]]


EAGER = "runtime_eager"
"""Beginning of the name of the receipt of what eager played: modes, and guidance with the true Jacobian."""
WAYS = {"": "swapped", "_rtc": "guided", "_short": "guided, executed part only", "_vjp": "guided, true Jacobian"}


@dataclass(frozen=True)
class Options:
    """What to do."""

    write: bool = False
    """Put the tables into the page and draw the plots, instead of printing."""
    results: Path = RESULTS
    """Directory of the receipts."""
    page: Path = PAGE
    """The page."""
    images: Path = IMAGES
    """Directory of the plots."""


def main() -> None:
    """Print or write what there are receipts for."""
    options = tyro.cli(Options, description=__doc__)
    fill(options.page, {name: partial(make, options) for name, make in TABLES.items()}, options.write)
    if options.write:
        rows = settings(options)
        pareto = partial(draw_pareto, full_size_ticks(options, rows))
        for name, draw in {"thresholds": draw_thresholds, "delays": draw_delays, "pareto": pareto}.items():
            if any(draws(row, name) for row in rows.values()):
                draw(rows, options.images / f"runtime_{name}.svg")


def receipt(options: Options, name: str) -> dict[str, Any] | None:
    """The results of the one receipt whose name begins so; None if there is none."""
    found = sorted(options.results.glob(f"{name}*.json"))
    return json.loads(found[0].read_text())["results"] if found else None


def settings(options: Options, name: str = "runtime_closed_loop") -> Rows:
    """The rows of a closed loop's receipt by name; empty without one."""
    results = receipt(options, name)
    return {} if results is None else {row["name"]: row for row in results["settings"]}


def draws(row: dict[str, Any], name: str) -> bool:
    """Whether a row belongs to a plot."""
    return name == "pareto" or row["group"] == name


def cells(row: dict[str, Any] | None) -> tuple[str, str, str]:
    """Success, interval and p of a row, or that it has not been run."""
    return (NOT_RUN, "", "") if row is None else success_cells(row)


def decision_table(options: Options) -> str | None:
    """Host time of a decision."""
    results = receipt(options, "runtime_decision")
    if results is None:
        return None
    header = ("case", "decision p50, µs", "p99, µs", "with the frames' comparison p50, µs", "p99, µs")
    rows = []
    for name, found in results.items():
        parts = [found[part][key] for part in ("decide", "with_frames") for key in ("median_ms", "p99_ms")]
        rows.append((name, *(f"{1e3 * value:.1f}" for value in parts)))
    return markdown_table(header, rows)


def latency_table(options: Options) -> str | None:
    """Ticks on a GPU."""
    results = receipt(options, "runtime_latency")
    if results is None:
        return None
    header = ("steps", "full tick p50 / p99, ms", "fast tick p50 / p99, ms", "denoise stage, ms", "fast beyond it, ms")
    header += (
        "guided p50, ms",
        "overlap, ms an observation: one kernel",
        "fused",
        "kernel by kernel",
        "least, ms",
        "of 1/least",
    )
    rows = []
    for steps, found in results["steps"].items():
        pair = [f"{found[k]['median_ms']:.2f} / {found[k]['p99_ms']:.2f}" for k in ("full", "fast")]
        overlaps = [found[f"overlap_{loop}"]["ms_per_observation"] for loop in ("persistent", "fused", "rows")]
        numbers = (found["stages"]["denoise"]["median_ms"], found["fast_beyond_denoise_ms"])
        least = found["least_overlap_ms"]
        more = (found["guided"]["median_ms"], *overlaps, least)
        rows.append((steps, *pair, *(f"{v:.2f}" for v in (*numbers, *more)), f"{least / min(overlaps):.2f}"))
    return markdown_table(header, rows)


def effective_table(options: Options) -> str | None:
    """Average tick and rate, steps x recompute at every n-th, from measured full and fast ticks."""
    results = receipt(options, "runtime_latency")
    if results is None:
        return None
    rows = []
    for steps, found in results["steps"].items():
        full, fast = found["full"]["median_ms"], found["fast"]["median_ms"]
        means = [(full + (every - 1) * fast) / every for every in range(1, 6)]
        rows.append((steps, *(f"{mean:.2f} ms, {1e3 / mean:.0f} Hz" for mean in means)))
    return markdown_table(("steps", *(f"every {n}" for n in range(1, 6))), rows)


def reuse_table(options: Options) -> str | None:
    """Success: steps x recompute at every n-th inference."""
    rows = settings(options)
    if not rows:
        return None
    rows |= {"steps10_every1": rows["reference"]} if "reference" in rows else {}
    lines = []
    for steps in (1, 2, 3, 5, 10):
        found = [cells(rows.get(f"steps{steps}_every{every}")) for every in range(1, 6)]
        lines.append((str(steps), *(s if not i else f"{s} ({i}; p {p})" for s, i, p in found)))
    return markdown_table(("steps", *(f"every {n}" for n in range(1, 6))), lines)


def full_size_ticks(options: Options, rows: Rows) -> dict[str, tuple[float, float]]:
    """Mean and p99 of each row's tick, ms, had the full size played it: its measured ticks at the row's rate of reuse.

    Where a gate compares image tokens, a tick that reuses the prefix has run stage 1. Rows whose steps were not timed
    are left out.
    """
    latency = receipt(options, "runtime_latency")
    ticks: dict[str, tuple[float, float]] = {}
    for name, row in rows.items():
        runtime = row["runtime"]
        found = None if latency is None else latency["steps"].get(str(runtime["steps"]))
        if found is None:
            continue
        reused = row["reuse_rate"] or 0.0
        looked = found["stages"]["encode_images"]["median_ms"] if (runtime.get("reuse") or {}).get("gate") else 0.0
        mean = (1 - reused) * found["full"]["median_ms"] + reused * (found["fast"]["median_ms"] + looked)
        ticks[name] = mean, found["full"]["p99_ms"]
    return ticks


def threshold_table(options: Options) -> str | None:
    """Success, reuse and latency by threshold."""
    rows = settings(options)
    if not rows:
        return None
    lines, ticks = [], full_size_ticks(options, rows)
    for threshold in (1.0, 0.999, 0.995, 0.99, 0.985, 0.98, 0.97, 0.95):
        row, tick = rows.get(f"tokens{threshold:g}"), ticks.get(f"tokens{threshold:g}")
        rate = "" if row is None else f"{100 * row['reuse_rate']:.0f} %"
        lines.append((f"{threshold:g}", *cells(row), rate, "" if tick is None else f"{tick[0]:.2f}"))
    return markdown_table(("threshold", "success", "interval", "p", "reuse rate", "mean tick at full size, ms"), lines)


def mode_table(options: Options) -> str | None:
    """Success by mode, and synchronised against mixed: eager's."""
    rows = settings(options, EAGER)
    if not rows:
        return None
    lines = []
    for setting in mode_settings():
        row = rows.get(setting.name)
        lines.append((setting.name, *cells(row), "" if row is None else f"{100 * row['reuse_rate']:.0f} %"))
    return markdown_table(("setting", "success", "interval", "p", "reuse rate"), lines)


def delay_table(options: Options) -> str | None:
    """Success and jerk by delay; what was not run has its row, too."""
    rows = settings(options)
    return delay_lines(rows, ("", "_rtc")) if rows else None


def eager_delay_table(options: Options) -> str | None:
    """The same of the delays that eager played."""
    rows = settings(options, EAGER)
    return delay_lines(rows, ()) if rows else None


def delay_lines(rows: Rows, always: tuple[str, ...]) -> str:
    """A line for each delay and way that was played, and for those of `always`."""
    lines = []
    for delay in range(9):
        for suffix, how in WAYS.items():
            row = rows.get(f"delay{delay}{suffix}")
            if row is None and suffix not in always:
                continue
            held = "" if row is None else f"{100 * row['held_ticks'] / max(row['control_ticks'], 1):.1f} %"
            jerk = "" if row is None or row["jerk"] is None else f"{row['jerk']:.3f}"
            lines.append((str(delay), how, *cells(row), jerk, held))
    return markdown_table(("delay, ticks", "next chunk", "success", "interval", "p", "jerk", "ticks held"), lines)


def pareto_points(ticks: Mapping[str, tuple[float, float]], rows: Rows) -> list[Point]:
    """Every row that plays chunks as a client does, by its mean tick at full size."""
    return [
        Point(name, mean, rows[name]["rate"], tuple(rows[name]["interval"]))
        for name, (mean, _) in ticks.items()
        if rows[name]["group"] != "delays"
    ]


def pareto_table(options: Options) -> str | None:
    """The settings that nothing beats in both success and mean time."""
    rows = settings(options)
    if not rows:
        return None
    lines, ticks = [], full_size_ticks(options, rows)
    for point in pareto_front(pareto_points(ticks, rows)):
        _, p99 = ticks[point.name]
        numbers = (f"{point.ms:.2f}", f"{p99:.2f}", f"{1e3 / point.ms:.0f}")
        lines.append((point.name, *success_cells(rows[point.name]), *numbers))
    header = ("setting", "success", "interval", "p", "mean tick at full size, ms", "p99, ms", "Hz")
    return markdown_table(header, lines)


def soak_table(options: Options) -> str | None:
    """What grew, an engine a row."""
    lines = []
    for path in sorted(options.results.glob("runtime_soak_*.json")):
        content = json.loads(path.read_text())
        found, grown = content["results"], content["results"]["grown_since_a_tenth"]
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found["kinds"].items()))
        memory = ", ".join(f"{name.removesuffix('_mib')} {v:+.1f} MiB" for name, v in grown.items() if name != "graphs")
        engine = f"{content['config']['engine']}, {content['config']['preset']}"
        lines.append((engine, f"{found['ticks']}", kinds, str(found["resets"]), memory, str(grown.get("graphs", ""))))
    if not lines:
        return None
    return markdown_table(("engine", "ticks", "kinds", "resets", "memory grown", "graphs recorded anew"), lines)


TABLES: dict[str, Callable[[Options], str | None]] = {
    "decision": decision_table,
    "latency": latency_table,
    "effective rate": effective_table,
    "reuse": reuse_table,
    "thresholds": threshold_table,
    "modes": mode_table,
    "delays": delay_table,
    "delays of eager": eager_delay_table,
    "pareto": pareto_table,
    "soak": soak_table,
}


def draw_thresholds(rows: Rows, picture: Path) -> None:
    """Success and reuse rate against 1 - threshold."""
    found = sorted((r for r in rows.values() if r["group"] == "thresholds"), key=lambda r: r["name"])
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    x = [float(row["name"].removeprefix("tokens").partition("_")[0]) for row in found]
    order = sorted(range(len(x)), key=lambda i: x[i])
    points(axes, [x[i] for i in order], [found[i] for i in order], "tab:blue", "success", line=True)
    axes.plot(
        [x[i] for i in order],
        [100 * found[i]["reuse_rate"] for i in order],
        "s--",
        color="tab:gray",
        label="reuse rate",
    )
    axes.set(xlabel="threshold", ylabel="%", ylim=(-4, 104))
    finished(figure, axes, picture)


def draw_delays(rows: Rows, picture: Path) -> None:
    """Success and jerk against the delay, with and without real-time chunking."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for suffix, colour, label in (("", "tab:gray", "swapped"), ("_rtc", "tab:blue", "guided")):
        found = [(d, rows[f"delay{d}{suffix}"]) for d in range(9) if f"delay{d}{suffix}" in rows]
        if not found:
            continue
        points(left, [float(d) for d, _ in found], [row for _, row in found], colour, label, line=True)
        rough = [(d, row["jerk"]) for d, row in found if row["jerk"] is not None]
        right.plot([d for d, _ in rough], [j for _, j in rough], "o-", color=colour, label=label)
    left.set(xlabel="delay, control ticks", ylabel="success, %", ylim=(-4, 104))
    right.set(xlabel="delay, control ticks", ylabel="jerk")
    finished(figure, left, picture)
    finished(figure, right, picture)


def draw_pareto(ticks: Mapping[str, tuple[float, float]], rows: Rows, picture: Path) -> None:
    """Success against the mean tick at full size, a colour for each kind of reuse; the front joined."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    everything = pareto_points(ticks, rows)
    kinds = {point.name: reuse_kind(rows[point.name]["runtime"].get("reuse", {})) for point in everything}
    for number, kind in enumerate(sorted(set(kinds.values()))):
        found = [point for point in everything if kinds[point.name] == kind]
        points(axes, [p.ms for p in found], [rows[p.name] for p in found], f"C{number}", kind)
    for point in everything:
        if "gate" not in rows[point.name]["runtime"].get("reuse", {}):
            steps = str(rows[point.name]["runtime"]["steps"])
            axes.annotate(steps, (point.ms, 100 * point.rate), (4, 5), textcoords="offset points", fontsize=8)
    front = pareto_front(everything)
    axes.plot([p.ms for p in front], [100 * p.rate for p in front], "-", color="black", alpha=0.4, label="front")
    axes.set(xlabel="mean tick at full size on an H200, ms (a number is of steps)", ylabel="success, %", ylim=(-4, 104))
    finished(figure, axes, picture)


def reuse_kind(reuse: Mapping[str, Any]) -> str:
    """Which points share a colour."""
    if "gate" in reuse:
        return "prefix behind a gate, 10 steps"
    return f"prefix at one inference in {reuse['every']}" if "every" in reuse else "prefix at every inference"


if __name__ == "__main__":
    main()
