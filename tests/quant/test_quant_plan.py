from pathlib import Path
from typing import get_args

import pytest
import torch

from turbopi import Pi0, preset
from turbopi.cli.options import PolicyOptions
from turbopi.engine import FLOATS, Precision
from turbopi.quant import FORMATS, PrecisionPlan, input_width, product_names

CONFIG = preset("pi05-tiny")


def test_every_product_is_named_once_and_the_prefixes_last_layer_ends_with_its_keys() -> None:
    names = product_names(CONFIG)
    assert len(set(names)) == len(names) == 4 * 2 + (4 * 2 + 1) + 4 * 3
    assert names[0] == "vision.layers.0.qkv"
    assert [n for n in names if n.startswith("prefix.layers.2.")] == ["prefix.layers.2.qkv"]
    assert "expert.layers.2.down" in names


def test_input_widths_are_the_models() -> None:
    with torch.device("meta"):
        model = Pi0(CONFIG)
    assert input_width(CONFIG, "vision.layers.0.fc2") == model.vision.encoder.layers[0].mlp.fc2.in_features
    block = model.expert.blocks[0]
    assert input_width(CONFIG, "expert.layers.0.out") == block.self_attn.o_proj.in_features
    assert input_width(CONFIG, "expert.layers.0.down") == block.mlp.down_proj.in_features
    assert input_width(CONFIG, "prefix.layers.1.gate_up") == CONFIG.vlm.width


def test_the_last_match_wins() -> None:
    plan = PrecisionPlan("fp8", {"expert.*": "bf16", "expert.layers.*.down": "fp8", "expert.layers.1.down": "int8"})
    formats = plan.formats(CONFIG)
    assert formats["vision.layers.0.qkv"] == "fp8"
    assert formats["expert.layers.0.qkv"] == "bf16"
    assert formats["expert.layers.0.down"] == "fp8"
    assert formats["expert.layers.1.down"] == "int8"


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = PrecisionPlan("w4a16", {"vision.*": "w8a16", "vision.layers.0.*": "bf16"})
    assert PrecisionPlan.load(plan.save(tmp_path / "deep" / "plan.json")) == plan
    assert not plan.needs_calibration(CONFIG)
    assert PrecisionPlan("bf16", {"vision.*": "fp8"}).needs_calibration(CONFIG)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "is an object with 'default'"),
        ('{"exceptions": {}}', "is an object with 'default'"),
        ('{"default": "fp8", "extra": 1}', r"got \['default', 'extra'\]"),
        ('{"default": "fp4"}', "default has the format 'fp4'; known: bf16"),
        ('{"default": "fp8", "exceptions": {"vision.*": "fp32"}}', r"vision\.\* has the format 'fp32'"),
        ('{"default": "fp8", "exceptions": ["vision"]}', "formats by product name"),
        ("{", "plan.json"),
    ],
)
def test_plans_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        PrecisionPlan.load(file)


def test_unknown_layers_and_missing_files(tmp_path: Path) -> None:
    plan = PrecisionPlan("fp8", {"expert.layers.7.down": "bf16", "expert.*": "bf16"})
    with pytest.raises(ValueError, match=r"does not have: 'expert\.layers\.7\.down'; names are 'vision\.layers"):
        plan.check(CONFIG)
    with pytest.raises(FileNotFoundError, match="no precision plan at"):
        PrecisionPlan.load(tmp_path / "none.json")


def test_the_command_line_knows_every_precision() -> None:
    known = get_args(get_args(PolicyOptions.__annotations__["precision"].removesuffix(" | None")) or Precision)
    assert set(known) == {*FLOATS, *FORMATS}
