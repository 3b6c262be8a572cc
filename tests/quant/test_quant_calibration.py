import dataclasses
from pathlib import Path

import pytest
import torch
from quant_support import CONFIG, calibration, hashed, ranges

from turbopi import CheckpointError, preset
from turbopi.engine import create_engine
from turbopi.quant import Calibration, InputRange, PrecisionPlan, Quantisation, model_hash
from turbopi.quant.calibration import weights_hash

MODEL = hashed()
CALIBRATION = calibration(MODEL)


def test_a_calibration_survives_its_file_and_ranges_never_shrink(tmp_path: Path) -> None:
    loaded = Calibration.load(CALIBRATION.save(tmp_path / "calibration.json"))
    loaded.check(model_hash(MODEL), CONFIG)
    assert dataclasses.replace(loaded, inputs={}) == dataclasses.replace(CALIBRATION, inputs={})
    for product, before in CALIBRATION.inputs.items():
        after = loaded.inputs[product]
        assert before.amax <= after.amax <= before.amax * 1.002
        assert all(b <= a <= b * 1.002 for b, a in zip(before.channel_amax, after.channel_amax, strict=True))
        assert (before.normed_amax is None) == (after.normed_amax is None)


def test_the_hash_is_of_the_weights_not_of_their_dtype() -> None:
    assert model_hash(hashed(dtype=torch.float32)) == model_hash(MODEL)
    other = hashed()
    with torch.no_grad():
        other.expert.blocks[1].mlp.down_proj.weight.mul_(1.01)
    assert model_hash(other) != model_hash(MODEL)


def test_what_the_hash_does_not_notice() -> None:
    """As its docstring says: where the distance is a multiple of the row's length, it reads the first column only."""
    right = torch.zeros(1024, 64)
    others, first = right.clone(), right.clone()
    others[:, 1:] = 1
    first[:, 0] = 1
    hashes = [weights_hash(["w"], {"w": values}.__getitem__) for values in (right, others, first)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_calibration_of_another_checkpoint_is_refused() -> None:
    stranger = dataclasses.replace(CALIBRATION, checkpoint_hash="0" * 16)
    with pytest.raises(CheckpointError, match="of another checkpoint: it has the hash 0000"):
        create_engine("eager", MODEL, "fp8", Quantisation(PrecisionPlan("fp8"), stranger))


def test_a_calibration_of_another_shape_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"lacks \['expert\.layers\.3"):
        CALIBRATION.check(CALIBRATION.checkpoint_hash, preset("pi05-small"))
    short = dict(ranges(), **{"vision.layers.0.out": InputRange(1.0, (1.0,))})
    with pytest.raises(CheckpointError, match=r"\[1\] channels for vision\.layers\.0\.out, the model 96"):
        dataclasses.replace(CALIBRATION, inputs=short).check(CALIBRATION.checkpoint_hash, CONFIG)
    bare = ranges()
    bare["vision.layers.0.fc1"] = dataclasses.replace(
        bare["vision.layers.0.fc1"], normed_amax=None, normed_channel_amax=None
    )
    with pytest.raises(CheckpointError, match="normed ones too"):
        dataclasses.replace(CALIBRATION, inputs=bare).check(CALIBRATION.checkpoint_hash, CONFIG)


@pytest.mark.parametrize("amax", [0.0, -1.0, float("nan"), float("inf")])
def test_ranges_must_be_positive(amax: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        InputRange(amax, (0.0,))


def test_ranges_must_agree_with_themselves() -> None:
    with pytest.raises(ValueError, match="between 0 and its amax 1"):
        InputRange(1.0, (2.0,))
    with pytest.raises(ValueError, match="both normed ranges or neither"):
        InputRange(1.0, (1.0,), 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no calibration that can be read"),
        ("[]", "no calibration that can be read"),
        ('{"version": 9}', "version is not 1"),
        ('{"version": 1, "inputs": {"a": {"amax": 0, "channel_amax": []}}}', "positive and finite"),
        ('{"version": 1, "inputs": {}}', "missing"),
    ],
)
def test_files_that_are_no_calibration(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Calibration.load(file)


@pytest.mark.parametrize(("field", "value"), [("observer", "mean"), ("percentile", 0.0), ("percentile", 101)])
def test_unknown_observers(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"calibration: {field}"):
        dataclasses.replace(CALIBRATION, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp8", "int8", "nvfp4"])
def test_a_missing_calibration_is_said(precision: str) -> None:
    with pytest.raises(ValueError, match=f"{precision} needs a calibration.*turbo-pi calibrate"):
        create_engine("eager", MODEL, precision)  # type: ignore[arg-type]


def test_the_plan_must_hold_the_precision() -> None:
    with pytest.raises(ValueError, match="'int8' was asked for, but the plan has bf16, fp8 only"):
        Quantisation(PrecisionPlan("fp8", {"vision.*": "bf16"}), CALIBRATION).check("int8", MODEL)
    with pytest.raises(ValueError, match="'bf16' quantises nothing"):
        create_engine("eager", MODEL, "bf16", Quantisation(PrecisionPlan("fp8")))


def test_an_engine_names_the_precisions_it_runs() -> None:
    with pytest.raises(
        ValueError, match=r"engine 'compiled' runs fp32, bf16.*, not 'nvfp4'; 'nvfp4' is run by .*eager"
    ):
        create_engine("compiled", MODEL, "nvfp4")
