import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from turbopi.sim.episodes_file import EpisodeRecord, RunDirectory, differences, read_config, read_records
from turbopi.sim.summary import summarize

RECORD = EpisodeRecord(
    suite="libero_spatial",
    task=0,
    initial_state=0,
    seed=0,
    prompt="pick it up",
    success=True,
    steps=80,
    inferences=2,
    infer_ms=[10.0, 30.0],
    note=None,
    error=None,
    attempts=1,
    wall_s=4.0,
    media={},
)
CONFIG = {"suite": "libero_spatial", "trials": 20, "source": {"steps": 10, "path": "a"}}


def error(state: int) -> EpisodeRecord:
    return replace(RECORD, initial_state=state, success=False, steps=0, infer_ms=[], error="its worker died")


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", CONFIG) as run:
        run.append(RECORD)
        run.append(replace(RECORD, task=1, success=False))
    with RunDirectory(tmp_path / "run", CONFIG) as run:
        assert run.records == [RECORD, replace(RECORD, task=1, success=False)]
    assert read_config(tmp_path / "run")["config"] == CONFIG


@pytest.mark.parametrize("torn", [b"{", b'{"suite": "libero_spatial", "task": 1', b"\x00" * 50, "π".encode()[:1]])
def test_a_torn_last_line_is_cut(tmp_path: Path, torn: bytes) -> None:
    with RunDirectory(tmp_path, CONFIG) as run:
        run.append(RECORD)
    with (tmp_path / "episodes.jsonl").open("ab") as file:
        file.write(torn)
    assert read_records(tmp_path) == [RECORD]
    with RunDirectory(tmp_path, CONFIG) as run:
        run.append(replace(RECORD, initial_state=1))
    assert read_records(tmp_path) == [RECORD, replace(RECORD, initial_state=1)]


def test_every_prefix_of_a_log_is_a_log(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, CONFIG) as run:
        for state in range(3):
            run.append(replace(RECORD, initial_state=state))
    path = tmp_path / "episodes.jsonl"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert len(read_records(tmp_path)) == whole[:length].count(b"\n")


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    other = {"suite": "libero_spatial", "trials": 10, "source": {"steps": 3, "path": "a"}}
    with RunDirectory(tmp_path, {**CONFIG, "trials": 7}):
        pass
    with RunDirectory(tmp_path, CONFIG) as run:  # an empty run may still become another
        run.append(RECORD)
    with pytest.raises(ValueError, match=r"trials: 20 → 10; source\.steps: 10 → 3\).*--out"):
        RunDirectory(tmp_path, other)
    with RunDirectory(tmp_path, CONFIG) as run:  # the refusal let go of the lock
        assert run.records == [RECORD]


def test_a_run_may_grow(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, CONFIG) as run:
        run.append(RECORD)
    with RunDirectory(tmp_path, {**CONFIG, "trials": 50}) as run:
        assert run.records == [RECORD]
    assert read_config(tmp_path)["config"] == {**CONFIG, "trials": 50}
    with pytest.raises(ValueError, match="trials: 50 → 20"):
        RunDirectory(tmp_path, CONFIG)


def test_another_policy_is_refused_by_name(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, CONFIG) as run:
        run.confirm_policy({"device": "cpu"})
    with RunDirectory(tmp_path, CONFIG) as run:  # an empty run may still become another
        run.confirm_policy({"device": "cuda"})
        run.append(RECORD)
        run.confirm_policy({"device": "cuda"})
    with RunDirectory(tmp_path, CONFIG) as run, pytest.raises(ValueError, match=r'policy\.device: "cuda" → "cpu"'):
        run.confirm_policy({"device": "cpu"})
    assert read_config(tmp_path)["policy"] == {"device": "cuda"}


def test_two_workers_have_one_policy(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, CONFIG) as run:
        run.confirm_policy({"device": "cuda"})
        run.confirm_policy({"device": "cuda"})
        with pytest.raises(ValueError, match=r'different policies \(policy\.device: "cuda" → "cpu"\)'):
            run.confirm_policy({"device": "cpu"})
    assert read_config(tmp_path)["policy"] == {"device": "cuda"}


def test_two_processes_do_not_write_into_one_run(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, CONFIG), pytest.raises(ValueError, match="another process is evaluating"):
        RunDirectory(tmp_path, CONFIG)


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no episodes\.jsonl"):
        read_records(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        read_config(tmp_path)
    with RunDirectory(tmp_path, CONFIG) as run:
        run.append(RECORD)
        run.append(RECORD)
    with pytest.raises(ValueError, match="twice"):
        read_records(tmp_path)
    path = tmp_path / "episodes.jsonl"
    for line in (b"nonsense", b"[]", b'{"task": 1}', b"\xff"):
        path.write_bytes(line + b"\n" + path.read_bytes())
        with pytest.raises(ValueError, match="line 1 is no episode"):
            RunDirectory(tmp_path, CONFIG)
    for text in ("{", "[]", '{"format": 9}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is not"):
            read_config(tmp_path)


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDirectory(tmp_path, CONFIG) as run:
        monkeypatch.setattr(os, "write", lambda fd, data: 3)
        with pytest.raises(OSError, match="free some space"):
            run.append(RECORD)
        assert run.records == []


def test_differences() -> None:
    assert differences({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [2]}, "d": "x"}) == [
        "b.c: [1] → [2]",
        'd: null → "x"',
    ]
    assert differences({"a": None}, {}) == []


def test_summary_counts_an_error_nowhere_and_a_later_outcome_once() -> None:
    records = [RECORD, error(1), error(2), replace(RECORD, initial_state=1, success=False, infer_ms=[20.0, 40.0])]
    summary = summarize(records, minimum=2)
    assert summary["total"]["successes"] == 1
    assert summary["total"]["episodes"] == 2
    assert [e["initial_state"] for e in summary["errors"]] == [2]
    expected = {"p50_ms": 25.0, "p95_ms": 38.5, "p99_ms": 39.7, "mean_ms": 25.0, "inferences": 4}
    assert summary["latency"] == pytest.approx(expected)
    # 160 steps in 8 s, and 0.1 s of inference.
    assert summary["control"] == pytest.approx({"effective_hz": 160 / 8.1, "ceiling_hz": 1600.0})
    assert summary["verdict"].startswith("succeeds in 50.0 % of 2 episodes (95 % interval 9.5 to 90.5 %); 1 more")
    json.dumps(summary, allow_nan=False)


def test_no_verdict_below_the_minimum() -> None:
    summary = summarize([RECORD], minimum=50)
    assert not summary["enough"]
    assert summary["verdict"] == "no verdict: 1 episodes (1 succeeded), a verdict takes at least 50"
    empty = summarize([], minimum=1)
    assert empty["latency"] is None
    assert empty["control"] is None
    assert empty["total"]["rate"] is None
