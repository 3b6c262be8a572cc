import json
from pathlib import Path

import pytest

from turbopi.bench import machine, summary, write_receipt


def test_summary_keeps_the_samples() -> None:
    result = summary([3.0, 1.0, 2.0])
    assert (result["median_ms"], result["min_ms"], result["max_ms"]) == (2.0, 1.0, 3.0)
    assert result["samples_ms"] == [3.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="no samples"):
        summary([])


def test_a_receipt_says_what_was_measured_and_where(tmp_path: Path) -> None:
    path = write_receipt(tmp_path / "sub" / "r.json", "nothing", {"a": summary([1.0])}, {"steps": 3})
    receipt = json.loads(path.read_text())
    assert receipt["what"] == "nothing"
    assert receipt["config"] == {"steps": 3}
    assert receipt["machine"] == machine()
    assert receipt["machine"]["packages"]["torch"]
