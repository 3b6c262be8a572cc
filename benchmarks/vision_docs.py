"""The measured part of "Stage 1: norms behind products" in docs/vision-prefix.md, made from its receipt alone.

    python benchmarks/vision_docs.py --write

The receipt is that of `benchmarks/vision_stage.py`.
"""

from __future__ import annotations

from typing import Any

import tyro
from doc_tables import ROOT, Options, fill, markdown_table, receipt

PAGE = ROOT / "docs" / "vision-prefix.md"
RECEIPT = "vision_stage_nvidia-h200"
BEFORE, AFTER = "kernel by kernel", "norms behind products"
HEADER = ("rows", "kernel by kernel, us", "norms behind products, us", "gain", "errors", "tiles: qkv, `out`, fc1, fc2")


def tile(cut: dict[str, Any]) -> str:
    """Rows by columns, and in how many parts."""
    parts = f" in {cut['splits']} parts" if cut["splits"] > 1 else ""
    return f"{64 * cut['groups']} x {cut['columns']}{parts}"


def table() -> str | None:
    """A line a number of rows; None without the receipt."""
    found = receipt(RECEIPT)
    if found is None:
        return None
    lines = []
    for run in found["results"]["runs"]:
        if run["tilings"] is None:
            continue
        before, after = run["us"][BEFORE], run["us"][AFTER]
        tiles = ", ".join(tile(run["tilings"][name]) for name in ("qkv", "out", "fc1", "fc2"))
        grey = "; grey levels" if run["tilings"]["grey"] else ""
        errors = " / ".join(f"{run['errors'][name]:.1e}" for name in (BEFORE, AFTER))
        gain = f"{before / after:.2f} x"
        lines.append((str(run["rows"]), f"{before:.0f}", f"**{after:.0f}**", gain, errors, tiles + grey))
    where = (
        f"Random weights, one CUDA graph a way, in turns ([`{RECEIPT}.json`](../benchmarks/results/{RECEIPT}.json))."
    )
    return f"{where}\n\n{markdown_table(HEADER, lines)}"


def main() -> None:
    """Print or write."""
    fill(PAGE, {"vision": table}, tyro.cli(Options, description=__doc__).write)


if __name__ == "__main__":
    main()
