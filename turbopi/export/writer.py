"""Writes an ONNX graph node by node: names, shared constants, and labels that later passes go by.

A graph is written in float32 with the checkpoint's own tensors as initializers; `surgery` merges and lowers them.
Labels, kept in each node's metadata: "precision" says which island a node belongs to, "product" names a matrix product
that may be quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import onnx_ir as ir

from .weights import Weights

Island = Literal["product", "float32", "stream", "shape"]
"""Of a node: "product" runs in the graph's low precision, "float32" never does, "stream" is the residual stream, and
"shape" moves values without computing: it keeps whatever dtype comes."""

Attribute = int | float | str | list[int]
PRECISION_KEY = "turbopi.precision"
PRODUCT_KEY = "turbopi.product"
IR_VERSIONS = {20: 9, 21: 10, 22: 10, 23: 11, 24: 12}
"""The file format's version by opset."""


class GraphWriter:
    """One graph under construction.

    Args:
        name: of the graph.
        opset: version of the ONNX operators.
        weights: where initializers come from.
    """

    def __init__(self, name: str, opset: int, weights: Weights) -> None:
        self.opset = opset
        self.weights = weights
        self.graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": opset})
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._parameters: dict[str, ir.Value] = {}
        self._shared: dict[str, ir.Value] = {}
        self._names: dict[str, int] = {}
        self._scope: list[str] = []
        self._island: Island = "shape"

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Within this context, names of nodes and values start with `name`."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    @contextmanager
    def island(self, island: Island) -> Iterator[None]:
        """Within this context, nodes belong to `island`."""
        before, self._island = self._island, island
        try:
            yield
        finally:
            self._island = before

    def _unique(self, name: str) -> str:
        full = ".".join((*self._scope, name))
        self._names[full] = seen = self._names.get(full, -1) + 1
        return f"{full}.{seen}" if seen else full

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """A graph input of a fixed shape."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value) -> None:
        """Make a computed value a graph output of that name."""
        value.name = name
        self.graph.outputs.append(value)

    def tap(self, name: str, value: ir.Value) -> ir.Value:
        """Give a value the name of the reference's tap; returns it."""
        value.name = name
        return value

    def constant(self, array: np.ndarray | float, dtype: type = np.float32) -> ir.Value:
        """A small constant that stays in the graph's file; equal ones are shared."""
        array = np.asarray(array, dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant.{len(self._constants)}"
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def integers(self, *values: int) -> ir.Value:
        """A constant list of int64: a shape, axes, or sizes."""
        return self.constant(np.array(values), np.int64)

    def parameter(self, name: str) -> ir.Value:
        """A parameter of the model by the reference's name, in float32; read when the graph is written to a file."""
        if name not in self._parameters:
            shape = self.weights.shapes[name]
            read = self.weights.array

            def load() -> ir.TensorProtocol:
                return ir.tensor(read(name))

            self._parameters[name] = self._lazy(name, shape, load)
        return self._parameters[name]

    def derived(self, name: str, array: np.ndarray) -> ir.Value:
        """A float32 constant that was computed from the weights, and goes into their file under this name."""
        if name not in self._parameters:
            self._parameters[name] = self._lazy(name, array.shape, lambda: ir.tensor(array))
        return self._parameters[name]

    def shared(self, name: str, make: Callable[[], ir.Value]) -> ir.Value:
        """A value made of parameters alone, which every step and layer that asks for `name` gets the same of."""
        if name not in self._shared:
            scope, self._scope = self._scope, []
            with self.island("shape"):
                value = make()
            self._scope = scope
            if not value.is_initializer():
                value.name = name
            self._shared[name] = value
        return self._shared[name]

    def _lazy(self, name: str, shape: tuple[int, ...], load: Callable[[], ir.TensorProtocol]) -> ir.Value:
        tensor = ir.LazyTensor(load, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, const_value=tensor)
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(shape)
        self.graph.register_initializer(value)
        return value

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        name: str | None = None,
        product: str | None = None,
        **attributes: Attribute,
    ) -> ir.Value:
        """A node with one output; `product` labels a matrix product that may be quantised."""
        return self._node(kind, inputs, 1, name, product, attributes)[0]

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int, name: str | None = None) -> tuple[ir.Value, ...]:
        """The value cut into parts of these sizes."""
        with self.island("shape"):
            return self._node("Split", (value, self.integers(*sizes)), len(sizes), name, None, {"axis": axis})

    def reshape(self, value: ir.Value, *shape: int, name: str | None = None) -> ir.Value:
        """The same values in another shape."""
        with self.island("shape"):
            return self.op("Reshape", value, self.integers(*shape), name=name)

    def transpose(self, value: ir.Value, *order: int, name: str | None = None) -> ir.Value:
        """The same values with axes in another order."""
        with self.island("shape"):
            return self.op("Transpose", value, perm=list(order), name=name)

    def concat(self, values: Sequence[ir.Value], axis: int, name: str | None = None) -> ir.Value:
        """Values one behind the other; a single one as it is."""
        if len(values) == 1:
            return values[0]
        with self.island("shape"):
            return self.op("Concat", *values, axis=axis, name=name)

    def _node(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        name: str | None,
        product: str | None,
        attributes: Mapping[str, Attribute],
    ) -> tuple[ir.Value, ...]:
        unique = self._unique(name or kind)
        values = [ir.Value(name=unique if i == 0 else f"{unique}:{i}") for i in range(outputs)]
        metadata = {PRECISION_KEY: self._island} | ({PRODUCT_KEY: product} if product else {})
        node = ir.node(kind, list(inputs), attributes, outputs=values, name=f"{unique}/{kind}", metadata_props=metadata)
        self.graph.append(node)
        return tuple(values)

    def model(self) -> ir.Model:
        """The finished graph as a model."""
        return ir.Model(self.graph, ir_version=IR_VERSIONS[self.opset], producer_name="turbopi")
