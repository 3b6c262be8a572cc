import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import export_docs  # noqa: E402


@pytest.mark.parametrize("name", list(export_docs.TABLES))
def test_the_page_shows_what_the_receipts_say(name: str) -> None:
    """Otherwise: `python benchmarks/export_docs.py --write`."""
    text = export_docs.TABLES[name]()
    assert f"<!-- {name} -->\n{text}\n<!-- end of {name} -->" in export_docs.PAGE.read_text()


def test_without_receipts_nothing_is_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_docs, "RESULTS", tmp_path)
    monkeypatch.setattr(export_docs, "EAGER", tmp_path)
    for make in export_docs.TABLES.values():
        assert "not run yet" in make()
