"""Stages of several engines in one policy, and engines chosen by an order and an audit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captured_support import model, observation
from turbo_support import twins

from turbopi.audit.gate import audit_gate
from turbopi.audit.sample import Sample
from turbopi.engine import EagerEngine, Engine, MixedEngine, TurboEngine, create_engine
from turbopi.engine.mixed import parse_stages
from turbopi.engine.selection import Verdict, parse_priority, select_engine
from turbopi.engine.turbo.ops import twin_ops

STEPS = 2


@pytest.mark.parametrize("name", ["pi05-tiny", "pi0-tiny"])
@pytest.mark.parametrize("on_onnx", ["vision", "prefill", "denoise"])
def test_any_stage_from_any_engine(name: str, on_onnx: str) -> None:
    reference = model(name)
    stages = {stage: "onnx" if stage == on_onnx else "eager" for stage in ("vision", "prefill", "denoise")}
    engine = create_engine(",".join(f"{stage}={chosen}" for stage, chosen in stages.items()), reference, "fp32")
    assert isinstance(engine, MixedEngine)
    inputs, noise = observation(reference.config, [20, 33])
    found = engine.sample_actions(inputs, noise, STEPS)
    torch.testing.assert_close(found, reference.sample_actions(inputs, noise, STEPS), rtol=1e-4, atol=1e-4)
    handed = engine.describe()["hand_over_ms"]
    crossings = {
        "vision": ["encode_images to prefill"],
        "prefill": ["encode_images to prefill", "prefill to denoise"],
        "denoise": ["prefill to denoise"],
    }
    assert list(handed) == crossings[on_onnx]
    assert all(cost["count"] == 1 and cost["median"] > 0 for cost in handed.values())


def test_stages_of_one_engine_hand_over_nothing() -> None:
    reference = model()
    engine = create_engine("vision=onnx,prefill=onnx,denoise=onnx", reference, "fp32")
    assert isinstance(engine, MixedEngine)
    engine.warm_up(2, STEPS)
    inputs, noise = observation(reference.config, [20])
    engine.sample_actions(inputs, noise, STEPS)
    told = engine.describe()
    assert told["hand_over_ms"] == {}
    assert list(told["engines"]) == ["onnx"]
    assert engine.engines["prefill"] is engine.engines["denoise"]


@pytest.mark.parametrize("source", ["turbo", "onnx"])
def test_a_cache_that_was_computed_over_is_refused(source: str) -> None:
    reference = model()
    first = twins(reference) if source == "turbo" else create_engine(source, reference, "fp32")
    types = {"image_tokens": torch.float32, "cache": torch.float32}
    stages = {"encode_images": first, "prefill": first, "denoise": EagerEngine(reference, "fp32")}
    engine = MixedEngine("mixed", stages, "fp32", types)
    (x, noise), (y, _) = observation(reference.config, [20]), observation(reference.config, [20], seed=1)
    old, new = (
        engine.prefill(engine.encode_images(z.images, z.image_mask), z.image_mask, z.tokens, z.token_mask)
        for z in (x, y)
    )
    engine.denoise(new, y.state, noise, STEPS)
    with pytest.raises(RuntimeError, match="something was computed over it"):
        engine.denoise(old, x.state, noise, STEPS)
    with pytest.raises(RuntimeError, match=r"written over|computed over"):
        first.denoise(old, x.state, noise, STEPS)


def test_reading_stages() -> None:
    assert parse_stages("denoise=turbo, encode_images=onnx:/a=b,prefill=eager") == {
        "encode_images": "onnx:/a=b",
        "prefill": "eager",
        "denoise": "turbo",
    }
    for text in ("vision=onnx", "vision=onnx,vision=eager", "eyes=onnx,prefill=a,denoise=b", "vision=,prefill=a"):
        with pytest.raises(ValueError, match=r"does not give each stage one engine|names no engine for"):
            parse_stages(text)
    with pytest.raises(ValueError, match="unknown engine 'nobody'"):
        create_engine("vision=nobody,prefill=eager,denoise=eager", model(), "fp32")


class Wrong:
    """An engine whose prefill forgets a layer's keys."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def prefill(self, *inputs: torch.Tensor) -> object:
        cache = self._engine.prefill(*inputs)
        cache.keys[1].zero_()
        return cache


def test_an_engine_that_fails_its_audit_is_not_selected() -> None:
    reference = model()
    gate = audit_gate(model(), "fp32", reference, [Sample(*observation(reference.config, [20]), STEPS)])

    def make(name: str) -> Engine:
        made = create_engine("onnx" if name == "wrong" else name, model(), "fp32")
        return Wrong(made) if name == "wrong" else made  # type: ignore[return-value]

    selection = select_engine(parse_priority("graphed > wrong > onnx > eager"), make, gate)
    assert selection.name == "onnx"
    assert [tried.selected for tried in selection.tried] == [False, False, True]
    assert "needs an NVIDIA GPU" in selection.tried[0].why
    assert "fails its audit" in selection.tried[1].why
    assert "cache.layers.1.k" in selection.tried[1].why
    assert selection.to_dict()["selected"] == "onnx"


class WrongTick(TurboEngine):
    """Right stage by stage, wrong in what a policy calls."""

    def sample_actions(self, *inputs: Any) -> torch.Tensor:
        return 0 * super().sample_actions(*inputs)


def test_the_gate_runs_the_whole_tick() -> None:
    reference = model()
    gate = audit_gate(model(), "fp32", reference, [Sample(*observation(reference.config, [20]), STEPS)])
    right, wrong = (kind(model(), "fp32", twin_ops(), None) for kind in (TurboEngine, WrongTick))
    assert gate("right", right).passed
    verdict = gate("wrong", wrong)
    assert not verdict.passed
    assert verdict.why.startswith("fails its audit: deployed, the whole tick: actions' relative error 1.00e+00")


def test_no_engine_is_left() -> None:
    def refuse(name: str, engine: Engine) -> Verdict:
        return Verdict(False, f"{name} is wrong")

    with pytest.raises(ValueError, match="no engine of eager can be taken: eager eager is wrong"):
        select_engine(("eager",), lambda name: create_engine(name, model(), "fp32"), refuse)
    for text in ("a>>b", "a>a", ""):
        with pytest.raises(ValueError, match="is no order of engines"):
            parse_priority(text)
