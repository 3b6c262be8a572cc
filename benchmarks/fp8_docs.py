"""The measured part of "FP8 in the turbo engine" in docs/performance.md, made from receipts and from nothing else.

    python benchmarks/fp8_docs.py           # prints the table
    python benchmarks/fp8_docs.py --write   # puts it between its marks in docs/performance.md

The receipts are `turbo-pi bench`'s of `turbo:fp8` and `turbo:bf16` in one run; docs/performance.md has the commands.
Cells without a receipt say "not measured yet".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from doc_tables import RESULTS, ROOT, fill, markdown_table

PAGE = ROOT / "docs" / "performance.md"
NONE = "not measured yet"
PREDICTED: dict[tuple[str, str], str] = {
    ("libero", "encode_images"): "1.35",
    ("libero", "prefill"): "2.6",
    ("libero", "denoise"): "3.3; as bf16 with the expert in bf16",
    ("libero", "tick"): "7.8; the goal of 6.5 needs a denoise loop of 2.6",
    ("full", "encode_images"): "1.6",
    ("full", "prefill"): "4.1",
    ("full", "denoise"): "7.4",
    ("full", "tick"): "13.1",
}
"""Milliseconds, written before the first run of each; the ticks with the expert of `libero` in bf16."""


@dataclass(frozen=True)
class Options:
    """What to do."""

    write: bool = False
    """Put the table into the page instead of printing it."""
    results: Path = RESULTS
    """Where the receipts bench_<workload>_fp8_h200.json are."""
    page: Path = PAGE
    """The page."""


def stage_ms(subject: dict[str, Any], stage: str) -> float:
    """The median on the device; of the tick that of its one graph."""
    return float(subject["device_ms"] if stage == "tick" else subject["stages"][stage]["median_ms"])


def row(workload: str, stage: str, receipt: Path) -> tuple[str, ...]:
    """One line: what was predicted, and what both precisions took in one run."""
    head = (f"`{workload}` {stage}", PREDICTED[workload, stage])
    if not receipt.is_file():
        return (*head, NONE, NONE, "", "")
    subjects = json.loads(receipt.read_text())["results"]["runs"][0]["subjects"]
    fp8, bf16 = (stage_ms(subjects[name], stage) for name in ("turbo:fp8", "turbo:bf16"))
    return (*head, f"{bf16:.2f}", f"**{fp8:.2f}**", f"{bf16 / fp8:.2f} x", f"[`{receipt.name}`]({link(receipt)})")


def link(receipt: Path) -> str:
    """From the page to a receipt."""
    return f"../benchmarks/results/{receipt.name}"


def table(results: Path) -> str:
    """The whole table."""
    lines = [row(*key, results / f"bench_{key[0]}_fp8_h200.json") for key in PREDICTED]
    header = ("stage, ms", "fp8, predicted", "bf16, measured", "fp8, measured", "bf16 / fp8", "receipt")
    return markdown_table(header, lines)


def main() -> None:
    """Print or write."""
    options = tyro.cli(Options, description=__doc__)
    fill(options.page, {"fp8": partial(table, options.results)}, options.write)


if __name__ == "__main__":
    main()
