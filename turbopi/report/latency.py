"""The page of one `turbo-pi bench` receipt."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from .charts import histogram
from .curves import StackRow, line_chart, stack_chart
from .page import flat_rows, heading, page, table, tiles

MIB = 1 << 20


def write_bench_report(receipt: Path) -> Path:
    """Write the receipt's page beside it, under its name with `.html`. Returns the page's path.

    Raises:
        FileNotFoundError: no such receipt.
        ValueError: it is not one of `turbo-pi bench`.
    """
    if not receipt.is_file():
        raise FileNotFoundError(f"no receipt at {receipt}; write one with `turbo-pi bench --out {receipt}`")
    content = json.loads(receipt.read_text())
    known = {"bench latency": _latency, "bench memory": _memory, "bench kernels": _kernels}
    parts = known.get(content.get("what"))
    if parts is None:
        raise ValueError(f"{receipt} is a receipt of {content.get('what')!r}, expected one of `turbo-pi bench`")
    path = receipt.with_suffix(".html")
    path.write_text(page(f"Bench: {receipt.stem}", [*_top(content), *parts(content["results"]), *_bottom(content)]))
    return path


def _top(content: dict[str, Any]) -> Iterator[str]:
    config, machine = content["config"], content["machine"]
    where = machine["gpus"][0] if config["device"] != "cpu" and machine.get("gpus") else machine["cpu"]
    shape = config["workload"]
    yield f"<h1>{escape(content['what'].capitalize())}: {escape(shape['name'])}</h1>"
    facts = (where, config["precision"], f"{shape['views']} views", f"{shape['prompt_tokens']} prompt tokens")
    more = (f"{shape['horizon']} actions", f"{shape['steps']} steps", "hash weights", content["when"])
    yield f'<p class="soft">{escape(" · ".join((*facts, *more)))}</p>'


def _bottom(content: dict[str, Any]) -> Iterator[str]:
    yield heading("Receipt", "what was run, and on what")
    known = {key: content[key] for key in ("command", "commit", "uncommitted_changes", "machine", "config")}
    yield table(("field", "value"), flat_rows(known))


def _latency(results: dict[str, Any]) -> Iterator[str]:
    ceilings = results["ceilings"]
    copy, product = ceilings["bytes_per_s"] / 1e12, ceilings["flops_per_s"] / 1e12
    for run in results["runs"]:
        subjects = run["subjects"]
        yield heading(f"Batch {run['batch']}, {run['prefix_tokens']} prefix tokens")
        yield tiles(
            [(f"{s['call']['median_ms']:.2f} ms", f"{name}, whole call, median") for name, s in subjects.items()]
        )
        yield heading("Whole call", "by the host's clock, observation and actions on the host")
        yield table(
            ("", "p50", "p90", "p99", "p99.9", "max", "p99/p50", "missed", "samples/s", "warm-up", "first call"),
            [(name, *_call_cells(subject)) for name, subject in subjects.items()],
        )
        within = {name: s["device_in_call"] for name, s in subjects.items() if "device_in_call" in s}
        if within:
            yield heading("Device time within these calls", "from before the first copy to behind the last one")
            yield table(
                ("", "calls", "p50", "p90", "p99", "p99.9", "max", "p99/p50"),
                [(name, str(d["count"]), *_times(d), f"{d['p99_over_p50']:.3f}") for name, d in within.items()],
            )
        yield heading(
            "The call's parts", "medians, as far as each engine lets them be told apart; device parts overlap"
        )
        yield table(
            ("", "part", "ms"),
            [(name, part, f"{ms:.3f}") for name, s in subjects.items() for part, ms in s["split_ms"].items()],
        )
        taken_apart = {name: subject for name, subject in subjects.items() if "stages" in subject}
        if taken_apart:
            yield heading(
                "Where the time goes",
                "device time of each stage, and what the call takes beyond it; the red line is the least possible: "
                f"{product:.4g} TFLOP/s ({ceilings['product']}) and {copy:.3g} TB/s (copy), measured in this run",
            )
            least = run["least_ms"]["tick"]
            yield stack_chart([StackRow(name, _parts(s), least) for name, s in taken_apart.items()], "ms")
            yield heading("Against the floor")
            header = ("stage", "engine", "ms", "least ms", "times", "TFLOP/s", "of ceiling", "TB/s", "of ceiling")
            yield table(header, _roofline_rows(taken_apart))
        for name, subject in subjects.items():
            call = subject["call"]
            marks = {"p50": call["median_ms"], "p99": call["p99_ms"], "p99.9": call["p99_9_ms"]}
            kept = len(call["samples_ms"])
            yield heading(f"{name}: whole calls", f"{kept} of {call['count']} samples")
            yield histogram(call["samples_ms"], "ms", marks)
        drift = run["drift"]
        yield (
            f'<p class="soft">{escape(drift["subject"])}, first {drift["count"]} calls and as many at the end: '
            f"{drift['first_ms']:.3f} and {drift['last_ms']:.3f} ms, medians</p>"
        )


def _call_cells(subject: dict[str, Any]) -> tuple[str, ...]:
    call = subject["call"]
    missed = f"{100 * call['deadline_miss_rate']:.2f} % of {call['deadline_hz']:g} Hz"
    rest = (f"{call['p99_over_p50']:.3f}", missed, f"{call['samples_per_s']:.1f}")
    return (*_times(call), *rest, *(f"{subject[key]:.1f} s" for key in ("warm_up_s", "first_call_s")))


def _times(found: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{found[key]:.3f}" for key in ("median_ms", "p90_ms", "p99_ms", "p99_9_ms", "max_ms"))


def _parts(subject: dict[str, Any]) -> list[tuple[str, float]]:
    parts = [(name, stage["median_ms"]) for name, stage in subject["stages"].items()]
    beyond = subject["call"]["median_ms"] - sum(value for _, value in parts)
    return [*parts, ("beyond the stages", beyond)] if beyond > 0 else parts


def _roofline_rows(subjects: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    stages = list(dict.fromkeys(stage for subject in subjects.values() for stage in subject["roofline"]))
    for stage in stages:
        for name, subject in subjects.items():
            row = subject["roofline"][stage]
            yield (
                stage,
                name,
                *(f"{row[key]:.3g}" for key in ("measured_ms", "least_ms", "times_the_floor", "tflop_per_s")),
                f"{100 * row['of_flops_ceiling']:.0f} %",
                f"{row['tb_per_s']:.3g}",
                f"{100 * row['of_bytes_ceiling']:.0f} %",
            )


def _memory(results: dict[str, Any]) -> Iterator[str]:
    yield heading(
        "Bandwidth against working set", "bytes read again and again; across, MiB on a scale of powers of two"
    )
    bandwidth = [(math.log2(point["bytes"] / MIB), point["bytes_per_s"] / 1e12) for point in results["bandwidth"]]
    on_chip = results["on_chip_bytes"]
    marks = {f"L2 {on_chip / MIB:.0f} MiB": math.log2(on_chip / MIB)} if on_chip else {}
    yield line_chart({"reading": bandwidth}, "log2 MiB", "TB/s", marks)
    yield table(
        ("MiB", "TB/s"), [(f"{p['bytes'] / MIB:g}", f"{p['bytes_per_s'] / 1e12:.3f}") for p in results["bandwidth"]]
    )
    ticks = results["ticks"]
    yield heading("A tick against the prefix's length", "device time, median")
    lines = {name: [(p["prefix_tokens"], p["tick"]["median_ms"]) for p in points] for name, points in ticks.items()}
    yield line_chart(lines, "prefix tokens", "ms", {})
    for name, points in ticks.items():
        yield heading(name)
        stages = list(points[0]["stages_ms"])
        rows = [
            (
                str(p["prompt_tokens"]),
                str(p["prefix_tokens"]),
                *(f"{ms:.3f}" for ms in (p["tick"]["median_ms"], p["tick"]["p99_ms"])),
                *(f"{p['stages_ms'][stage]:.3f}" for stage in stages),
            )
            for p in points
        ]
        yield table(("prompt", "prefix", "tick", "p99", *stages), rows)


def _kernels(results: dict[str, Any]) -> Iterator[str]:
    for name, engine in results["engines"].items():
        stages, timed = engine["stages"], engine["unprofiled_ms"]
        whole = sum(stage["span_ms"] for stage in stages.values())
        yield heading(f"{name}: where a tick goes", f"{engine['profiled']}, {engine['ticks']} ticks under the profiler")
        tick = f"{timed.get('tick', sum(timed.values())):.2f} ms"
        launches = f"{engine['tick']['launches']:g}"
        yield tiles([(tick, "tick, not profiled"), (f"{whole:.2f} ms", "profiled"), (launches, "launches")])
        yield stack_chart([StackRow(stage, _kernel_parts(found)) for stage, found in stages.items()], "ms")
        for stage, found in stages.items():
            note = f"{found['span_ms']:.3f} ms, {found['launches']:g} launches, gaps {found['gaps_ms']:.3f} ms together"
            yield heading(f"{name}, {stage}", note)
            header = ("kernel", "launches", "adds ms", "share", "runs ms", "median us", "grids")
            yield table(header, [_kernel_cells(row) for row in found["kernels"]])


def _kernel_parts(stage: dict[str, Any]) -> list[tuple[str, float]]:
    return [("kernels", sum(row["own_ms"] for row in stage["kernels"])), ("gaps", stage["gaps_ms"])]


def _kernel_cells(row: dict[str, Any]) -> tuple[str, ...]:
    share, grids = f"{100 * row['share']:.1f} %", ", ".join(row["grids"])
    times = (f"{row['own_ms']:.3f}", share, f"{row['total_ms']:.3f}", f"{row['median_us']:.1f}")
    return (row["label"], f"{row['count']:g}", *times, grids if len(grids) < 80 else f"{len(row['grids'])} grids")
