import pytest
import torch
from audit_support import SHAPE, config_of, graph_of, sample, weights

from turbopi.audit.graph import ReferenceGraph
from turbopi.audit.names import place, product_of, tensor_names
from turbopi.audit.sample import Sample
from turbopi.bench.workloads import observation
from turbopi.quant import product_names

TAPS = {
    "vision.cam0.projected": "vision.cam0.tokens",
    "vision.cam1.layer00": "vision.cam1.layers.0.stream",
    "vision.cam0.post_ln": "vision.cam0.norm",
    "prefix.embs": "prefix.embs",
    "prefix.k02": "prefix.layers.2.k",
    "prefix.v01": "prefix.layers.1.v",
    "prefix.hidden01": "prefix.layers.1.stream",
    "step0.suffix_embs": "step0.embs",
    "step1.hidden02": "step1.layers.2.stream",
    "step1.suffix_out": "step1.norm",
    "step0.v_t": "step0.v_t",
    "step1.x_t": "step1.x_t",
    "actions": "actions",
}


@pytest.mark.parametrize("kind", ["pi05-tiny", "pi0-tiny"])
def test_the_graph_is_the_reference_bit_for_bit(kind: str) -> None:
    config = config_of(kind)
    graph = graph_of(config)
    values = dict(graph.sweep({}))
    assert tuple(values) == graph.names
    model = weights(config, torch.float32, "reference")
    with model.taps() as taps:
        model.sample_actions(graph.sample.inputs, graph.sample.noise, graph.sample.steps)
    assert all(torch.equal(taps[tap], values[name]) for tap, name in TAPS.items())


def test_one_value_is_made_from_the_nearest_given_ones() -> None:
    graph = graph_of(config_of("pi05-tiny"))
    whole = dict(graph.sweep({}))
    assert torch.equal(graph.value("step1.v_t", {}, {}), whole["step1.v_t"])
    given = {"step1.x_t": whole["step1.x_t"] + 1.0, **{n: whole[n] for n in whole if n.startswith("cache.")}}
    made: dict[str, torch.Tensor] = {}
    moved = graph.value("step1.v_t", given, made)
    assert not torch.equal(moved, whole["step1.v_t"])
    assert not any(name.startswith(("vision", "prefix", "step0")) for name in made)


def test_a_graph_wants_float32() -> None:
    config = config_of("pi05-tiny")
    with pytest.raises(ValueError, match="reference is float32"):
        ReferenceGraph(weights(config, torch.bfloat16), sample(config))


def test_one_frame_at_a_time() -> None:
    inputs, noise = observation(config_of("pi05-tiny"), SHAPE, 2)
    with pytest.raises(ValueError, match="one frame at a time, got a batch of 2"):
        Sample(inputs, noise, 2)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Sample(*observation(config_of("pi05-tiny"), SHAPE, 1), 0)


def test_names_say_where_they_are() -> None:
    assert place("step3.layers.1.probs").stage == "denoise"
    assert place("cache.layers.1.k").stage == "prefill"
    assert place("vision.cam1.layers.0.q").group == "projections"
    assert place("prefix.layers.0.q").group == "rope"
    assert (place("vision.cam1.tokens").index, place("step3.x_t").index) == (1, 3)
    with pytest.raises(ValueError, match="not the name of a tensor"):
        place("prefix.layers.x")


def test_tensors_name_every_product_that_a_plan_can() -> None:
    config = config_of("pi05-tiny")
    names = tensor_names(config, (0, 1), 2)
    assert {p for name in names if (p := product_of(name)) is not None} == set(product_names(config))
