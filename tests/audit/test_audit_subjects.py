from pathlib import Path
from typing import Any

import pytest
import torch
from audit_support import config_of, eager, graph_of, relative, turbo, weights
from torch import Tensor

from turbopi.audit.checks import Told
from turbopi.audit.measure import FLOOR, Reordered, compare, first_over, record
from turbopi.audit.probe import ModuleSubject
from turbopi.audit.sample import Subject
from turbopi.audit.subjects import StageSubject, SubjectName, check_reference, make_pair, parse_subject
from turbopi.audit.turbo import TurboSubject
from turbopi.config import InvalidTokens
from turbopi.engine import EagerEngine
from turbopi.engine.turbo.ops import Ops
from turbopi.quant import PrecisionPlan, Quantisation
from turbopi.quant.calibrate import calibrate
from turbopi.quant.observe import synthetic_batches

KINDS = ("pi05-tiny", "pi0-tiny")


def nothing(name: str, value: Tensor) -> None:
    return None


@pytest.mark.parametrize("invalid", ["dropped", "masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_eager_engine_tells_every_tensor(kind: str, invalid: InvalidTokens) -> None:
    config = config_of(kind, invalid)
    graph, engine = graph_of(config), eager(config)
    told = record(ModuleSubject("eager:fp32", engine), graph.sample, graph)
    assert set(told) == graph.known
    whole = dict(graph.sweep({}))
    assert max(relative(told[name], whole[name]) for name in told if not name.endswith(".logits")) < 5e-6
    assert not any("forward" in vars(module) for module in engine.model.modules())
    assert "velocity" not in vars(engine.model)


def test_a_probe_leaves_the_model_as_it_was_after_an_error() -> None:
    config = config_of("pi05-tiny")
    graph, engine = graph_of(config), eager(config)

    def fail(name: str, value: Tensor) -> None:
        if name == "step0.v_t":
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        ModuleSubject("eager:fp32", engine).run(graph.sample, fail)
    assert not any("forward" in vars(module) for module in engine.model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_turbo_tells_its_buffers_under_the_references_names(kind: str) -> None:
    config = config_of(kind)
    graph = graph_of(config)
    engine = turbo(config)
    told = record(TurboSubject("turbo-twins:fp32", engine, graph.model), graph.sample, graph)
    whole = dict(graph.sweep({}))
    assert len(told) > 0.7 * len(graph.names)
    assert max(relative(told[name], whole[name]) for name in told) < 1e-5
    sampled = engine.sample_actions(graph.sample.inputs, graph.sample.noise, graph.sample.steps)
    assert torch.equal(told["actions"][0], sampled[0])


def test_a_stage_that_tells_nothing_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("pi05-tiny")
    graph = graph_of(config)
    subject = TurboSubject("turbo-twins:fp32", turbo(config), graph.model)
    expected, seen = subject.run(graph.sample, nothing), list[str]()
    monkeypatch.setattr(subject, "_check", lambda name, role: seen.append(role))
    for wanted, first, others in (
        ("vision.cam1.tokens", "patches", {"embedding", "actions in"}),
        ("prefix.layers.1.v", "embedding", {"patches", "actions in"}),
        ("cache.layers.0.k", "actions in", {"patches", "embedding"}),
        ("actions", "actions in", {"patches", "embedding"}),
    ):
        told = Told([wanted])
        assert torch.equal(subject.run(graph.sample, told), expected)
        assert set(told.tensors) == {wanted}
        assert seen[0] == first
        assert not others & set(seen)
        seen.clear()
    assert torch.equal(subject.run(graph.sample, Told()), expected)
    assert seen == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["eager", "turbo"])
def test_what_is_replaced_is_computed_on_with(kind: str, engine: str) -> None:
    config = config_of(kind)
    graph = graph_of(config)
    subject: Subject = ModuleSubject("eager:bf16", eager(config, "bf16"))
    if engine == "turbo":
        subject = TurboSubject("turbo-twins:bf16", turbo(config, "bf16"), graph.model)
    told: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def heal(name: str, value: Tensor) -> Tensor:
        told[name] = graph.value(name, told, made)
        return told[name]

    truth = dict(graph.sweep({}))["actions"]
    assert relative(subject.run(graph.sample, nothing), truth) > 1e-4
    assert torch.equal(subject.run(graph.sample, heal), truth)


def test_any_engine_is_audited_at_its_stages() -> None:
    config = config_of("pi05-tiny", "masked")
    graph = graph_of(config)
    subject = StageSubject("graphed:fp32", eager(config))
    told = record(subject, graph.sample, graph)
    assert set(told) == {
        "vision.cam0.tokens",
        "vision.cam1.tokens",
        *(f"cache.layers.{i}.{t}" for i in range(config.vlm.depth) for t in "kv"),
        "actions",
    }
    whole = dict(graph.sweep({}))
    assert all(relative(told[name], whole[name]) < 5e-6 for name in told)

    def zero_keys(name: str, value: Tensor) -> Tensor | None:
        return torch.zeros_like(value) if name == "cache.layers.1.v" else None

    assert relative(subject.run(graph.sample, zero_keys), whole["actions"]) > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_right_turbo_engine_is_within_budget(kind: str, precision: Any) -> None:
    config = config_of(kind)
    graph, right = graph_of(config), eager(config, precision)
    plain: Subject = Reordered(right) if precision == "fp32" else ModuleSubject("eager:bf16", right)
    readings = compare(TurboSubject(f"turbo-twins:{precision}", turbo(config, precision), graph.model), plain, [graph])
    assert first_over(readings) is None
    assert all(reading.candidate["alone"].rms <= reading.candidate["free"].rms + FLOOR for reading in readings[-3:])
    # Fed the reference's input, a layer's error does not depend on how the layers before it rounded.
    forced = [(r.candidate["forced"].rms, max(FLOOR, 2.5 * r.plain["forced"].rms)) for r in readings]
    assert all(error <= allowed for error, allowed in forced)


def test_an_assembly_that_changed_is_an_error_that_says_where() -> None:
    config = config_of("pi05-tiny")
    graph, engine = graph_of(config), turbo(config)
    subject = TurboSubject("turbo-twins:fp32", engine, graph.model)
    ops: Ops = subject._engine._ops
    with pytest.raises(RuntimeError, match="runs rms_norm, an audit expects nothing more; its assembly changed"):
        ops.rms_norm(torch.zeros(1, 4), torch.zeros(1, 4))


def test_an_observed_engine_leaves_the_engine_alone() -> None:
    config = config_of("pi05-tiny")
    graph, engine = graph_of(config), turbo(config)
    before = engine.sample_actions(graph.sample.inputs, graph.sample.noise, 2)
    TurboSubject("turbo-twins:fp32", engine, graph.model).run(graph.sample, lambda name, t: torch.zeros_like(t))
    assert torch.equal(engine.sample_actions(graph.sample.inputs, graph.sample.noise, 2), before)


def test_a_quantised_reference_is_audited_like_any_other() -> None:
    config = config_of("pi05-tiny")
    graph = graph_of(config)
    name = SubjectName("eager", "w8a16")
    pair = make_pair(name, weights(config, torch.bfloat16), graph.model)
    readings = compare(pair.candidate, pair.plain, [graph])
    assert first_over(readings) is None
    by_name = {reading.name: reading.candidate["alone"].rms for reading in readings}
    assert by_name["prefix.layers.0.gate"] > 1.5 * by_name["prefix.layers.0.norm1"]


@pytest.mark.parametrize("exceptions", [{}, {"prefix.layers.0.*": "bf16", "vision.layers.*.fc1": "bf16"}])
def test_turbo_in_fp8_is_within_what_fp8_costs(exceptions: Any) -> None:
    config = config_of("pi05-tiny")
    graph, model = graph_of(config), weights(config, torch.bfloat16)
    batches = synthetic_batches(config, 8)
    calibration, _ = calibrate(model, batches, robot="libero", source="noise", steps=2, synthetic=True)
    quantisation = Quantisation(PrecisionPlan("fp8", exceptions), calibration)
    pair = make_pair(SubjectName("turbo-twins", "fp8"), model, graph.model, quantisation)
    readings = compare(pair.candidate, pair.plain, [graph])
    assert first_over(readings) is None
    assert readings[-1].candidate["free"].rms > 5e-3
    told = {reading.name for reading in readings}
    # E4M3 is rounded where the product reads it, as in the reference: such inputs are not told.
    assert ("prefix.layers.0.norm1" in told) == bool(exceptions)
    assert "prefix.layers.1.mid" in told


def test_names_of_subjects(tmp_path: Path) -> None:
    assert str(parse_subject("eager:float32", "cpu")) == "eager:fp32"
    assert str(parse_subject("eager", "cpu")) == "eager:fp32"
    assert str(parse_subject("turbo", "cuda")) == "turbo:bf16"
    with pytest.raises(ValueError, match=r"unknown engine 'warp'.*turbo-twins"):
        parse_subject("warp:bf16", "cpu")
    with pytest.raises(ValueError, match="unknown precision 'fp9'"):
        parse_subject("turbo:fp9", "cpu")
    for engine in ("turbo", "turbo-twins"):
        with pytest.raises(ValueError, match=f"engine '{engine}' does not run 'nvfp4'; 'nvfp4' is run by eager"):
            parse_subject(f"{engine}:nvfp4", "cpu")
    assert parse_subject("onnx:some/export:bf16", "cpu") == SubjectName("onnx:some/export", "bf16")
    assert parse_subject(f"onnx:{tmp_path}", "cpu") == SubjectName(f"onnx:{tmp_path}", "fp32")
    mixed = "vision=eager,prefill=eager,denoise=eager"
    assert parse_subject(mixed, "cpu") == parse_subject(f"{mixed}:fp32", "cpu") == SubjectName(mixed, "fp32")
    check_reference("eager:float32")
    with pytest.raises(ValueError, match="compares with eager:fp32"):
        check_reference("turbo:bf16")


def test_a_gpu_engine_without_a_gpu_says_so() -> None:
    config = config_of("pi05-tiny")
    model = weights(config, torch.bfloat16)
    for engine in ("turbo", "graphed"):
        with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
            make_pair(SubjectName(engine, "bf16"), model, graph_of(config).model)


def test_reordered_sums_round_otherwise_and_leave_no_trace() -> None:
    config = config_of("pi05-tiny")
    graph = graph_of(config)
    engine: EagerEngine = eager(config)
    moved = Reordered(engine).run(graph.sample, nothing)
    right = ModuleSubject("eager:fp32", engine).run(graph.sample, nothing)
    assert 0 < relative(moved, right) < 1e-5
