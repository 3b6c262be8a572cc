"""Where weights come from: lazily read tensors under our names, and safetensors files without mapping them.

A memory map would count every page read as this process's memory, twice the weights at the end of a load. So files
are read by offset into the tensor that is kept, a bounded piece at a time.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .names import EMBEDDING, TIED_HEAD, Shape

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PIECE_BYTES = 16 << 20
MAX_HEADER_BYTES = 100 << 20

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What weights and statistics may be stored as; 8-bit formats need scales that no layout here has."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and stored dtype of one tensor."""

    shape: Shape
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes as stored."""
        return self.numel * self.dtype.itemsize


class TensorSource(Protocol):
    """Tensors under our names, read one at a time.

    Attributes:
        infos: what there is, in the order in which reading is cheapest.
        unknown: the file's own names of tensors that belong to no part of the model.
    """

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What there is."""

    @property
    def unknown(self) -> tuple[str, ...]:
        """What does not belong."""

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill `target` (same shape, any floating dtype, any device) with tensor `name`."""


def read_tensor(source: TensorSource, name: str) -> Tensor:
    """Tensor `name` of `source` on the CPU, in its stored dtype."""
    info = source.infos[name]
    target = torch.empty(info.shape, dtype=info.dtype)
    source.read_into(name, target)
    return target


@dataclass(frozen=True)
class _Slice:
    info: TensorInfo
    offset: int


class SafetensorsFile:
    """One safetensors file: its checked header, and reads by offset. Not for reading from two threads at once.

    Raises CheckpointError if the file is truncated, has no valid header, or describes tensors it cannot hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._staging: Tensor | None = None
        size = path.stat().st_size
        header, start = self._header(size)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.slices = {name: self._slice(name, entry, start, size) for name, entry in header.items()}

    def _header(self, size: int) -> tuple[dict[str, Any], int]:
        with self.path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{self.path} is not a safetensors file, or is cut off within its header ({size} bytes); "
                    "copy or download it again"
                )
            try:
                header = json.loads(file.read(length))
            except ValueError as error:
                raise CheckpointError(
                    f"{self.path} has a corrupt safetensors header ({error}); copy or download it again"
                ) from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path} has a safetensors header that is not a JSON object; download it again")
        return header, 8 + length

    def _slice(self, name: str, entry: Any, start: int, size: int) -> _Slice:
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
            begin, end = map(int, entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} has an unreadable entry {entry!r}; expected dtype, shape and data_offsets "
                f"with a dtype of {', '.join(DTYPES)}"
            ) from error
        info = TensorInfo(shape, dtype)
        if end - begin != info.nbytes or begin < 0:
            raise CheckpointError(
                f"{self.path}: tensor {name} takes bytes {begin} to {end}, but {list(shape)} of {entry['dtype']} "
                f"needs {info.nbytes} bytes; the file is corrupt, copy or download it again"
            )
        if start + end > size:
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name} ends at byte {start + end}, the file has {size}; "
                "copy or download it again"
            )
        return _Slice(info, start + begin)

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill `target` with tensor `name`, converting dtype and device a piece at a time."""
        entry = self.slices[name]
        flat = target.view(-1)
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            if target.device.type == "cpu" and target.dtype == entry.info.dtype:
                self._fill(file.fileno(), flat, name)
                return
            if self._staging is None:
                # One buffer for all reads: freed and made anew it would leave holes between the tensors kept.
                self._staging = torch.empty(PIECE_BYTES, dtype=torch.uint8)
            piece = self._staging.view(entry.info.dtype)
            for start in range(0, flat.numel(), len(piece)):
                part = piece[: min(len(piece), flat.numel() - start)]
                self._fill(file.fileno(), part, name)
                flat[start : start + part.numel()].copy_(part)

    def _fill(self, descriptor: int, target: Tensor, name: str) -> None:
        if target.numel() == 0:
            return
        view = target.detach().view(torch.uint8).numpy().data
        while len(view):
            count = os.readv(descriptor, [view[:PIECE_BYTES]])
            if count == 0:
                raise CheckpointError(f"{self.path} ended while reading {name}; it was cut while in use, copy it again")
            view = view[count:]


class SafetensorsSource:
    """The tensors of a directory's `model.safetensors`, whole or in shards, under our names.

    `rename` maps a file's name to ours, or to None where the tensor is no part of the model. Where the file holds the
    tied embedding only as the output head, it is offered as the embedding (SPEC 3, TRAPS 26).
    """

    def __init__(self, files: Sequence[SafetensorsFile], rename: Callable[[str], str | None]) -> None:
        self._where: dict[str, tuple[SafetensorsFile, str]] = {}
        unknown: list[str] = []
        for file in files:
            for name in file.slices:
                ours = rename(name)
                if ours is None:
                    unknown.append(name)
                elif ours in self._where:
                    raise CheckpointError(f"{file.path}: tensor {name} is stored twice; keep one of the copies")
                else:
                    self._where[ours] = (file, name)
        self.stored_names = frozenset(name for file in files for name in file.slices)
        if EMBEDDING not in self._where and TIED_HEAD in self._where:
            self._where[EMBEDDING] = self._where.pop(TIED_HEAD)
        self.unknown = tuple(unknown)
        self.infos: dict[str, TensorInfo] = {
            name: file.slices[theirs].info for name, (file, theirs) in self._where.items()
        }

    def read_into(self, name: str, target: Tensor) -> None:
        """See `TensorSource`."""
        file, theirs = self._where[name]
        file.read_into(theirs, target)


def open_safetensors(directory: Path, rename: Callable[[str], str | None]) -> SafetensorsSource:
    """The weights of a directory: `model.safetensors`, or the shards that its index names.

    Raises FileNotFoundError if neither is there, CheckpointError if the index or a shard is unusable.
    """
    whole, index = directory / WEIGHTS, directory / INDEX
    if whole.is_file():
        return SafetensorsSource([SafetensorsFile(whole)], rename)
    if not index.is_file():
        raise FileNotFoundError(f"{directory} holds neither {WEIGHTS} nor {INDEX}; give a checkpoint directory")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f'{index} has no "weight_map" from tensor names to file names; download it again')
    shards = [directory / Path(shard).name for shard in dict.fromkeys(weight_map.values())]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{directory} lacks the shards {', '.join(missing)} that {INDEX} names; download them")
    files = [SafetensorsFile(shard) for shard in shards]
    held = {name for file in files for name in file.slices}
    lost = sorted(set(weight_map) - held)
    if lost:
        raise CheckpointError(f"the shards of {directory} lack {len(lost)} tensors that {INDEX} names: {some(lost)}")
    return SafetensorsSource(files, rename)


def write_safetensors(
    path: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file, asking `read` for one tensor at a time.

    The safetensors package wants all tensors of a file in memory at once, and openpi and lerobot read one file only;
    a full-size file is 14 GB. Order as that package writes: wide dtypes first, then by name, so that all are aligned.
    """
    order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        info = infos[name]
        end = offset + info.nbytes
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = read(name)
            if (tuple(tensor.shape), tensor.dtype) != (infos[name].shape, infos[name].dtype):
                raise ValueError(f"{name} came as {tuple(tensor.shape)} {tensor.dtype}, announced as {infos[name]}")
            file.write(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)


def write_shards(
    directory: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    max_bytes: int,
) -> None:
    """Write several safetensors files of at most `max_bytes` each, and the index that names them.

    A tensor that is larger alone gets a file of its own.
    """
    groups: list[dict[str, TensorInfo]] = []
    room = 0
    for name, info in infos.items():
        if not groups or info.nbytes > room:
            groups.append({})
            room = max_bytes
        groups[-1][name] = info
        room -= info.nbytes
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(directory / file, group, read, metadata)
        weight_map |= dict.fromkeys(group, file)
    total = sum(info.nbytes for info in infos.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError if it is not one, FileNotFoundError if absent."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); restore or rewrite it") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object; restore or rewrite it")
    return value


def some(names: Sequence[str], limit: int = 5, separator: str = ", ") -> str:
    """The first few names, and how many more there are."""
    more = f"{separator}and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more
