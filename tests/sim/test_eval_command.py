"""`turbo-pi eval` with the fake simulation in LIBERO's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import eval_fakes
import pytest

from turbopi.cli import eval as command
from turbopi.cli.eval import parse_tasks, parse_videos
from turbopi.cli.main import main
from turbopi.sim import evaluate as evaluation
from turbopi.sim import simulations
from turbopi.sim.episodes_file import read_config


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["eval", *map(str, arguments)])
    return int(exit_.value.code or 0)


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations, "LiberoScenes", lambda camera_px, prompts: eval_fakes.FakeScenes())
    monkeypatch.setattr(command, "_source", lambda policy, remote: eval_fakes.FakeSource())


def test_a_run_its_table_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--out",
        tmp_path,
        "--checkpoint",
        "ck",
        "--tasks",
        "0,2",
        "--trials",
        3,
        "--workers",
        1,
        "--videos",
        "2:1",
    )
    assert run(*options, "--minimum", 6, "--seed", 4) == 0
    out = capsys.readouterr().out
    assert "6/6" in out
    assert "inference p50" in out
    assert "succeeds in 100.0 % of 6 episodes" in out
    assert read_config(tmp_path)["config"]["seed"] == 4
    report = (tmp_path / "report.html").read_text()
    assert "do 2" in report
    assert report.count("<img") > 1
    assert (tmp_path / "media" / "task02_state01.mp4").stat().st_size > 0
    assert run(*options, "--seed", 4) == 0
    assert "no verdict: 6 episodes" in capsys.readouterr().out
    assert run(*options, "--seed", 5) == 1
    assert "seed: 4 → 5" in capsys.readouterr().err


def test_errors_make_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = eval_fakes.FakeSource(mischief="raise", at=(0, 0))
    monkeypatch.setattr(command, "_source", lambda policy, remote: source)
    assert run("--out", tmp_path, "--remote", "a:1", "--tasks", 0, "--trials", 1, "--workers", 1) == 1
    out = capsys.readouterr().out
    assert "error: fake" not in out
    assert "the arm fell off" in out
    assert "0/0" in out
    assert len(json.loads((tmp_path / "summary.json").read_text())["errors"]) == 1


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    assert run("--out", tmp_path, "--checkpoint", "ck") == 130
    assert "the same command continues" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "tasks"), [("0-9", tuple(range(10))), ("3", (3,)), ("0, 3,5-7,6", (0, 3, 5, 6, 7))])
def test_tasks(text: str, tasks: tuple[int, ...]) -> None:
    assert parse_tasks(text) == tasks


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "5-3", "1,,2"])
def test_tasks_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="no index or range"):
        parse_tasks(text)


def test_videos() -> None:
    assert parse_videos("0", (0, 1), 5) == frozenset()
    assert parse_videos("3", (4, 6), 5) == {(4, 0), (6, 0), (4, 1)}
    assert parse_videos("4:2, 6:0", (4, 6), 5) == {(4, 2), (6, 0)}
    for text in ("", "some", "1:", "1:2:3"):
        with pytest.raises(ValueError, match="how many, or which"):
            parse_videos(text, (0,), 5)
