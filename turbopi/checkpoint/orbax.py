"""openpi's original layout: <checkpoint>/params, an Orbax checkpoint of a JAX tree (SPEC 3).

Read with tensorstore alone, one array at a time; written with Orbax's own checkpointer. Both come with the extra
`turbo-pi[jax]` and are imported only here.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError
from .jaxtree import RULES, Place, core_from_jax, heads_in, places, rules_for
from .names import HEADS, Shape, parameter_shapes
from .tensors import TensorInfo, TensorSource, read_json, read_tensor, some

PARAMS = "params"
METADATA = "_METADATA"
MANIFEST = "manifest.ocdbt"


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"reading and writing openpi's JAX layout needs {module}, which is not installed; "
            "install the extra: pip install 'turbo-pi[jax]'"
        ) from error


def is_jax(directory: Path) -> bool:
    """Whether `directory` has the outline of openpi's JAX layout."""
    return (directory / PARAMS / METADATA).is_file() or (directory / PARAMS / MANIFEST).is_file()


class OrbaxSource:
    """The tensors of <directory>/params under our names, read array by array.

    Attributes:
        heads: head counts that the arrays' shapes spell out, by tower.
    """

    def __init__(self, directory: Path) -> None:
        self._root = directory / PARAMS
        self._store = _require("tensorstore")
        self._keys, self._driver = self._tree()
        self._opened = {path: self._open(key) for path, key in self._keys.items() if path in RULES}
        shapes: dict[str, Shape] = {path: tuple(array.shape) for path, array in self._opened.items()}
        self.heads = heads_in(shapes)
        self.unknown = tuple(path for path in self._keys if path not in RULES)
        if any("lora" in path for path in self.unknown):
            raise CheckpointError(
                f"{directory} holds unmerged LoRA adapters ({some(self.unknown)}); merge them into the weights "
                "with openpi before loading or converting"
            )
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, Place] = {}
        for path in (path for path in RULES if path in self._opened):
            dtype = _torch_dtype(path, self._opened[path].dtype.numpy_dtype)
            for name, (place, shape) in places(path, shapes[path]).items():
                self.infos[name], self._places[name] = TensorInfo(shape, dtype), place
        self._held: tuple[str, Tensor] | None = None

    def _tree(self) -> tuple[dict[str, str], str]:
        if not (self._root / MANIFEST).is_file():
            raise CheckpointError(f"{self._root} has no {MANIFEST}: only Orbax checkpoints in OCDBT form are read")
        metadata = read_json(self._root / METADATA)
        keys: dict[str, str] = {}
        try:
            paths = [[str(step["key"]) for step in e["key_metadata"]] for e in metadata["tree_metadata"].values()]
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._root / METADATA} has no readable tree_metadata; copy the file again"
            ) from error
        for steps in filter(None, paths):
            path = steps[1:] if steps[0] == "params" else steps
            # Checkpoints saved during training wrap each array in a {"value": array}.
            keys["/".join(path[:-1] if path[-1] == "value" else path)] = ".".join(steps)
        if not keys:
            raise CheckpointError(f"{self._root / METADATA} names no arrays; restore or download the checkpoint again")
        return keys, "zarr3" if metadata.get("use_zarr3") else "zarr"

    def _open(self, key: str) -> Any:
        store = {"driver": "ocdbt", "base": f"file://{self._root.resolve()}/"}
        try:
            return self._store.open({"driver": self._driver, "kvstore": store, "path": key}, read=True).result()
        except ValueError as error:
            raise CheckpointError(
                f"{self._root}: array {key}, which {METADATA} names, cannot be opened; the checkpoint is incomplete, "
                f"copy or download it again ({str(error).splitlines()[0]})"
            ) from error

    def read_into(self, name: str, target: Tensor) -> None:
        """See `TensorSource`. The array read last is kept, since neighbours in `infos` share it."""
        place = self._places[name]
        if self._held is None or self._held[0] != place.path:
            self._held = None
            self._held = (place.path, self._read(place.path))
        target.copy_(core_from_jax(self._held[1], place))

    def _read(self, path: str) -> Tensor:
        try:
            array = self._opened[path].read().result()
        except ValueError as error:
            raise CheckpointError(
                f"{self._root}: array {path} cannot be read; the checkpoint is damaged, copy or download it again "
                f"({str(error).splitlines()[0]})"
            ) from error
        return _to_torch(array)


def _torch_dtype(path: str, dtype: np.dtype) -> torch.dtype:
    if dtype.name == "bfloat16":
        return torch.bfloat16
    known = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
    if dtype.name not in known:
        raise CheckpointError(f"JAX array {path} has dtype {dtype.name}, expected a floating one of 16, 32 or 64 bits")
    return known[dtype.name]


def _to_torch(array: np.ndarray) -> Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        bfloat16 = _require("ml_dtypes").bfloat16
        return tensor.view(torch.uint16).numpy().view(bfloat16)
    return tensor.numpy()


def write_orbax(directory: Path, source: TensorSource, config: ModelConfig) -> None:
    """Write `source`'s weights as <directory>/params, exactly as openpi lays out its released checkpoints.

    Orbax wants the whole tree in memory. Output heads are left out: the JAX tree has none. Raises CheckpointError if
    layers that share an array differ in dtype.
    """
    orbax = _require("orbax.checkpoint")
    tree: dict[str, Any] = {}
    names = set(parameter_shapes(config)) - set(HEADS)
    for rule, rows, heads in rules_for(names, config):
        dtypes = {source.infos[name].dtype for row in rows for name in row}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{rows[0][0]} and the tensors that share JAX array {rule.path} have dtypes "
                f"{', '.join(sorted(map(str, dtypes)))}; store them in one dtype before converting to jax"
            )
        cores = [[rule.layout.to_jax(read_tensor(source, name), heads) for name in row] for row in rows]
        layers = [torch.stack(row) if len(row) > 1 else row[0] for row in cores]
        array = _to_numpy(torch.stack(layers) if rule.stacked else layers[0])
        *branch, leaf = rule.path.split("/")
        node = tree
        for step in branch:
            node = node.setdefault(step, {})
        node[leaf] = array
    with orbax.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((directory / PARAMS).resolve(), {"params": tree})
