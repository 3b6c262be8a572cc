"""The measured parts of stage 1 in docs/vision-prefix.md, bf16 and E4M3, made from their receipts alone.

    python benchmarks/vision_docs.py --write

The receipts are those of `benchmarks/vision_stage.py`, and with `--precision fp8`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import tyro
from doc_tables import ROOT, Options, fill, markdown_table, receipt

PAGE = ROOT / "docs" / "vision-prefix.md"
RECEIPT, FP8_RECEIPT = "vision_stage_nvidia-h200", "vision_stage_fp8_nvidia-h200"
BEFORE, AFTER, FP8_AFTER = "kernel by kernel", "norms behind products", "tiled products in E4M3"


def tile(cut: dict[str, Any]) -> str:
    """Rows by columns, and in how many parts."""
    parts = f" in {cut['splits']} parts" if cut["splits"] > 1 else ""
    return f"{64 * cut['groups']} x {cut['columns']}{parts}"


def table(name: str, own: str) -> str | None:
    """A line a number of rows; None without the receipt. `own`: what the kernels of this page are called in it."""
    found = receipt(name)
    if found is None:
        return None
    lines = []
    for run in found["results"]["runs"]:
        if run["tilings"] is None:
            continue
        before, after = run["us"][BEFORE], run["us"][own]
        tiles = ", ".join(tile(run["tilings"][product]) for product in ("qkv", "out", "fc1", "fc2"))
        grey = "; grey levels" if run["tilings"]["grey"] else ""
        errors = " / ".join(f"{run['errors'][way]:.1e}" for way in (BEFORE, own))
        gain = f"{before / after:.2f} x"
        lines.append((str(run["rows"]), f"{before:.0f}", f"**{after:.0f}**", gain, errors, tiles + grey))
    where = f"Random weights, one CUDA graph a way, in turns ([`{name}.json`](../benchmarks/results/{name}.json))."
    header = ("rows", f"{BEFORE}, us", f"{own}, us", "gain", "errors", "tiles: qkv, `out`, fc1, fc2")
    return f"{where}\n\n{markdown_table(header, lines)}"


def main() -> None:
    """Print or write."""
    tables = {"vision": partial(table, RECEIPT, AFTER), "vision in fp8": partial(table, FP8_RECEIPT, FP8_AFTER)}
    fill(PAGE, tables, tyro.cli(Options, description=__doc__).write)


if __name__ == "__main__":
    main()
