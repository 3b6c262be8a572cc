from pathlib import Path

import numpy as np
import pytest

from turbopi import load_policy
from turbopi.cli.main import main
from turbopi.train.episodes import Episode, save_episode


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    return int(exit_.value.code or 0)


def test_train_makes_a_policy_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for index in range(2):
        episode = Episode(
            frames=rng.integers(0, 256, (12, 2, 56, 56, 3), dtype=np.uint8),
            state=rng.standard_normal((12, 8)).astype(np.float32),
            actions=rng.uniform(-1, 1, (12, 7)).astype(np.float32),
            meta={"prompt": "open the drawer"},
        )
        save_episode(tmp_path / "demos" / f"{index}.npz", episode)
    arguments = ["train", "--data", tmp_path / "demos", "--out", tmp_path / "run", "--preset", "pi05-tiny"]
    arguments += ["--steps", 3, "--batch-size", 4, "--device", "cpu", "--workers", 1, "--shard-mib", 1]
    assert run(*arguments) == 0
    assert (tmp_path / "run" / "loss.svg").read_text().startswith("<?xml")
    assert len(list((tmp_path / "run" / "checkpoint").glob("*.safetensors"))) > 1
    observation = {
        "observation/image": np.zeros((64, 64, 3), np.uint8),
        "observation/wrist_image": np.zeros((64, 64, 3), np.uint8),
        "observation/state": np.zeros(8),
        "prompt": "open the drawer",
    }
    assert load_policy(tmp_path / "run" / "checkpoint", device="cpu").infer(observation)["actions"].shape == (10, 7)
    assert run(*arguments) == 1
    assert "this run has ended" in capsys.readouterr().err


def test_train_names_missing_demonstrations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--data", tmp_path, "--out", tmp_path / "run") == 1
    assert "no episodes in" in capsys.readouterr().err
