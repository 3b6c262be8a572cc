"""benchmarks/prefix_docs.py: the page says what the receipt says."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import prefix_docs


@pytest.mark.parametrize("fp8", [False, True])
def test_the_page_holds_the_receipts_table(fp8: bool) -> None:
    page = prefix_docs.PAGE_FP8 if fp8 else prefix_docs.PAGE
    assert (prefix_docs.table(fp8) or "not run yet") in page.read_text()


def test_without_a_receipt_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_docs, "RECEIPT", "none")
    assert prefix_docs.table() is None


def test_the_prediction_counts_rounds() -> None:
    """552 rows are three rounds of tiles of 184 tokens: what the first run measured."""
    assert prefix_docs.predicted(552, 184) == pytest.approx(100.7)
    assert prefix_docs.predicted(968, 200) == pytest.approx(100.7 * 1000 / 552)
