import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbopi import CheckpointError, load_policy
from turbopi.checkpoint import init_checkpoint
from turbopi.cli.calibrate import FrameOptions, parse_features
from turbopi.cli.main import main
from turbopi.quant import Calibration, PrecisionPlan, product_names


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_checkpoint(tmp_path_factory.mktemp("calibrate") / "ck", "pi05-tiny", weights="hash", robot="libero")


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "ck"))


@pytest.fixture
def frames(data: Path, tmp_path: Path) -> Path:
    """Eight of the real ones."""
    raw = np.load(data / "libero_frames.npz")
    np.savez(tmp_path / "frames.npz", **{key: raw[key][:8] for key in ("agentview", "wrist", "state", "prompt")})
    return tmp_path / "frames.npz"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["calibrate", "--device", "cpu", *(str(a) for a in arguments)])
    return int(exit_.value.code or 0)


def observation(frames: Path) -> dict[str, Any]:
    raw = np.load(frames)
    return {
        "observation/image": raw["agentview"][0][::-1, ::-1],
        "observation/wrist_image": raw["wrist"][0][::-1, ::-1],
        "observation/state": raw["state"][0],
        "prompt": str(raw["prompt"][0]),
    }


def test_from_real_frames_to_a_quantised_policy(
    checkpoint: Path, frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "deep" / "report.json"
    assert run("--checkpoint", checkpoint, "--frames", frames, "--steps", 2, "--report", report) == 0
    said = capsys.readouterr().out
    assert "outliers" in said
    assert "8 frames" in said
    found = Calibration.load(checkpoint / "calibration.json")
    assert (found.frames, found.robot, found.observer, found.synthetic) == (8, "libero", "max", False)
    assert found.source == "frames.npz, fp32, 2 steps"
    told = json.loads(report.read_text())
    policy = load_policy(checkpoint, device="cpu", precision="fp8", steps=2)
    assert set(told["products"]) == set(product_names(policy.engine.config))
    assert told["calibration"]["frames"] == 8
    plain = load_policy(checkpoint, device="cpu", steps=2).infer(observation(frames))["actions"]
    quantised = policy.infer(observation(frames))["actions"]
    assert 0 < np.abs(quantised - plain).max() < 0.5
    details = policy.describe()["engine_details"]
    assert details["calibration"]["checkpoint_hash"] == found.checkpoint_hash
    assert details["plan"] == {"default": "fp8", "exceptions": {}}


def test_a_plan_and_a_calibration_elsewhere(checkpoint: Path, frames: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere.json"
    assert run("--checkpoint", checkpoint, "--frames", frames, "--steps", 1, "--out", out) == 0
    assert not (checkpoint / "calibration.json").exists()
    plan = PrecisionPlan("int8", {"vision.*": "bf16"}).save(tmp_path / "plan.json")
    options = {"device": "cpu", "precision": "int8", "steps": 1}
    policy = load_policy(checkpoint, plan=plan, calibration=out, **options)  # type: ignore[arg-type]
    assert policy.describe()["engine_details"]["products"]["bf16"] == 8
    with pytest.raises(FileNotFoundError, match=r"no calibration at .*calibration\.json; make one with `turbo-pi cal"):
        load_policy(checkpoint, plan=plan, **options)  # type: ignore[arg-type]
    load_policy(checkpoint, device="cpu", precision="w4a16")


def test_the_percentile_observer_cuts_off(checkpoint: Path, frames: Path, tmp_path: Path) -> None:
    ranges = {}
    for observer in ("max", "percentile"):
        out = tmp_path / f"{observer}.json"
        options = ("--observer", observer, "--percentile", 99, "--steps", 1, "--out", out)
        assert run("--checkpoint", checkpoint, "--frames", frames, *options) == 0
        ranges[observer] = Calibration.load(out)
    assert (ranges["max"].percentile, ranges["percentile"].percentile) == (100, 99)
    assert all(ranges["percentile"].inputs[name].amax <= found.amax for name, found in ranges["max"].inputs.items())


def test_synthetic_says_what_it_is_worth(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--checkpoint", checkpoint, "--synthetic", "--steps", 1) == 0
    assert "worth little" in capsys.readouterr().out
    assert Calibration.load(checkpoint / "calibration.json").synthetic


def test_a_calibration_of_other_weights_is_refused(checkpoint: Path, made: Path, tmp_path: Path) -> None:
    other = init_checkpoint(tmp_path / "other", "pi05-tiny", weights="hash", seed=8, robot="libero")
    assert run("--checkpoint", other, "--synthetic", "--steps", 1) == 0
    with pytest.raises(ValueError, match="is of another checkpoint"):
        load_policy(checkpoint, device="cpu", precision="fp8", calibration=other / "calibration.json")


def test_a_calibration_with_another_robots_frames_is_refused(checkpoint: Path, frames: Path, tmp_path: Path) -> None:
    other = tmp_path / "aloha.json"
    assert run("--checkpoint", checkpoint, "--frames", frames, "--steps", 1, "--out", other) == 0
    other.write_text(json.dumps({**json.loads(other.read_text()), "robot": "aloha"}))
    with pytest.raises(CheckpointError, match="made with frames of robot 'aloha', this policy is for 'libero'"):
        load_policy(checkpoint, device="cpu", precision="fp8", calibration=other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give exactly one source of observations"),
        (["--synthetic", "--frames", "x.npz"], "got frames and synthetic"),
        (["--frames", "nowhere.npz"], "no observation at nowhere.npz"),
        (["--dataset", "nowhere"], "no LeRobot dataset at nowhere"),
        (["--dataset", "nowhere", "--features", "image"], "write KEY=FEATURE"),
        (["--suite", "libero_spatial", "--episodes", "1"], "4 --looks in each of 1 --episodes are too few frames"),
        (["--synthetic", "--percentile", "100", "--steps", "1"], "must lie between 0 and 100"),
    ],
)
def test_what_cannot_be_done(
    made: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--checkpoint", made, *arguments) in (1, 2)
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).split())


def test_too_few_frames_and_another_robots(
    made: Path, frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "one.npz", **observation(frames))
    assert run("--checkpoint", made, "--frames", tmp_path / "one.npz") == 1
    assert "1 frames are too few, at least 8" in capsys.readouterr().err
    droid = init_checkpoint(tmp_path / "droid", "pi05-tiny", weights="hash", robot="droid")
    assert run("--checkpoint", droid, "--frames", frames) == 1
    assert "which robot 'droid' sends" in capsys.readouterr().err


def test_options_are_checked_together() -> None:
    assert parse_features(("observation/image=image",)) == {"observation/image": "image"}
    with pytest.raises(ValueError, match="write KEY=FEATURE"):
        parse_features(("a=",))
    with pytest.raises(ValueError, match="got none"):
        FrameOptions()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--suite", "libero_spatial", "--episodes", "2"], "libero_spatial, 2 episodes, 1 successes, fp32, 1 steps"),
        (["--dataset", "somewhere/demos"], "LeRobot dataset demos, fp32, 1 steps"),
    ],
)
def test_other_sources_are_told(
    checkpoint: Path, frames: Path, arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = [observation(frames)] * 8

    def play(policy: Any, rollouts: Any, on_episode: Any) -> list[dict[str, Any]]:
        on_episode(80, True)
        on_episode(220, False)
        return looks

    monkeypatch.setattr("turbopi.frames.rollouts.rollout_frames", play)
    monkeypatch.setattr("turbopi.frames.lerobot_dataset.dataset_frames", lambda root, robot, count, features: looks)
    assert run("--checkpoint", checkpoint, "--steps", 1, *arguments) == 0
    assert Calibration.load(checkpoint / "calibration.json").source == told
