"""The measured part of "Gate and up of the prefix" in docs/performance.md, made from the receipt and nothing else.

    python benchmarks/prefix_docs.py --write

The receipt is that of `benchmarks/prefix_mlp.py`.
"""

from __future__ import annotations

import tyro
from doc_tables import ROOT, Options, fill, markdown_table, receipt

PAGE = ROOT / "docs" / "performance.md"
RECEIPT = "prefix_mlp_nvidia-h200"
US_A_TOKEN = 100.7 / 552
"""What the first run took for three rounds of tiles of 184 tokens, when the GPU was cool."""
MULTIPROCESSORS, WEIGHT_TILES = 132, 128
HEADER = (
    "rows", "tile", "predicted, us", "cuBLAS and GeGLU: burst / steady", "tiled: burst / steady", "gain", "TFLOP/s",
)  # fmt: skip


def predicted(rows: int, tokens: int) -> float:
    """Microseconds: rounds of tiles, each as long as its tokens."""
    tiles = WEIGHT_TILES * -(-rows // tokens)
    return -(-tiles // MULTIPROCESSORS) * tokens * US_A_TOKEN


def table() -> str | None:
    """A line a number of rows; None without the receipt."""
    found = receipt(RECEIPT)
    if found is None:
        return None
    lines = []
    for run in found["results"]["runs"]:
        rows, tokens = run["rows"], run["tiling"]["tokens"]
        before, after = run["us"]["cuBLAS, GeGLU"], run["us"]["tiled"]
        us = [f"{way['burst']:.1f} / {way['steady']:.1f}" for way in (before, after)]
        gain = " / ".join(f"{before[kind] / after[kind]:.2f} x" for kind in ("burst", "steady"))
        speed = " / ".join(f"{4e-6 * rows * 2048 * 16384 / after[kind]:.0f}" for kind in ("burst", "steady"))
        lines.append((str(rows), f"256 x {tokens}", f"{predicted(rows, tokens):.0f}", *us, gain, speed))
    return markdown_table(HEADER, lines)


def main() -> None:
    """Print or write."""
    fill(PAGE, {"prefix": table}, tyro.cli(Options, description=__doc__).write)


if __name__ == "__main__":
    main()
