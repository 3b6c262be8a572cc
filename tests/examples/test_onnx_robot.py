"""The robot without PyTorch: its own resampling, tokenizer and normalisation give what the policy's transforms give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import turbopi
from turbopi.checkpoint import init_checkpoint
from turbopi.transforms.images import image_to_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_robot"
sys.path.insert(0, str(EXAMPLE))
import prepare  # noqa: E402
import robot  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("robot") / "checkpoint"
    init_checkpoint(path, "pi05-tiny", weights="hash", robot="libero")
    return path


@pytest.fixture(scope="module")
def directory(checkpoint: Path) -> Path:
    out = checkpoint.parent / "robot"
    prepare.prepare(checkpoint, out, steps=2)
    return out


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> turbopi.Policy:
    return turbopi.load_policy(checkpoint, device="cpu", steps=2)


@pytest.fixture(scope="module")
def frames(data: Path) -> list[dict[str, Any]]:
    z = np.load(data / "libero_frames.npz")
    return [
        {
            "observation/image": z["agentview"][i][::-1, ::-1],
            "observation/wrist_image": z["wrist"][i][::-1, ::-1],
            "observation/state": z["state"][i],
            "prompt": str(z["prompt"][i]),
        }
        for i in range(2)
    ]


@pytest.mark.parametrize("shape", [(256, 256), (480, 640), (300, 200), (40, 56), (112, 112), (113, 112)])
def test_frames_to_the_bit(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for size in (56, 112):
        assert np.array_equal(robot.to_model(image, size), image_to_model(image, "frame", size))
    with pytest.raises(ValueError, match="expected \\(height, width, 3\\) uint8"):
        robot.to_model(image.astype(float), 56)


@pytest.mark.parametrize(
    "text",
    ["Task: put the bowl on the plate, State: 1 22 255 -1 0;\nAction: ", "héllo  wörld\n\n", "a_b Ñ 12345", ""],
)
def test_tokens(directory: Path, policy: turbopi.Policy, text: str) -> None:
    made = robot.OnnxRobot(directory)
    assert robot.encode(text, made.ranks, made.facts["whole"]) == policy.transforms.prompt.tokenizer.encode(text)


def test_actions_are_the_policys(directory: Path, policy: turbopi.Policy, frames: list[dict[str, Any]]) -> None:
    made = robot.OnnxRobot(directory, threads=1)
    for frame in frames:
        noise = np.random.default_rng(1).standard_normal((10, 32)).astype(np.float32)
        expected = policy.infer(frame, noise)["actions"]
        assert np.allclose(made.infer(frame, noise)["actions"], expected, rtol=1e-4, atol=1e-4)
    first = made.infer(frames[0])["actions"]
    assert not np.array_equal(made.infer(frames[0])["actions"], first)
    made.reset()
    assert np.array_equal(made.infer(frames[0])["actions"], first)


def test_a_prompt_that_no_graph_holds(directory: Path, frames: list[dict[str, Any]]) -> None:
    made = robot.OnnxRobot(directory, threads=1)
    made.buckets = [16]
    with pytest.raises(ValueError, match="the graphs hold \\[16\\]"):
        made.infer(frames[0])


def test_the_process_has_no_torch(directory: Path, frames: list[dict[str, Any]]) -> None:
    """Through the pipe; the robot's process asserts at every request that PyTorch was not imported."""
    command = [sys.executable, str(EXAMPLE / "robot.py"), str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        robot.send(process.stdin, {"reset": np.array(1)})
        assert robot.receive(process.stdout) == {}
        robot.send(process.stdin, frames[0])
        reply = robot.receive(process.stdout)
        process.stdin.close()
    assert reply is not None
    assert reply["actions"].shape == (10, 7)
    assert process.returncode == 0
    assert "torch" not in (EXAMPLE / "robot.py").read_text().split('"""', 2)[2].split("def main")[0]


def test_what_the_robot_does_not_speak(tmp_path: Path) -> None:
    init_checkpoint(tmp_path / "pi0", "pi0-tiny", weights="hash", robot="libero")
    with pytest.raises(ValueError, match=r"robot\.py does not speak .*pi0"):
        prepare.prepare(tmp_path / "pi0", tmp_path / "out")
