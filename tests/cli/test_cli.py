import json
from pathlib import Path

import numpy as np
import pytest
import torch

from turbopi import load_policy
from turbopi.checkpoint import init_checkpoint
from turbopi.cli.main import COMMANDS, main
from turbopi.errors import InputError
from turbopi.frames import read_observation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_checkpoint(tmp_path_factory.mktemp("cli") / "ck", "pi05-tiny", weights="hash", robot="libero")


@pytest.fixture(scope="module")
def observation(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    z = np.load(data / "libero_frames.npz")
    path = tmp_path_factory.mktemp("obs") / "frame.npz"
    np.savez(
        path,
        **{
            "observation/image": z["agentview"][0][::-1, ::-1],
            "observation/wrist_image": z["wrist"][0][::-1, ::-1],
            "observation/state": z["state"][0],
            "prompt": z["prompt"][0],
        },
    )
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    return int(exit_.value.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert "usage: turbo-pi" in capsys.readouterr().out


def test_infer_writes_the_policys_actions(
    checkpoint: Path, observation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(1).standard_normal((10, 32)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    out = tmp_path / "sub" / "actions.npz"
    arguments = ["--checkpoint", checkpoint, "--observation", observation, "--out", out, "--steps", 3]
    assert run("infer", *arguments, "--noise", tmp_path / "noise.npy") == 0
    policy = load_policy(checkpoint, steps=3)
    with np.load(out) as written:
        assert np.array_equal(written["actions"], policy.infer(read_observation(observation), noise)["actions"])
        assert written["infer_ms"] > 0
    assert run("infer", *arguments) == 0
    with np.load(out) as written:
        assert np.array_equal(written["actions"], policy.infer(read_observation(observation))["actions"])
    arguments[5] = out.with_suffix("")
    out.unlink()
    assert run("infer", *arguments) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert out.is_file()


def test_nested_observations(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", **{"images/cam_high": np.zeros((3, 4, 4), np.uint8), "state": np.zeros(14)})
    observation = read_observation(tmp_path / "o.npz", "images")
    assert set(observation) == {"images", "state"}
    assert observation["images"]["cam_high"].shape == (3, 4, 4)


def test_bad_files_are_one_clear_line(
    checkpoint: Path, observation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", prompt=np.array({"a": 1}, dtype=object))
    np.savez(tmp_path / "empty.npz")
    out = tmp_path / "out.npz"
    for arguments, message in [
        (["--observation", tmp_path / "absent.npz"], "no observation at"),
        (["--observation", tmp_path / "text.npz"], "not an .npz file"),
        (["--observation", tmp_path / "array.npy"], "a single array"),
        (["--observation", tmp_path / "objects.npz"], "plain arrays"),
        (["--observation", tmp_path / "empty.npz"], "the observation has no prompt"),
        (["--observation", observation, "--noise", tmp_path / "text.npz"], "not an .npy file"),
        (["--observation", observation, "--noise", observation], "is an archive"),
        (["--observation", observation, "--noise", tmp_path / "array.npy"], "noise is (3,) float64"),
        (["--observation", observation, "--engine", "warp"], "unknown engine 'warp'"),
    ]:
        assert run("infer", "--checkpoint", checkpoint, "--out", out, *arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert "Traceback" not in error
        assert not out.exists()
    with pytest.raises(InputError):
        read_observation(tmp_path / "array.npy")


def test_unknown_options_are_refused() -> None:
    assert run("infer", "--speed", "9") == 2


def test_init_doctor_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("init", tmp_path / "a", "--preset", "pi0-tiny", "--weights", "hash") == 0
    assert run("init", tmp_path / "a", "--preset", "pi0-tiny") == 1
    assert "error:" in capsys.readouterr().err
    assert run("convert", tmp_path / "a", tmp_path / "b", "--to", "lerobot") == 0
    assert run("convert", tmp_path / "b", tmp_path / "c", "--to", "openpi") == 0
    for name in ("a", "c"):
        assert run("doctor", tmp_path / name, "--json-out", tmp_path / "report.json") == 0
        assert json.loads((tmp_path / "report.json").read_text())["ok"]
    next((tmp_path / "a" / "assets").rglob("norm_stats.json")).unlink()
    capsys.readouterr()
    assert run("doctor", tmp_path / "a") == 1
    assert "fail" in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info") == 0
    assert torch.__version__ in capsys.readouterr().out
