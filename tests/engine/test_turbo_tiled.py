"""The prefix's gate and up, kept as the tiled product reads them: the same answer, the same bytes, told by rule."""

import pytest
import torch
from captured_support import model, observation
from turbo_support import STAGE_TOLERANCE, relative, twins

from turbopi.engine.turbo import weights
from turbopi.kernels import TiledGeglu


@pytest.fixture
def _tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "tiling_obstacles", lambda model, quantisation: [])


@pytest.mark.usefixtures("_tiled")
@pytest.mark.parametrize("name", ["pi0-small", "pi05-small"])
def test_the_answer_is_the_reference(name: str) -> None:
    reference = model(name)
    (x, noise), engine = observation(reference.config, [9, 33]), twins(reference)
    assert engine.describe()["prefix_gate_up"] == "tiled"
    assert relative(engine.sample_actions(x, noise, 2), reference.sample_actions(x, noise, 2)) <= STAGE_TOLERANCE


def test_only_the_prefix_is_tiled_and_no_byte_is_more(request: pytest.FixtureRequest) -> None:
    reference = model("pi05-small", dtype=torch.bfloat16)
    plain = weights.fold_model(reference)
    request.getfixturevalue("_tiled")
    tiled = weights.fold_model(reference)
    assert all(isinstance(block.gate_up, TiledGeglu) for block in tiled.prefix.blocks)
    assert not any(isinstance(block.gate_up, TiledGeglu) for block in tiled.expert.blocks)
    assert tiled.bytes_by_format() == plain.bytes_by_format()


def test_why_hoppers_kernels_are_not_used_is_told() -> None:
    told = twins(model("pi05-tiny")).describe()
    assert "384 rows of gate and up" in told["prefix_gate_up"]
    assert "1 key heads of 32" in told["prefix_attention"]
    assert "no entry in the tuned file" in told["prefix_attention"]
    for name in ("prefix_gate_up", "prefix_attention"):
        assert "weights in torch.float32" in told[name]
        assert "no GPU of compute capability 9.0" in told[name]
