from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from turbopi.checkpoint import init_checkpoint
from turbopi.cli.main import main
from turbopi.cli.options import PolicyOptions
from turbopi.cli.selecting import camera_masks
from turbopi.engine.selection import Verdict
from turbopi.export import Manifest
from turbopi.transforms import ALOHA, LIBERO, Camera, Robot


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "checkpoint"
    init_checkpoint(path, "pi05-tiny", weights="hash", robot="libero")
    return path


def export(checkpoint: Path, out: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["export", "--checkpoint", str(checkpoint), "--out", str(out), *options])
    return int(exit_.value.code or 0)


def test_stages_and_buckets(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert export(checkpoint, out, "--stages", "vision, prefill", "--prompt-bucket", "16", "32", "--views", "1") == 0
    assert sorted(path.name for path in out.glob("*.onnx")) == ["prefill_16.onnx", "prefill_32.onnx", "vision.onnx"]
    manifest = Manifest.load(out)
    assert manifest.spec["views"] == 1
    assert "MB of weights" in capsys.readouterr().out


def test_a_whole_graph_in_half_precision(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        export(checkpoint, out, "--stages", "whole", "--precision", "fp16", "--steps", "1", "--prompt-bucket", "16")
        == 0
    )
    manifest = Manifest.load(out)
    assert manifest.order == ("whole",)
    assert [found["pass"] for found in manifest.surgery["whole_16.onnx"]] == ["fold", "lower", "fold"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stages", "eyes"), "graphs: 'eyes' is not one of vision, prefill, denoise, whole"),
        (("--precision", "fp8-qdq"), "no calibration at"),
        (("--attention", "fused", "--opset", "21"), "opset 21 has no Attention"),
        (("--plan", "plan.json"), "quantises nothing"),
        (("--prompt-bucket", "4096"), "prompt bucket 4096 is more than the model's"),
    ],
)
def test_what_cannot_be_exported(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert export(checkpoint, tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_order_of_engines_on_the_command_line(
    checkpoint: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    z = np.load(data / "libero_frames.npz")
    observation = {
        "observation/image": z["agentview"][0],
        "observation/wrist_image": z["wrist"][0],
        "observation/state": z["state"][0],
        "prompt": str(z["prompt"][0]),
    }
    np.savez(tmp_path / "frame.npz", **observation)
    arguments = ["infer", "--checkpoint", str(checkpoint), "--observation", str(tmp_path / "frame.npz")]
    arguments += ["--out", str(tmp_path / "actions.npz"), "--engine", "graphed>onnx>eager", "--device", "cpu"]
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--steps", "2"])
    assert exit_.value.code == 0
    said = capsys.readouterr().err
    assert "leaves graphed: cannot be used here" in said
    assert "takes onnx: passes its audit on 2 frames" in said
    assert np.load(tmp_path / "actions.npz")["actions"].shape == (10, 7)


OPTIONAL = Camera("a", "a", required=False)


@pytest.mark.parametrize(
    ("robot", "required", "all_of_them"),
    [
        (LIBERO, [True, True, False], [True, True, False]),
        (ALOHA, [True, False, False], [True, True, True]),
        (replace(LIBERO, cameras=(OPTIONAL, Camera("b", "b"))), [False, True, False], [True, True, False]),
        (replace(LIBERO, cameras=(OPTIONAL, OPTIONAL)), [True, False, False], [True, True, False]),
        (
            replace(LIBERO, cameras=(OPTIONAL, Camera("b", "b")), missing_last=True),
            [True, False, False],
            [True, True, False],
        ),
    ],
    ids=["all required", "one required", "the second", "none", "missing last"],
)
def test_an_order_is_audited_with_the_robots_cameras(
    robot: Robot, required: list[bool], all_of_them: list[bool]
) -> None:
    assert [mask.tolist() for mask in camera_masks(robot, 3)] == [[required], [all_of_them]]


def test_the_frames_of_an_order_have_those_cameras(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Any] = []

    def gate(model: Any, precision: Any, reference: Any, samples: Any, quantisation: Any) -> Any:
        judged.extend(samples)
        return lambda name, engine: Verdict(True, "right")

    monkeypatch.setattr("turbopi.audit.gate.audit_gate", gate)
    options = PolicyOptions(checkpoint, engine="eager>onnx", device="cpu")
    assert options.keywords()["engine"] == "eager"
    assert [sample.inputs.image_mask.tolist() for sample in judged] == [[[True, True, False]]] * 2
