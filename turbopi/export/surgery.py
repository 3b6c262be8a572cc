"""Passes over a written graph, each of which says what it changed.

`fold` computes what depends on constants alone, `lower` turns the graph to float16 or bfloat16 and puts casts around
the islands that stay float32, `expose` and `inject` open a graph for audits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from .writer import PRECISION_KEY

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@dataclass
class Changes:
    """What one pass did.

    Attributes:
        name: of the pass.
        nodes_before, nodes_after: in the whole graph.
        counts: of changes by kind.
        places: scopes at which something was put in or taken out, with how many.
    """

    name: str
    nodes_before: int
    nodes_after: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, largest counts first."""
        return {
            "pass": self.name,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "counts": dict(self.counts.most_common()),
            "places": dict(self.places.most_common()),
        }


def infer_shapes(model: ir.Model) -> None:
    """Fill in the shape and type of every value. Raises ValueError where one stays unknown: the graph is not sound."""
    ShapeInferencePass(check_type=True, strict_mode=True)(model)
    unknown = [v.name for node in model.graph for v in node.outputs if v.shape is None or v.dtype is None]
    if unknown:
        raise ValueError(f"shapes of {len(unknown)} values cannot be inferred, such as {unknown[:3]}")


def fold(model: ir.Model) -> Changes:
    """Replace every node whose inputs are all constants by its result, computed when the graph is written to a file."""
    changes = Changes("fold", model.graph.num_nodes())
    outputs = set(model.graph.outputs)
    for node in list(model.graph):
        constant = all(value is not None and value.is_initializer() for value in node.inputs)
        if not constant or not node.inputs or outputs & set(node.outputs):
            continue
        for index, value in enumerate(node.outputs):
            _make_constant(model.graph, node, index, value)
        model.graph.remove(node, safe=True)
        changes.counts[node.op_type] += 1
    removed = model.graph.num_nodes()
    RemoveUnusedNodesPass()(model)
    changes.counts["unused"] = removed - model.graph.num_nodes()
    changes.nodes_after = model.graph.num_nodes()
    return changes


def _make_constant(graph: ir.Graph, node: ir.Node, index: int, value: ir.Value) -> None:
    """A lazy constant with the value's name, type and users in the place of the value."""
    assert value.shape is not None
    assert value.dtype is not None
    compute = _evaluation(node, index)
    lazy = any(isinstance(v.const_value, ir.LazyTensor) for v in node.inputs if v is not None)
    deferred = ir.LazyTensor(compute, dtype=value.dtype, shape=value.shape, name=value.name)
    constant = ir.Value(
        name=value.name, type=value.type, shape=value.shape, const_value=deferred if lazy else compute()
    )
    value.name = None
    graph.register_initializer(constant)
    value.replace_all_uses_with(constant)


def _evaluation(node: ir.Node, index: int) -> Callable[[], ir.TensorProtocol]:
    """Computes one output of a node from its inputs' constants, by ONNX's own reference."""
    tensors = [value.const_value for value in node.inputs if value is not None]
    names = [f"i{i}" for i in range(len(tensors))]
    dtype = node.outputs[index].dtype
    assert node.graph is not None
    opset = node.graph.opset_imports[""]
    alone = ir.node(node.op_type, [ir.Value(name=n) for n in names], node.attributes, num_outputs=len(node.outputs))
    for number, output in enumerate(alone.outputs):
        output.name = f"o{number}"
    proto = ir.to_proto(alone)

    def compute() -> ir.TensorProtocol:
        arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
        evaluator = ReferenceEvaluator(proto, opsets={"": opset})
        results: Sequence[Any] = evaluator.run(None, dict(zip(names, arrays, strict=True)))  # type: ignore[assignment]
        return ir.tensor(np.asarray(results[index], order="C"), dtype=dtype)

    return compute


def lower(model: ir.Model, low: ir.DataType, stream: ir.DataType) -> Changes:
    """Turn a float32 graph into one of mixed types, with a cast at every border of an island: strongly typed.

    Products run in `low`, the residual stream in `stream`, islands of float32 (norms, softmax, rotary positions, time,
    actions) stay, and what only moves values takes the type that comes. Stages hand over in `low`, except images,
    state, noise and actions, which are float32. Weights are lowered too, by casts that `fold` takes away.
    """
    changes = Changes("lower", model.graph.num_nodes())
    targets = {"product": low, "stream": stream, "float32": ir.DataType.FLOAT}
    for port in (*model.graph.inputs, *model.graph.outputs):
        if port.dtype == ir.DataType.FLOAT and _is_handed_over(port):
            port.type = ir.TensorType(low)
    wanted = {value: value.dtype for value in model.graph.outputs}
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(model.graph):
        island = node.metadata_props.get(PRECISION_KEY, "shape")
        target = targets.get(island) or _incoming(node)
        if target is None:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in FLOATS or value.dtype == target:
                continue
            if (value, target) not in casts:
                casts[value, target] = _cast_before(model.graph, node, value, target)
                kind = "weights lowered" if value.is_initializer() else f"casts to {target.name.lower()}"
                changes.counts[kind] += 1
                if not value.is_initializer():
                    changes.places[_place(node)] += 1
            node.replace_input_with(index, casts[value, target])
        for output in node.outputs:
            if output.dtype in FLOATS:
                output.type = ir.TensorType(target)
    changes.counts["outputs cast"] = sum(_cast_output(model.graph, v, dtype) for v, dtype in wanted.items())
    changes.nodes_after = model.graph.num_nodes()
    return changes


def _is_handed_over(value: ir.Value) -> bool:
    return value.name is not None and value.name.startswith(("image_tokens", "keys_", "values_"))


def _incoming(node: ir.Node) -> ir.DataType | None:
    """The type of the first float that comes in, of constants only where nothing else does."""
    floats = [value for value in node.inputs if value is not None and value.dtype in FLOATS]
    computed = [value for value in floats if not value.is_initializer()]
    return (computed or floats)[0].dtype if floats else None


def _cast_before(graph: ir.Graph, node: ir.Node, value: ir.Value, target: ir.DataType) -> ir.Value:
    name = f"{value.name}.{target.name.lower()}"
    output = ir.Value(name=name, type=ir.TensorType(target), shape=value.shape)
    cast = ir.node("Cast", [value], {"to": int(target)}, outputs=[output], name=f"{name}/Cast")
    graph.insert_before(node, cast)
    return output


def _cast_output(graph: ir.Graph, value: ir.Value, wanted: ir.DataType | None) -> bool:
    """Give a graph output the type that it was declared with, under its name."""
    if value.dtype == wanted or wanted is None:
        return False
    name, producer = value.name, value.producer()
    assert producer is not None
    value.name = f"{name}.computed"
    output = ir.Value(name=name, type=ir.TensorType(wanted), shape=value.shape)
    cast = ir.node("Cast", [value], {"to": int(wanted)}, outputs=[output], name=f"{name}/Cast")
    graph.insert_after(producer, cast)
    graph.outputs[graph.outputs.index(value)] = output
    return True


def _place(node: ir.Node) -> str:
    """Where a node is, without the numbers of layers and steps."""
    scope = (node.name or "").rpartition("/")[0].rpartition(".")[0]
    return re.sub(r"(?<=\.)\d+(?=\.|$)|(?<=step)\d+", "*", scope) or "top"


def expose(model: ir.Model, names: Iterable[str]) -> None:
    """Make values graph outputs, for audits. Raises ValueError that names those that the graph does not have."""
    values = _by_name(model)
    names = list(names)
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"the graph {model.graph.name} has no values {missing[:5]}")
    present = set(model.graph.outputs)
    model.graph.outputs.extend(values[name] for name in names if values[name] not in present)


def inject(model: ir.Model, names: Iterable[str]) -> None:
    """Make values graph inputs "given.NAME" to whoever reads them, for teacher forcing. The values stay computed."""
    values = _by_name(model)
    for name in names:
        if name not in values:
            raise ValueError(f"the graph {model.graph.name} has no value {name!r}")
        value = values[name]
        given = ir.Value(name=f"given.{name}", type=value.type, shape=value.shape)
        value.replace_all_uses_with(given)
        model.graph.inputs.append(given)


def _by_name(model: ir.Model) -> dict[str | None, ir.Value]:
    return {value.name: value for node in model.graph for value in node.outputs}
