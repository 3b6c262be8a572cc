import json
from pathlib import Path

import pytest
import torch

from turbopi.checkpoint.names import (
    HEADS,
    from_lerobot,
    from_openpi,
    head_shapes,
    parameter_shapes,
    to_lerobot,
    to_openpi,
)
from turbopi.config import PRESETS, preset
from turbopi.model import Pi0

DATA = Path(__file__).parents[1] / "data" / "io"


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_are_those_of_the_model(name):
    with torch.device("meta"):
        model = Pi0(preset(name))
    assert parameter_shapes(preset(name)) == {n: tuple(p.shape) for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_full_size_names_and_shapes_are_openpis(kind):
    table = json.loads((DATA / "param_table_full.json").read_text())[kind]
    ours = parameter_shapes(preset(kind)) | head_shapes(preset(kind))
    assert {to_openpi(name): list(shape) for name, shape in ours.items()} == {n: row[0] for n, row in table.items()}
    assert len(table) == {"pi0": 778, "pi05": 813}[kind]


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_parameter_count_is_the_published_one(kind):
    count = sum(torch.Size(shape).numel() for shape in parameter_shapes(preset(kind)).values())
    assert count == {"pi0": 3_238_048_528, "pi05": 3_353_433_872}[kind]


@pytest.mark.parametrize("kind", ["pi0-tiny", "pi05-tiny"])
def test_names_round_trip(kind):
    for name in [*parameter_shapes(preset(kind)), *HEADS]:
        assert from_openpi(to_openpi(name)) == name
        assert from_lerobot(to_lerobot(name)) == name
        assert from_lerobot(to_openpi(name)) == name, "lerobot reads openpi's names as they are"
        assert to_lerobot(name) == "model." + to_openpi(name)


def test_strangers_have_no_name():
    assert from_openpi("paligemma_with_expert.paligemma.model.audio_tower.weight") is None
    assert from_openpi("model.action_in_proj.weight") is None
    with pytest.raises(ValueError, match="not a parameter name"):
        to_openpi("audio.weight")
