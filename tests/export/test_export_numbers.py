"""Exported graphs compute what the reference computes, tap by tap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import export_support as support
import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from turbopi import ModelInput
from turbopi.audit.golden import open_golden
from turbopi.export import ExportSpec, make_graph, weights_of_model
from turbopi.export.proof import prove, ready, reference, run
from turbopi.quant import Quantisation, quantised

SPEC = ExportSpec(steps=support.STEPS, prompt_buckets=(support.BUCKET,))


def proven(name: str, spec: ExportSpec = SPEC) -> dict[str, float]:
    """The worst relative error of each graph and way."""
    model = support.model(name)
    readings = prove(model, *support.observation(model.config), spec)
    worst: dict[str, float] = {}
    for found in readings:
        key = f"{found.graph} {found.way}"
        worst[key] = max(worst.get(key, 0.0), found.relative, found.max_relative)
    return worst


@pytest.mark.parametrize("name", ["pi05-tiny", "pi0-tiny"])
def test_every_tap_of_every_graph(name: str) -> None:
    worst = proven(name)
    assert set(worst) == {"vision forced", "prefill forced", "denoise forced", "denoise stage", "whole free"}
    assert max(worst.values()) <= 1e-4


def test_fused_attention_computes_the_same() -> None:
    spec = replace(SPEC, attention="fused")
    model = support.model("pi0-tiny")
    graph, _ = make_graph("whole", weights_of_model(model), spec, support.BUCKET)
    kinds = [node.op_type for node in graph.graph]
    assert kinds.count("Attention") == 2 + 2 + support.STEPS * 3  # the prefix's last layer only makes keys and values
    assert "Softmax" not in kinds
    assert max(proven("pi0-tiny", spec).values()) <= 1e-4


def test_a_golden_record_of_real_length(data: Path) -> None:
    golden = open_golden(data / "long" / "openpi_pi05_long_f32_slim.safetensors")
    inputs, noise = golden.inputs()
    one = ModelInput(**{name: value[:1] for name, value in vars(inputs).items()})
    slots = int(one.token_mask.sum()) + 3
    model = golden.build(invalid_tokens="dropped")
    readings = prove(model, one, noise[:1], ExportSpec(steps=2, prompt_buckets=(slots,)))
    assert max(found.relative for found in readings) <= 1e-4


def test_grouped_queries_with_several_key_heads() -> None:
    """No published π0 has more than one key head; the configuration allows it."""
    from turbopi.audit.golden import hash_model

    tiny = support.model("pi0-tiny").config
    config = replace(tiny, vlm=replace(tiny.vlm, kv_heads=2), expert=replace(tiny.expert, kv_heads=2))
    readings = prove(hash_model(config, 3, torch.float32), *support.observation(config), SPEC)
    assert max(found.relative for found in readings) <= 1e-4


def test_float16_keeps_its_islands_and_stays_close() -> None:
    graph, changes = make_graph(
        "whole", weights_of_model(support.model()), replace(SPEC, precision="fp16"), support.BUCKET
    )
    lowered = next(change for change in changes if change["pass"] == "lower")
    assert lowered["counts"]["casts to float"] > 0
    for place in ("vision.layers.*.attention", "prefix.layers.*.attention", "step*.expert.layers.*.attention"):
        assert lowered["places"][place] > 0
    types = {node.op_type: {str(v.dtype) for v in node.inputs if v is not None} for node in graph.graph}
    assert types["Softmax"] == {"FLOAT"}
    assert types["LayerNormalization"] == {"FLOAT"}
    model = support.model()
    expected = reference(model, *support.observation(model.config), support.STEPS, support.BUCKET)
    with ready(graph) as path:
        actions = run(path, expected.feeds)["actions"]
    truth = expected.taps["actions"]
    assert 0 < np.linalg.norm(actions - truth) / np.linalg.norm(truth) <= 5e-3


def by_onnx(name: str, spec: ExportSpec, asked: Quantisation | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Actions of the whole graph by ONNX's own slow reference, which has every type, and those of ours."""
    model = support.model(name)
    graph, _ = make_graph("whole", weights_of_model(model), spec, support.BUCKET, asked)
    expected = reference(model, *support.observation(model.config), support.STEPS, support.BUCKET)
    with ready(graph) as path:
        evaluator = ReferenceEvaluator(str(path))
        actions = evaluator.run(None, {name: expected.feeds[name] for name in evaluator.input_names})[0]
    return np.asarray(actions), expected.taps["actions"]


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("attention", ["explicit", "fused"])
@pytest.mark.parametrize("name", ["pi05-tiny", "pi0-tiny"])
def test_bfloat16(name: str, attention: str) -> None:
    """ONNX Runtime has no bf16 products on a CPU. What bf16 costs on these models: TRAPS, noise floors."""
    spec = replace(SPEC, precision="bf16", attention=attention)  # type: ignore[arg-type]
    assert 0 < apart(*by_onnx(name, spec)) <= 4.6e-2


@pytest.mark.parametrize(("precision", "base"), [("fp8-qdq", "fp16"), ("fp8-qdq", "bf16"), ("int8-qdq", "bf16")])
def test_quantised_over_sixteen_bits(precision: str, base: str) -> None:
    asked = support.quantisation(precision.removesuffix("-qdq"))  # type: ignore[arg-type]
    found, truth = by_onnx("pi05-tiny", replace(SPEC, precision=precision, base=base), asked)  # type: ignore[arg-type]
    model = support.model()
    inputs, noise = support.observation(model.config)
    simulated = quantised(model, asked).sample_actions(inputs, noise, support.STEPS).numpy()
    assert 0 < apart(found, truth) < 2 * apart(simulated, truth)


@pytest.mark.parametrize("chosen", ["fp8", "int8"])
def test_quantised_graphs_are_the_quantised_reference(chosen: str) -> None:
    """Each stage fed alike: what is left are values that float32 rounding pushes over the edge of an 8-bit step."""
    model = support.model()
    asked = support.quantisation(chosen, {"expert.layers.1.*": "bf16"})  # type: ignore[arg-type]
    simulated = quantised(model, asked)
    spec = replace(SPEC, precision=f"{chosen}-qdq")  # type: ignore[arg-type]
    observed = support.observation(model.config)
    readings = prove(simulated, *observed, spec, asked, exported=model)
    first = {"vision.layer00": 0.02, "keys_00": 1e-5, "step0.hidden00": 0.02}
    by_name = {(found.tap, found.way): found.relative for found in readings}
    for tap, allowed in first.items():
        assert by_name[tap, "forced"] <= allowed
    plain = reference(model, *observed, support.STEPS, support.BUCKET).taps["actions"]
    truth = reference(simulated, *observed, support.STEPS, support.BUCKET).taps["actions"]
    itself = np.linalg.norm(truth - plain) / np.linalg.norm(plain)
    assert by_name["actions", "stage"] < itself
