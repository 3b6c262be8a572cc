"""Where the engine's graphs come from: an export on disk, or a loaded model that is exported as graphs are needed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ...config import ModelConfig
from ...errors import CheckpointError, InputError
from ...export import (
    ExportPrecision,
    ExportSpec,
    FloatType,
    GraphInfo,
    GraphName,
    Manifest,
    calibration_hash,
    export,
    weights_of_model,
)
from ...model import Pi0
from ...quant import Quantisation, model_hash
from ..base import Precision

TOKEN_STEP = 16
LARGE = 256 << 20
"""Parameters of a model from which on there is one bucket only: each session keeps weights of its own."""
SPECS: dict[Precision, ExportPrecision] = {"fp32": "fp32", "bf16": "bf16", "fp8": "fp8-qdq", "int8": "int8-qdq"}
"""How a precision is exported."""
RUNS: dict[str, Precision] = {"fp32": "fp32", "fp16": "bf16", "bf16": "bf16", "fp8-qdq": "fp8", "int8-qdq": "int8"}
"""Which precision an export counts as: fp16 stands beside bf16, as the sixteen-bit one."""


_TORCH = {
    "float": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int64": torch.int64,
    "bool": torch.bool,
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a manifest's port."""
    return _TORCH[name]


@dataclass(frozen=True)
class FoundGraph:
    """A graph on disk.

    Attributes:
        path: of the file.
        info: its entry in the manifest.
        weights: SHA-256 of the export's weight files, in the order of their names.
    """

    path: Path
    info: GraphInfo
    weights: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path, manifest: Manifest, info: GraphInfo) -> FoundGraph:
        """A graph of an export."""
        return cls(directory / info.file, info, tuple(manifest.files[name].sha256 for name in sorted(manifest.files)))


class GraphSource(Protocol):
    """Gives the engine its graphs.

    Attributes:
        config: of the model.
        buckets: prompt slots for which there are graphs, or may be, in order.
        views: valid cameras that every graph is for; None if there is one for any number.
        eight_bit_floats: whether the graphs hold fp8.
    """

    config: ModelConfig
    buckets: tuple[int, ...]
    views: int | None
    eight_bit_floats: bool

    def find(self, graph: GraphName, views: int, bucket: int, steps: int) -> FoundGraph:
        """A graph for exactly these views and this bucket; vision and prefill have no steps. Raises InputError."""

    def describe(self) -> dict[str, Any]:
        """For receipts."""


def bucket_for(buckets: tuple[int, ...], tokens: int) -> int:
    """The smallest bucket that holds so many prompt tokens. Raises InputError if none does."""
    found = [bucket for bucket in buckets if bucket >= tokens]
    if not found:
        raise InputError(
            f"a prompt has {tokens} tokens, the exported graphs hold at most {max(buckets)}; shorten it, export with a "
            "larger --prompt-bucket, or use the engine 'eager'"
        )
    return found[0]


class ExportedGraphs:
    """An export's directory, every file of it read once. Raises FileNotFoundError or CheckpointError if not whole."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = Manifest.load(self.directory)
        self.manifest.check_files(self.directory, content=True)
        self.config = self.manifest.config
        self.views: int | None = int(self.manifest.spec["views"])
        self.steps = int(self.manifest.spec["steps"])
        self.buckets = tuple(sorted(self.manifest.spec["prompt_buckets"]))
        self.eight_bit_floats = self.manifest.spec["precision"] == "fp8-qdq"

    def check(self, model: Pi0, precision: Precision, quantisation: Quantisation | None) -> None:
        """Raise CheckpointError for another model or calibration, ValueError for another precision."""
        manifest, exported = self.manifest, str(self.manifest.spec["precision"])
        manifest.check_weights(model_hash(model), model.config)
        if RUNS[exported] != precision:
            raise ValueError(
                f"{self.directory} was exported in {exported}, which is run as precision {RUNS[exported]!r}, not "
                f"{precision!r}; give precision={RUNS[exported]!r}, or export again"
            )
        calibration = None if quantisation is None else quantisation.calibration
        if calibration is not None and calibration_hash(calibration) != manifest.calibration_hash:
            raise CheckpointError(
                f"{self.directory} was exported with another calibration ({manifest.calibration_hash}) than the one "
                f"given ({calibration_hash(calibration)}); export again"
            )

    def find(self, graph: GraphName, views: int, bucket: int, steps: int) -> FoundGraph:
        """See `GraphSource`."""
        if graph not in self.manifest.order:
            raise ValueError(
                f"{self.directory} holds the graphs {', '.join(self.manifest.order)} only; the engine runs stages: "
                "export with --stages vision prefill denoise"
            )
        if views != self.views:
            raise InputError(
                f"{views} cameras are there, the export in {self.directory} is for {self.views}; export with "
                f"--views {views}"
            )
        if graph == "denoise" and steps != self.steps:
            raise ValueError(
                f"{steps} steps were asked for, the denoise graph in {self.directory} unrolls {self.steps}; export "
                f"with --steps {steps}"
            )
        info = self.manifest.find(graph, bucket)
        return FoundGraph.of(self.directory, self.manifest, info)

    def describe(self) -> dict[str, Any]:
        """See `GraphSource`."""
        return {
            "exported": str(self.directory),
            "spec": dict(self.manifest.spec),
            "versions": dict(self.manifest.versions),
        }


class ModelGraphs:
    """Graphs of a loaded model, written into a temporary directory when they are first asked for.

    The token embedding and every other weight is in the files anew; the model itself is only read.
    """

    def __init__(self, model: Pi0, precision: Precision, quantisation: Quantisation | None = None) -> None:
        device = next(model.parameters()).device
        self.config = model.config
        self.views: int | None = None
        self.eight_bit_floats = precision == "fp8"
        self._weights = weights_of_model(model)
        self._quantisation = quantisation
        self._precision = SPECS[precision]
        # Quantised products stand in float16 on a GPU, whose kernels for them are made for it.
        self._base: FloatType | None = "fp16" if quantisation is not None and device.type == "cuda" else None
        large = sum(parameter.numel() for parameter in model.parameters()) > LARGE
        most = model.config.max_tokens
        self.buckets = (most,) if large else (*range(TOKEN_STEP, most, TOKEN_STEP), most)
        self._directory = tempfile.TemporaryDirectory(prefix="turbopi-onnx-")

    def find(self, graph: GraphName, views: int, bucket: int, steps: int) -> FoundGraph:
        """See `GraphSource`."""
        spec = ExportSpec((graph,), self._precision, self._base, "explicit", steps, views, (bucket,))
        last = "" if graph == "vision" else f"-{bucket}" if graph == "prefill" else f"-{bucket}-{steps}"
        directory = Path(self._directory.name) / f"{graph}-{views}{last}"
        if directory.is_dir():
            manifest = Manifest.load(directory)
        else:
            manifest = export(self._weights, spec, directory, self._quantisation)
        return FoundGraph.of(directory, manifest, manifest.graphs[0])

    def describe(self) -> dict[str, Any]:
        """See `GraphSource`."""
        spec = ExportSpec(precision=self._precision, base=self._base)
        return {
            "exported": "when first needed",
            "spec": {"precision": spec.precision, "base": spec.float_type, "opset": spec.chosen_opset},
            "buckets": list(self.buckets),
        }


def open_graphs(
    model: Pi0, precision: Precision, quantisation: Quantisation | None, directory: str | None
) -> ExportedGraphs | ModelGraphs:
    """The graphs in a directory, checked against the model; without one, those that are exported when first needed."""
    if directory is None:
        return ModelGraphs(model, precision, quantisation)
    graphs = ExportedGraphs(directory)
    graphs.check(model, precision, quantisation)
    return graphs
