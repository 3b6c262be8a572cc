"""Quantised products in a graph: QuantizeLinear and DequantizeLinear from a calibration and a precision plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..quant import Calibration, InputRange, PrecisionPlan
from ..quant.formats import balance, e4m3_scale, int8_scale, to_e4m3, to_int8
from .surgery import Changes
from .weights import as_array
from .writer import PRECISION_KEY, PRODUCT_KEY

NUMBER_TYPES = {"fp8": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8}
_SCALES = {"fp8": e4m3_scale, "int8": int8_scale}
_ROUND = {"fp8": to_e4m3, "int8": to_int8}
_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


def quantise(model: ir.Model, plan: PrecisionPlan, calibration: Calibration, base: ir.DataType) -> Changes:
    """Put Q and DQ before both inputs of every product that the plan quantises.

    Activations have one scale, from the calibration; weights one per output channel, from themselves. Scales are held
    in the `base` type, and weights are quantised by the scale as it is held. Run it on a folded graph: a product's
    weight must be a constant. Raises ValueError where it is none.
    """
    changes = Changes("quantise", model.graph.num_nodes())
    pairs = _Pairs(model.graph, base)
    for node in list(model.graph):
        product = node.metadata_props.get(PRODUCT_KEY)
        if product is None:
            continue
        chosen = plan.format_of(product)
        if chosen not in NUMBER_TYPES:
            changes.counts[f"left in {base.name.lower()}"] += 1
            changes.places[f"exception {product}"] += 1
            continue
        x, weight = node.inputs
        assert x is not None
        assert weight is not None
        if weight.const_value is None:
            raise ValueError(f"the weight of {product} is computed within the graph; fold before quantising")
        pair = pairs.of(node, product, chosen, weight, calibration.inputs[product])
        node.replace_input_with(0, pairs.activation(node, x, pair))
        node.replace_input_with(1, pair.weight)
        changes.counts[f"products in {chosen}"] += 1
    changes.counts["weights"] = len(pairs.made)
    changes.nodes_after = model.graph.num_nodes()
    return changes


@dataclass(frozen=True)
class _Pair:
    """What all uses of one product share.

    Attributes:
        weight: dequantised (in, out).
        scale: of the activation, ().
        zero: of the activation, in the eight-bit type.
        inverse: (in,) to multiply the activation by before it is quantised, where it is balanced.
    """

    weight: ir.Value
    scale: ir.Value
    zero: ir.Value
    inverse: ir.Value | None


class _Pairs:
    """Q/DQ nodes of one graph. The steps of the denoise loop share the weights of a product."""

    def __init__(self, graph: ir.Graph, base: ir.DataType) -> None:
        self.graph = graph
        self.base = base
        self.made: dict[str, _Pair] = {}

    def of(self, node: ir.Node, product: str, chosen: str, weight: ir.Value, found: InputRange) -> _Pair:
        """The shared part of a product, made before `node` if it is the product's first."""
        if product not in self.made:
            self.made[product] = self._make(node, product, chosen, weight, found)
        return self.made[product]

    def _make(self, node: ir.Node, product: str, chosen: str, weight: ir.Value, found: InputRange) -> _Pair:
        held, kind = _TORCH[self.base], NUMBER_TYPES[chosen]
        source, shape = weight.const_value, weight.shape
        assert source is not None
        assert shape is not None
        divisor, reach = None, torch.tensor(found.amax)
        if chosen == "int8":
            channels = torch.tensor(found.channel_amax)
            divisor = balance(channels, _float(source).abs().amax(dim=1))
            reach = (channels / divisor).amax()

        def stored() -> tuple[Tensor, Tensor]:
            """The (in, out) weight in eight bits and its (out,) scale, as it is held."""
            values = _float(source) if divisor is None else _float(source) * divisor[:, None]
            scale = _scale(chosen, values.abs().amax(dim=0), held)
            return _ROUND[chosen](values, scale.float()), scale

        inputs = [
            self._initializer(f"{product}.weight.{chosen}", kind, shape, lambda: stored()[0]),
            self._initializer(f"{product}.weight.scale", self.base, ir.Shape((shape[1],)), lambda: stored()[1]),
        ]
        # The same names in every graph: what is large is stored once for all of them.
        dequantised = self._node(node, "DequantizeLinear", inputs, self.base, weight, f"{product}.weight.held", axis=1)
        scale = _scale(chosen, reach, held)
        zero = torch.zeros((), dtype=torch.int8 if chosen == "int8" else torch.float8_e4m3fn)
        inverse = None if divisor is None else 1.0 / divisor
        return _Pair(
            weight=dequantised,
            scale=self._initializer(f"{product}.input.scale", self.base, ir.Shape(()), lambda: scale),
            zero=self._initializer(f"{product}.input.zero", kind, ir.Shape(()), lambda: zero),
            inverse=None
            if inverse is None
            else self._initializer(
                f"{product}.input.balance", ir.DataType.FLOAT, ir.Shape(inverse.shape), lambda: inverse
            ),
        )

    def activation(self, node: ir.Node, x: ir.Value, pair: _Pair) -> ir.Value:
        """DQ(Q(x)), balanced before where the product is."""
        name, kind = f"{node.name}.input", pair.zero.dtype
        assert kind is not None
        if pair.inverse is not None:
            assert x.dtype is not None
            x = self._node(node, "Mul", [x, pair.inverse], x.dtype, x, f"{name}.balanced")
        quantised = self._node(node, "QuantizeLinear", [x, pair.scale, pair.zero], kind, x, f"{name}.quantised")
        inputs = [quantised, pair.scale, pair.zero]
        return self._node(node, "DequantizeLinear", inputs, self.base, x, f"{name}.dequantised")

    def _initializer(self, name: str, dtype: ir.DataType, shape: ir.Shape, make: Callable[[], Tensor]) -> ir.Value:
        tensor = ir.LazyTensor(lambda: _tensor(make(), dtype), dtype=dtype, shape=shape, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _node(
        self,
        node: ir.Node,
        kind: str,
        inputs: list[ir.Value],
        dtype: ir.DataType,
        like: ir.Value,
        name: str,
        **attributes: int,
    ) -> ir.Value:
        output = ir.Value(name=name, type=ir.TensorType(dtype), shape=like.shape)
        metadata = {PRECISION_KEY: "product"}
        made = ir.node(kind, inputs, attributes, outputs=[output], name=f"{name}/{kind}", metadata_props=metadata)
        self.graph.insert_before(node, made)
        return output


def _float(tensor: ir.TensorProtocol) -> Tensor:
    return torch.from_numpy(np.array(tensor.numpy(), np.float32))


def _scale(chosen: str, amax: Tensor, held: torch.dtype) -> Tensor:
    """A scale rounded to the type in which it is held; in sixteen bits a tiny one must not become zero."""
    return _SCALES[chosen](amax).clamp_min(torch.finfo(held).tiny).to(held)


def _tensor(values: Tensor, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(as_array(values), dtype=dtype)
