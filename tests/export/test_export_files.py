"""Exports on disk: shared weights, a manifest that holds, and refusals of what does not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import export_support as support
import onnx
import pytest

from turbopi import CheckpointError
from turbopi.checkpoint import convert, init_checkpoint, open_checkpoint
from turbopi.export import ExportSpec, Manifest, export, weights_of_checkpoint, weights_of_model
from turbopi.quant import Quantisation, model_hash
from turbopi.quant.plan import PrecisionPlan

SPEC = ExportSpec(steps=support.STEPS, prompt_buckets=(32, 16), graphs=("vision", "prefill", "denoise", "whole"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "onnx"
    export(weights_of_model(support.model()), SPEC, out)
    return out


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def edit(directory: Path, **values: Any) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_all_graphs_share_the_weights(exported: Path) -> None:
    manifest = Manifest.load(exported)
    assert set(manifest.files) == {"vision.data", "prefill.data", "denoise.data"}
    assert manifest.order == ("vision", "prefill", "denoise", "whole")
    parameters = sum(p.numel() for p in support.model().parameters())
    assert sum(file.bytes for file in manifest.files.values()) < 1.2 * 4 * parameters
    for graph in manifest.graphs:
        onnx.checker.check_model(exported / graph.file, full_check=True)
        assert graph.bytes < 1_000_000


def test_the_manifest_says_what_it_is(exported: Path) -> None:
    manifest = Manifest.load(exported)
    assert manifest.checkpoint_hash == model_hash(support.model())
    assert manifest.config == support.model().config
    assert manifest.calibration_hash is None
    assert manifest.spec["opset"] == 21
    assert [(port.name, port.shape) for port in manifest.find("vision").outputs] == [("image_tokens", (2, 16, 128))]
    assert manifest.find("prefill", 17).file == "prefill_32.onnx"
    assert manifest.surgery["denoise_16.onnx"][0]["pass"] == "fold"
    manifest.check_files(exported, content=True)
    with pytest.raises(ValueError, match="no denoise graph for 33 prompt tokens"):
        manifest.find("denoise", 33)


def test_a_checkpoint_is_exported_without_loading_it(exported: Path, tmp_path: Path) -> None:
    init_checkpoint(tmp_path / "ckpt", "pi05-tiny", weights="hash", robot="libero")
    weights = weights_of_checkpoint(open_checkpoint(tmp_path / "ckpt"))
    manifest = export(weights, replace(SPEC, graphs=("vision",)), tmp_path / "out")
    assert manifest.checkpoint_hash == weights.hash
    convert(tmp_path / "ckpt", tmp_path / "lerobot", "lerobot")
    assert weights_of_checkpoint(open_checkpoint(tmp_path / "lerobot")).hash == weights.hash
    assert manifest.files["vision.data"].bytes == Manifest.load(exported).files["vision.data"].bytes


def test_nothing_is_overwritten(exported: Path) -> None:
    with pytest.raises(FileExistsError, match="already holds"):
        export(weights_of_model(support.model()), SPEC, exported)


def test_truncated_weights_are_refused(copied: Path) -> None:
    with (copied / "prefill.data").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"prefill\.data is truncated: it has 1000 bytes"):
        Manifest.load(copied).check_files(copied)


def test_damaged_and_missing_files_are_refused(copied: Path) -> None:
    path = copied / "vision.data"
    path.write_bytes(b"\1" * path.stat().st_size)
    with pytest.raises(CheckpointError, match=r"vision\.data is damaged"):
        Manifest.load(copied).check_files(copied, content=True)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="not the one that was exported"):
        Manifest.load(copied).check_files(copied)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no vision\.data"):
        Manifest.load(copied).check_files(copied)


def test_another_checkpoint_is_refused(copied: Path) -> None:
    config = support.model().config
    with pytest.raises(CheckpointError, match="made from another checkpoint"):
        Manifest.load(copied).check_weights("0123", config)
    edit(copied, model={**config.to_dict(), "horizon": 11})
    with pytest.raises(CheckpointError, match="disagree about horizon"):
        Manifest.load(copied).check_weights(model_hash(support.model()), config)


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"turbopi_export": 2}', '{"turbopi_export": 1, "graphs": 3, "order": []}']
)
def test_unreadable_manifests(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="no export manifest that can be read"):
        Manifest.load(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="turbo-pi export"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp4"}, "precision: 'fp4' is not one of"),
        ({"graphs": ("eyes",)}, "graphs: 'eyes' is not one of"),
        ({"graphs": ()}, "graphs: 'none' is not one of"),
        ({"opset": 19}, "opset 19 is not written here; choose one of 20"),
        ({"opset": 22, "attention": "fused"}, "opset 22 has no Attention, which 'fused' needs; choose opset 23"),
        ({"precision": "fp8-qdq", "opset": 20, "base": "bf16"}, "opset 20 has no scales in bf16"),
        ({"precision": "fp16", "base": "fp32"}, "precision 'fp16' is its own base type"),
        ({"base": "tf32"}, "base: 'tf32' is not one of"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"prompt_buckets": ()}, "buckets must be at least 1"),
    ],
)
def test_unsupported_specifications(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportSpec(**options)


def test_what_does_not_fit_the_model(tmp_path: Path) -> None:
    weights = weights_of_model(support.model())
    for options, message in (
        ({"views": 4}, "views is 4, the model has 3 cameras"),
        ({"prompt_buckets": (65,)}, "prompt bucket 65 is more than the model's 64"),
    ):
        with pytest.raises(ValueError, match=message):
            export(weights, ExportSpec(**options), tmp_path / "out")  # type: ignore[arg-type]
    other = replace(weights, config=replace(weights.config, numerics="openpi"))
    with pytest.raises(ValueError, match="reproduces another port's roundings"):
        export(other, ExportSpec(precision="bf16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_calibrations_that_are_missing_or_foreign(tmp_path: Path) -> None:
    weights = weights_of_model(support.model())
    spec = ExportSpec(precision="fp8-qdq", prompt_buckets=(32,))
    with pytest.raises(ValueError, match="needs a calibration, and none was given"):
        export(weights, spec, tmp_path / "out")
    with pytest.raises(ValueError, match="needs a calibration, and none was given"):
        export(weights, spec, tmp_path / "out", Quantisation(PrecisionPlan("fp8")))
    foreign = Quantisation(PrecisionPlan("fp8"), replace(support.calibration(), checkpoint_hash="0123"))
    with pytest.raises(CheckpointError, match="is of another checkpoint"):
        export(weights, spec, tmp_path / "out", foreign)
    with pytest.raises(ValueError, match="the format 'int8'; 'fp8-qdq' is written with bf16 or fp8"):
        export(weights, spec, tmp_path / "out", support.quantisation("int8"))
    with pytest.raises(ValueError, match="'fp32' quantises nothing"):
        export(weights, ExportSpec(), tmp_path / "out", support.quantisation("fp8"))
