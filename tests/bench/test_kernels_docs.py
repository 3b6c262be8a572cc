"""benchmarks/kernels_docs.py: the page says what the receipts say."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kernels_docs


@pytest.mark.parametrize("mark", kernels_docs.PROFILES)
def test_the_page_holds_the_receipts_table(mark: str) -> None:
    table = kernels_docs.table(*kernels_docs.PROFILES[mark])
    assert table is None or table in kernels_docs.PAGE.read_text()


def test_without_a_receipt_there_is_no_table() -> None:
    assert kernels_docs.table("none", "turbo:bf16") is None


def test_small_kernels_share_a_line() -> None:
    def row(label: str, own: float) -> dict[str, object]:
        return {"label": label, "count": 18, "own_ms": own, "share": own / 2, "median_us": 7.25}

    kernels = [row("gemm", 1.5), row("attention", 0.375), row("norm", 0.05), row("copy", 0.015)]
    lines = kernels_docs.stage_lines("prefill", {"span_ms": 2.0, "gaps_ms": 0.06, "kernels": kernels})
    assert lines == [
        ("**prefill**, 2.00 ms", "`gemm`", "18", "1.500", "75 %", "7.2"),
        ("", "`attention`", "18", "0.375", "19 %", "7.2"),
        ("", "2 others", "36", "0.065", "3 %", ""),
        ("", "between kernels", "", "0.060", "3 %", ""),
    ]
