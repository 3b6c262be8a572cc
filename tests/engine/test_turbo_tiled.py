"""The prefix's gate and up, kept as the tiled product reads them: the same answer, the same bytes, told by rule."""

import pytest
import torch
from captured_support import model, observation
from fp8_support import calibrated, quantisation_of
from turbo_support import STAGE_TOLERANCE, relative, twins

from turbopi import Pi0
from turbopi.engine import base
from turbopi.engine.turbo import TurboEngine, weights
from turbopi.engine.turbo.buckets import Bucket
from turbopi.engine.turbo.ops import twin_ops
from turbopi.kernels import TiledGeglu
from turbopi.quant import PrecisionPlan, Quantisation


def in_fp8(reference: Pi0, quantisation: Quantisation) -> TurboEngine:
    return TurboEngine(reference, "fp8", twin_ops(), None, quantisation=quantisation)


@pytest.fixture
def _tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "tiling_obstacles", lambda model, formats: [])


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


@pytest.mark.usefixtures("_tiled")
def test_fp8_is_tiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same matrices in another order: the same answer as untiled, and fp8 wherever it was."""
    monkeypatch.setitem(base.DTYPES, "fp8", torch.float32)
    reference = calibrated("pi05-small", torch.float32)
    chosen = quantisation_of(reference)
    (x, noise), tiled = observation(reference.config, [9, 33]), in_fp8(reference, chosen)
    assert all(block.gate_up.e4m3 for block in tiled._weights.prefix.blocks)
    answer, kept = tiled.sample_actions(x, noise, 2), tiled.describe()["weight_bytes"]
    monkeypatch.setattr(weights, "tiling_obstacles", lambda model, formats: ["not asked for"])
    untiled = in_fp8(reference, chosen)
    assert untiled.describe()["weight_bytes"] == kept
    assert relative(answer, untiled.sample_actions(x, noise, 2)) <= STAGE_TOLERANCE


def test_gate_up_and_down_must_agree() -> None:
    reference = calibrated("pi05-small", torch.float32)
    formats = dict(PrecisionPlan("fp8", {"prefix.layers.1.down": "bf16"}).formats(reference.config))
    words = "a layer with gate_up and down in different formats"
    assert words in weights.tiling_obstacles(reference, formats)
    assert words not in weights.tiling_obstacles(reference, PrecisionPlan("fp8").formats(reference.config))
    assert words not in weights.tiling_obstacles(reference, None)


def test_what_is_never_stored_takes_no_memory(request: pytest.FixtureRequest) -> None:
    reference = model("pi05-tiny")
    assert len(twins(reference)._arena(1).buffers(Bucket(1, 2, 16)).prefill.gate_up) > 0
    request.getfixturevalue("_tiled")
    reference = model("pi05-small")
    assert len(twins(reference)._arena(1).buffers(Bucket(1, 2, 16)).prefill.gate_up) == 0


def test_why_hoppers_kernels_are_not_used_is_told() -> None:
    told = twins(model("pi05-tiny")).describe()
    assert "384 rows of gate and up" in told["prefix_gate_up"]
    assert "1 key heads of 32" in told["prefix_attention"]
    assert "no entry in the tuned file" in told["prefix_attention"]
    for name in ("prefix_gate_up", "prefix_attention"):
        assert "weights in torch.float32" in told[name]
        assert "no GPU of compute capability 9.0" in told[name]
