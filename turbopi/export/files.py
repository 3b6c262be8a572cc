"""Graphs to files: weights once, beside the graphs that share them, and read back only what is whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ..errors import CheckpointError

VISION_DATA, PREFILL_DATA, DENOISE_DATA = "vision.data", "prefill.data", "denoise.data"
_HOMES = {"vision.": VISION_DATA, "projector": VISION_DATA, "vlm.": PREFILL_DATA, "prefix.": PREFILL_DATA}
_PIECE = 16 << 20


@dataclass(frozen=True)
class DataFile:
    """A file of weights as it was written.

    Attributes:
        bytes: its size.
        sha256: of its content.
    """

    bytes: int
    sha256: str


def data_file(name: str) -> str:
    """The file in which the weight of that name is kept: the stage that reads it."""
    return next((home for prefix, home in _HOMES.items() if name.startswith(prefix)), DENOISE_DATA)


def write_graphs(directory: Path, graphs: Mapping[str, ir.Model]) -> dict[str, DataFile]:
    """Write graphs by file name into a directory, and the weights that they share once, as external data.

    Weights are computed and written one at a time, so that memory holds little more than the largest. Weights of the
    same name must be the same. Returns the data files by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    wanted: dict[str, dict[str, ir.TensorProtocol]] = {}
    for model in graphs.values():
        for name, tensor in _lazy(model):
            wanted.setdefault(data_file(name), {}).setdefault(name, tensor)
    stored: dict[str, ir.ExternalTensor] = {}
    for file, tensors in wanted.items():
        written = ir.external_data.convert_tensors_to_external(list(tensors.values()), directory, file)
        stored |= dict(zip(tensors, written, strict=True))
    for file, model in graphs.items():
        for name, _ in _lazy(model):
            model.graph.initializers[name].const_value = stored[name]
        ir.save(model, directory / file)
    return {file: DataFile((directory / file).stat().st_size, sha256(directory / file)) for file in wanted}


def _lazy(model: ir.Model) -> list[tuple[str, ir.LazyTensor]]:
    initializers = model.graph.initializers.items()
    return [(name, v.const_value) for name, v in initializers if isinstance(v.const_value, ir.LazyTensor)]


def sha256(path: Path) -> str:
    """Of a file's content, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def check_files(directory: Path, files: Mapping[str, DataFile], content: bool = False) -> None:
    """Raise unless every file is there with its size, and with its content where that is asked for.

    FileNotFoundError or CheckpointError names the file and what is wrong with it.
    """
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            raise FileNotFoundError(f"{directory} has no {name}, which its manifest names; export again, or copy it")
        found = path.stat().st_size
        if found != expected.bytes:
            what = "truncated" if found < expected.bytes else "not the one that was exported"
            raise CheckpointError(
                f"{path} is {what}: it has {found} bytes, the manifest says {expected.bytes}; export again, or copy it"
            )
        if content and sha256(path) != expected.sha256:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's; export again, or copy it")


def names_of(directory: Path, patterns: Iterable[str] = ("*.onnx", "*.data", "manifest.json")) -> list[Path]:
    """Files of an earlier export in a directory."""
    return sorted(path for pattern in patterns for path in directory.glob(pattern))
