"""The measured tables of gate and up in docs/vision-prefix.md and docs/prefix-fp8.md, made from receipts alone.

    python benchmarks/prefix_docs.py --write

The receipts are those of `benchmarks/prefix_mlp.py`, in bf16 and in fp8.
"""

from __future__ import annotations

from functools import partial

import tyro
from doc_tables import ROOT, Options, fill, markdown_table, receipt

PAGE, PAGE_FP8 = ROOT / "docs" / "vision-prefix.md", ROOT / "docs" / "prefix-fp8.md"
RECEIPT, RECEIPT_FP8 = "prefix_mlp_nvidia-h200", "prefix_mlp_fp8_nvidia-h200"
US_A_TOKEN, US_A_TOKEN_FP8 = 100.7 / 552, 60 / 576
"""What the first run took for three rounds of tiles of 184 tokens, when the GPU was cool; in E4M3 the guess for 192."""
MULTIPROCESSORS, WEIGHT_TILES = 132, 128
HEADER = (
    "rows", "tile", "predicted, us", "cuBLAS and GeGLU: burst / steady", "tiled: burst / steady", "gain", "TFLOP/s",
)  # fmt: skip


def predicted(rows: int, tokens: int, us_a_token: float = US_A_TOKEN) -> float:
    """Microseconds: rounds of tiles, each as long as its tokens."""
    tiles = WEIGHT_TILES * -(-rows // tokens)
    return -(-tiles // MULTIPROCESSORS) * tokens * us_a_token


def table(fp8: bool = False) -> str | None:
    """A line a number of rows; None without the receipt."""
    found = receipt(RECEIPT_FP8 if fp8 else RECEIPT)
    if found is None:
        return None
    lines = []
    for run in found["results"]["runs"]:
        rows, tokens = run["rows"], run["tiling"]["tokens"]
        before, after = run["us"]["cuBLAS, GeGLU"], run["us"]["tiled"]
        us = [f"{way['burst']:.1f} / {way['steady']:.1f}" for way in (before, after)]
        gain = " / ".join(f"{before[kind] / after[kind]:.2f} x" for kind in ("burst", "steady"))
        speed = " / ".join(f"{4e-6 * rows * 2048 * 16384 / after[kind]:.0f}" for kind in ("burst", "steady"))
        guess = predicted(rows, tokens, US_A_TOKEN_FP8 if fp8 else US_A_TOKEN)
        lines.append((str(rows), f"256 x {tokens}", f"{guess:.0f}", *us, gain, speed))
    return markdown_table(HEADER, lines)


def main() -> None:
    """Print or write."""
    write = tyro.cli(Options, description=__doc__).write
    fill(PAGE, {"prefix": table}, write)
    fill(PAGE_FP8, {"prefix in fp8": partial(table, fp8=True)}, write)


if __name__ == "__main__":
    main()
