"""What the passes over a graph do, and what they say of it."""

from __future__ import annotations

import math

import export_support as support
import numpy as np
import onnx_ir as ir
import pytest
import torch

from turbopi.export import ExportSpec, hashed_weights, make_graph, weights_of_model
from turbopi.export.graphs import write_graph
from turbopi.export.stages import GraphShape
from turbopi.export.surgery import expose, fold, infer_shapes, inject

SHAPE = GraphShape(views=2, prompt=support.BUCKET, steps=support.STEPS)


def written(name: str = "denoise") -> ir.Model:
    model = write_graph(name, weights_of_model(support.model()), SHAPE)  # type: ignore[arg-type]
    infer_shapes(model)
    return model


def test_folding_merges_weights_and_reports_it() -> None:
    graph = written("prefill")
    changes = fold(graph)
    assert changes.counts["Concat"] == 3 + 2  # q, k, v of each layer; gate and up of all but the last
    assert changes.nodes_after == graph.graph.num_nodes() == changes.nodes_before - sum(changes.counts.values())
    merged = graph.graph.initializers["prefix.layers.0.qkv.weight.transposed"].const_value
    attention = support.model().vlm.blocks[0].self_attn
    parts = [p.weight.detach().T for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert merged is not None
    assert np.array_equal(merged.numpy(), torch.cat(parts, dim=1).numpy())


def test_steps_share_their_weights() -> None:
    few = sum(1 for name in _folded(2).graph.initializers if name.startswith("expert.layers.0.qkv"))
    many = sum(1 for name in _folded(4).graph.initializers if name.startswith("expert.layers.0.qkv"))
    assert few == many == 1


def _folded(steps: int) -> ir.Model:
    spec = ExportSpec(steps=steps, prompt_buckets=(support.BUCKET,))
    return make_graph("denoise", weights_of_model(support.model()), spec, support.BUCKET)[0]


def test_modulations_are_constants() -> None:
    graph = _folded(2)
    assert not any("time_mlp" in name or ".dense." in name for name in graph.graph.initializers)
    assert "expert.modulations.0.step1of2.scale" in graph.graph.initializers


def test_shapes_are_static() -> None:
    graph = _folded(2)
    for node in graph.graph:
        for value in node.outputs:
            assert value.shape is not None
            assert all(isinstance(size, int) for size in value.shape)


def test_quantised_weights_take_a_byte() -> None:
    spec = ExportSpec(precision="int8-qdq", steps=2, prompt_buckets=(support.BUCKET,))
    asked = support.quantisation("int8", {"prefix.layers.1.down": "bf16"})
    graph, changes = make_graph("prefill", weights_of_model(support.model()), spec, support.BUCKET, asked)
    done = next(change for change in changes if change["pass"] == "quantise")
    assert done["counts"] == {"products in int8": 8, "left in float": 1, "weights": 8}
    assert done["places"] == {"exception prefix.layers.1.down": 1}
    stored = graph.graph.initializers["prefix.layers.0.qkv.weight.int8"]
    assert stored.dtype == ir.DataType.INT8
    assert "prefix.layers.1.down.weight.int8" not in graph.graph.initializers


def test_taps_can_be_exposed_and_injected() -> None:
    graph = _folded(2)
    inject(graph, ["step1.x_t"])
    expose(graph, ["step1.x_t", "step0.v_t"])
    assert [value.name for value in graph.graph.outputs] == ["actions", "step1.x_t", "step0.v_t"]
    assert graph.graph.inputs[-1].name == "given.step1.x_t"
    with pytest.raises(ValueError, match="has no values"):
        expose(graph, ["nothing"])
    with pytest.raises(ValueError, match="has no value 'nothing'"):
        inject(graph, ["nothing"])


def test_large_weights_are_read_only_when_the_file_is_written() -> None:
    config = support.model().config
    weights = hashed_weights(config, 7)
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return weights.read(name)

    spied = type(weights)(config, weights.shapes, read, weights.hash)
    make_graph("vision", spied, ExportSpec(prompt_buckets=(support.BUCKET,)), support.BUCKET)
    # ONNX's shape inference is shown the values of what is tiny.
    assert max(4 * math.prod(weights.shapes[name]) for name in asked) < 1024
