import json
from pathlib import Path

import pytest

from turbopi.bench import machine, summary, write_receipt
from turbopi.bench.receipt import gpu_state_during


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


def test_summary_of_many_keeps_every_kth() -> None:
    result = summary([float(i) for i in range(1000)], keep=300)
    assert result["count"] == 1000
    assert result["samples_every"] == 4
    assert result["samples_ms"] == [float(i) for i in range(0, 1000, 4)]
    assert result["p99_9_ms"] == pytest.approx(998.001)
    assert result["median_ms"] == 499.5
    assert result["max_ms"] == 999


def test_samples_take_one_line(tmp_path: Path) -> None:
    values = {"a": summary([1.25e-05, -3.0, 2.0]), "names": ["x", "1, 2"], "empty": [], "text": "[1, 2]"}
    text = write_receipt(tmp_path / "r.json", "nothing", values, {}).read_text()
    assert "[0.0,-3.0,2.0]" in text
    results = json.loads(text)["results"]
    assert (results["names"], results["empty"]) == (["x", "1, 2"], [])
    assert results["text"] == "[1, 2]"


def test_the_gpus_state_while_something_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_state_during(lambda: None) is None
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'clocks.current.sm [MHz]'\necho 1980\n")
    fake.chmod(0o755)
    calls: list[int] = []
    assert gpu_state_during(lambda: calls.append(1)) == "clocks.current.sm [MHz]\n1980"
    assert calls
    fake.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_state_during(lambda: None) is None


def test_a_jetson_says_its_power_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nvpmodel" not in machine()
    fake = tmp_path / "nvpmodel"
    fake.write_text("#!/bin/sh\necho 'NV Power Mode: MAXN'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine()["nvpmodel"] == "NV Power Mode: MAXN"
