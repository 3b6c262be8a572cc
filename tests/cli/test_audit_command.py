import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbopi.checkpoint import init_checkpoint
from turbopi.cli.main import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_checkpoint(tmp_path_factory.mktemp("audit") / "ck", "pi05-tiny", weights="hash", robot="libero")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    return int(exit_.value.code or 0)


def audit(checkpoint: Path, data: Path, tmp_path: Path, *more: object) -> int:
    fixed = ("--checkpoint", checkpoint, "--frames", data / "libero_frames.npz", "--steps", 2, "--device", "cpu")
    return run("audit", *fixed, "--out", tmp_path / "audit.json", *more)


def test_a_right_engine_leaves_a_receipt_and_a_page(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(checkpoint, data, tmp_path, "--candidate", "turbo-twins:bf16") == 0
    said = capsys.readouterr().out
    assert "every operation is within what eager:bf16 costs" in said
    assert "No verdict on tasks was made" in said
    receipt = json.loads((tmp_path / "audit.json").read_text())
    assert receipt["what"] == "audit"
    assert receipt["config"]["subjects"]["candidate"] == "turbo-twins:bf16"
    assert receipt["results"]["seconds"]["all"] > 0
    page = (tmp_path / "audit.html").read_text()
    assert "Action expert: layer by step" in page
    assert "<svg" in page


def test_episodes_close_the_report(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played: list[Any] = []

    def play(loop: Any, progress: Any) -> dict[str, Any]:
        played.append(loop)
        assert "first_divergence" in json.loads((tmp_path / "audit.json").read_text())["results"]
        total = {"rate_a": 1.0, "rate_b": 0.9, "interval_a": [0.7, 1.0], "interval_b": [0.6, 1.0]}
        return {"verdict": "no difference shown", "total": total, "continued": 7}

    monkeypatch.setattr("turbopi.audit.closed_loop.play", play)
    more = ("--candidate", "eager:bf16", "--suite", "libero_spatial", "--episodes", 20, "--workers", 2)
    assert audit(checkpoint, data, tmp_path, *more, "--no-switches", "--no-checks", "--count", 1) == 0
    said = capsys.readouterr().out
    assert "closed loop: continues 7 episodes played before" in said
    assert "closed loop: no difference shown" in said
    (loop,) = played
    assert (loop.suite, loop.episodes, loop.workers) == ("libero_spatial", 20, 2)
    assert loop.out == tmp_path / "audit.episodes"
    assert (loop.reference.options["precision"], loop.candidate.options["precision"]) == ("fp32", "bf16")
    assert "60.0 to 100.0 %" in (tmp_path / "audit.html").read_text()


def test_episodes_of_other_code_are_refused_before_anything_runs(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "audit.episodes" / "candidate").mkdir(parents=True)
    (tmp_path / "audit.episodes" / "candidate" / "episodes.jsonl").write_text("{}\n")
    more = ("--candidate", "eager:bf16", "--suite", "libero_spatial", "--episodes", 20)
    assert audit(checkpoint, data, tmp_path, *more) == 1
    assert "holds episodes that other code of turbopi played" in capsys.readouterr().err
    assert not (tmp_path / "audit.json").exists()


def test_a_plan_is_written(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    more = ("--candidate", "eager:w4a16", "--write-plan", plan, "--plan-share", 0.05, "--no-switches", "--no-checks")
    assert audit(checkpoint, data, tmp_path, *more, "--count", 1) == 0
    written = json.loads(plan.read_text())
    assert written["default"] == "w4a16"
    assert set(written["exceptions"].values()) <= {"bf16"}
    assert "Precision plan" in (tmp_path / "audit.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--candidate", "warp:bf16"), "unknown engine 'warp'"),
        (("--candidate", "turbo:fp9"), "unknown precision 'fp9'"),
        (("--candidate", "turbo:nvfp4"), "engine 'turbo' does not run 'nvfp4'"),
        (("--candidate", "eager:bf16", "--reference", "turbo:bf16"), "an audit compares with eager:fp32"),
        (("--candidate", "turbo:bf16"), "needs an NVIDIA GPU"),
        (("--candidate", "eager:bf16", "--count", 99), "at most 20"),
        (("--candidate", "eager:bf16", "--episodes", 10), "--episodes needs --suite"),
        (("--candidate", "eager:bf16", "--episodes", 11, "--suite", "libero_spatial"), "give a multiple of 10"),
        (("--candidate", "eager:bf16", "--write-plan", "plan.json"), "quantises nothing"),
        (("--candidate", "eager:w8a16", "--write-plan", "plan.json", "--plan-share", 2), "between 0 and 1"),
        (("--candidate", "eager:fp8"), "calibration"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_audited_is_one_message(
    arguments: tuple[object, ...],
    message: str,
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert audit(checkpoint, data, tmp_path, *arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert not (tmp_path / "audit.json").exists()


def test_frames_that_do_not_fit_are_named(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ("audit", "--checkpoint", checkpoint, "--candidate", "eager:bf16", "--device", "cpu", "--count", 1)
    assert run(*fixed) == 1
    assert "give --frames" in capsys.readouterr().err
    state = np.zeros(14, np.float32)
    np.savez(tmp_path / "aloha.npz", state=state, **{"images/cam_high": np.zeros((3, 9, 9), np.uint8)})
    assert run(*fixed, "--frames", tmp_path / "aloha.npz") == 1
    assert "are the frames of another robot?" in capsys.readouterr().err
    frame = np.zeros((64, 64, 3), np.uint8)
    cameras = {"observation/image": frame, "observation/wrist_image": frame}
    np.savez(tmp_path / "short.npz", **cameras, prompt="pick", **{"observation/state": np.zeros(7)})
    assert run(*fixed, "--frames", tmp_path / "short.npz") == 1
    assert "observation/state has shape (7,)" in capsys.readouterr().err
    assert run(*fixed, "--frames", tmp_path / "none.npz") == 1
    assert "no observation at" in capsys.readouterr().err
