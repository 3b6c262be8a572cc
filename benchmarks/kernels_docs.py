"""The tables of docs/kernels.md, made from the receipts and nothing else.

    python benchmarks/kernels_docs.py --write

The receipts are those of `turbo-pi bench --what kernels`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import tyro
from doc_tables import ROOT, Options, fill, markdown_table, receipt

PAGE = ROOT / "docs" / "kernels.md"
PROFILES = {
    "kernels libero": ("bench_kernels_libero_h200", "turbo:bf16"),
    "kernels full": ("bench_kernels_full_h200", "turbo:bf16"),
    "kernels libero fp8": ("bench_kernels_libero_fp8_h200", "turbo:fp8"),
    "kernels full fp8": ("bench_kernels_full_fp8_h200", "turbo:fp8"),
    "kernels full batch": ("bench_kernels_full_batch_h200", "turbo:bf16"),
    "kernels full batch fp8": ("bench_kernels_full_batch_h200", "turbo:fp8"),
}
"""By the marks in the page: a receipt and an engine in it."""
SHOWN = 0.93
"""Of what a stage's kernels add; those behind it share a line."""
HEADER = ("stage", "kernel", "launches", "adds, ms", "of the stage", "median of a launch, us")


def stage_lines(stage: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line a kernel until most of the stage is told, then one for the others and one for the gaps."""
    lines, told = [], 0.0
    whole = f"**{stage}**, {found['span_ms']:.2f} ms"
    rows = list(found["kernels"])
    most = SHOWN * sum(row["share"] for row in rows)
    while rows and told < most:
        row = rows.pop(0)
        told += row["share"]
        numbers = (f"{row['own_ms']:.3f}", f"{100 * row['share']:.0f} %", f"{row['median_us']:.1f}")
        lines.append(("" if lines else whole, f"`{row['label']}`", f"{row['count']:g}", *numbers))
    if rows:
        own, count = sum(row["own_ms"] for row in rows), sum(row["count"] for row in rows)
        share = f"{100 * sum(row['share'] for row in rows):.0f} %"
        lines.append(("", f"{len(rows)} other{'s' * (len(rows) > 1)}", f"{count:g}", f"{own:.3f}", share, ""))
    share = 1 - sum(row["share"] for row in found["kernels"])
    return [*lines, ("", "between kernels", "", f"{found['gaps_ms']:.3f}", f"{100 * share:.0f} %", "")]


def table(name: str, engine: str) -> str | None:
    """Every stage of an engine's profile; None without the receipt."""
    content = receipt(name)
    if content is None or engine not in content["results"]["engines"]:
        return None
    found = content["results"]["engines"][engine]
    lines = [line for stage, rows in found["stages"].items() for line in stage_lines(stage, rows)]
    times = ", ".join(f"{stage} {ms:.2f}" for stage, ms in found["unprofiled_ms"].items())
    note = f"`{engine}`, {found['ticks']} ticks under the profiler; without it, ms: {times}."
    return f"{markdown_table(HEADER, lines)}\n\n{note} [`{name}.json`](../benchmarks/results/{name}.json)"


def main() -> None:
    """Print or write."""
    tables = {mark: partial(table, *of) for mark, of in PROFILES.items()}
    fill(PAGE, tables, tyro.cli(Options, description=__doc__).write)


if __name__ == "__main__":
    main()
