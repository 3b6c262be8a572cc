"""benchmarks/fp8_docs.py: what was measured stands in the page, what was not says so."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fp8_docs

BEGIN, END = "<!-- fp8 -->", "<!-- end of fp8 -->"


def receipt(path: Path, factor: float) -> None:
    stages = {stage: {"median_ms": 2.0 * factor} for stage in ("encode_images", "prefill", "denoise")}
    subject = {"stages": stages, "device_ms": 5.0 * factor}
    half = {"stages": {k: {"median_ms": v["median_ms"] / 2} for k, v in stages.items()}, "device_ms": 2.5 * factor}
    path.write_text(json.dumps({"results": {"runs": [{"subjects": {"turbo:bf16": subject, "turbo:fp8": half}}]}}))


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt(tmp_path / "bench_libero_fp8_h200.json", 1.0)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["fp8_docs.py", "--write", "--results", str(tmp_path), "--page", str(page)])
    fp8_docs.main()
    text = page.read_text()
    assert "| `libero` prefill | 2.6 | 2.00 | **1.00** | 2.00 x |" in text
    assert "| 5.00 | **2.50** | 2.00 x | [`bench_libero_fp8_h200.json`]" in text
    assert f"| `full` prefill | 4.1 | {fp8_docs.NONE} | {fp8_docs.NONE} |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


def test_a_page_without_marks_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    monkeypatch.setattr(sys, "argv", ["fp8_docs.py", "--write", "--results", str(tmp_path), "--page", str(page)])
    with pytest.raises(ValueError, match="once each, around the table"):
        fp8_docs.main()
    assert page.read_text() == "nothing"


def test_the_page_has_its_marks() -> None:
    text = fp8_docs.PAGE.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
