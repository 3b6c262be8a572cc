"""Tables of docs/audit.md, made from the receipts and from nothing else.

    python benchmarks/audit_docs.py           # prints the tables
    python benchmarks/audit_docs.py --write   # puts them into docs/audit.md

A table stands between the lines `<!-- NAME -->` and `<!-- end of NAME -->`. A run without a receipt is a row that says
"not run yet".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tyro
from doc_tables import ROOT, Options, fill, markdown_table, receipt

PAGE = ROOT / "docs" / "audit.md"
NOT_RUN = "not run yet"
PLANTED = "audit_planted"
RUNS: dict[str, str] = {
    "audit_libero_small_eager_bf16_cpu": "`pi05-libero-small`, eager:bf16, CPU",
    "audit_libero_small_turbo_twins_bf16_cpu": "`pi05-libero-small`, turbo-twins:bf16, CPU",
    "audit_pi05_turbo_bf16": "π0.5 full size, turbo:bf16, GPU",
    "audit_pi05_turbo_fp8": "π0.5 full size, turbo:fp8, GPU",
}


def main() -> None:
    """Print or write."""
    options = tyro.cli(Options, description=__doc__)
    fill(PAGE, TABLES, options.write)


def planted_table() -> str:
    """A row a bug, a column a candidate: the place that was named, its error in times the budget, what heals."""
    found = receipt(PLANTED)
    if found is None:
        return NOT_RUN
    rows = found["results"]["rows"]
    candidates = list(dict.fromkeys(row["candidate"] for row in rows))
    cells = {(row["bug"], row["candidate"]): row for row in rows}
    bugs = list(dict.fromkeys(row["bug"] for row in rows))
    return markdown_table(
        ("bug", *candidates),
        [(bug, *(planted_cell(cells[bug, candidate]) for candidate in candidates)) for bug in bugs],
    )


def planted_cell(row: dict[str, Any]) -> str:
    """What the audit said, and whether that is right."""
    mark = "" if row["right"] else "**wrong:** "
    if row["found"] is None:
        return f"{mark}nothing found; largest {row['largest_ratio']:.2f} × budget"
    ratio = f"{row['ratio']:.1f}" if row["ratio"] < 100 else "> 100"
    healer = "nothing to heal" if row["healer"] is None else f"heals: {row['healer']}"
    return f"{mark}`{row['found']}`, {ratio} × budget; {healer}"


def runs_table() -> str:
    """How long audits take, and what they found."""
    rows = []
    for name, words in RUNS.items():
        found = receipt(name)
        if found is None:
            rows.append((words, *(NOT_RUN,) * 7))
            continue
        results = found["results"]
        over = results["first_divergence"]
        ratios = [ratio for ratio in results["tensors"]["ratio"] if ratio is not None]
        rows.append(
            (
                f"[{words}](../benchmarks/results/{name}.json)",
                f"{results['seconds']['all']:.1f} s",
                "" if "processor" not in results["seconds"] else f"{results['seconds']['processor']:.1f} s",
                str(len(results["tensors"]["name"])),
                f"{max(ratios):.2f}",
                "none" if over is None else f"`{over['tensor']}`",
                f"{results['actions']['candidate']:.2e}",
                f"{results['actions']['plain']:.2e}",
            )
        )
    header = (
        "audit",
        "takes",
        "processor",
        "tensors",
        "largest × budget",
        "first divergence",
        "actions' error",
        "plain's",
    )
    return markdown_table(header, rows)


TABLES: dict[str, Callable[[], str]] = {"planted bugs": planted_table, "runs": runs_table}


if __name__ == "__main__":
    main()
