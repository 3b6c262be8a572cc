"""`manifest.json` of an export: all that a runtime needs to know, and all that lets it refuse what does not belong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError
from .files import DataFile, check_files

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class PortInfo:
    """An input or output of a graph: its name, ONNX element type in lower case, and sizes."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GraphInfo:
    """One graph.

    Attributes:
        graph: vision, prefill, denoise or whole.
        file: its name.
        prompt_bucket: prompt slots; 0 for the vision graph, which has none.
        inputs, outputs: in their order.
        sha256: of the file.
        bytes: of the file.
    """

    graph: str
    file: str
    prompt_bucket: int
    inputs: tuple[PortInfo, ...]
    outputs: tuple[PortInfo, ...]
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What an export is.

    Attributes:
        checkpoint_hash: of the weights, see `turbopi.quant.model_hash`.
        calibration_hash: SHA-256 of the calibration that gave the scales; None where nothing is quantised.
        plan: the precision plan, None where nothing is quantised.
        model: the configuration.
        spec: what was asked for: precision, base, attention, steps, views, prompt buckets, opset.
        order: the graphs in which the stages run; of a whole graph, itself.
        graphs: every graph.
        files: weights by file name.
        surgery: what each pass changed, by graph file.
        versions: of the packages that wrote the export.
    """

    checkpoint_hash: str
    calibration_hash: str | None
    plan: Mapping[str, Any] | None
    model: Mapping[str, Any]
    spec: Mapping[str, Any]
    order: tuple[str, ...]
    graphs: tuple[GraphInfo, ...]
    files: Mapping[str, DataFile]
    surgery: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return ModelConfig.from_dict(self.model)

    def find(self, graph: str, prompt: int = 0) -> GraphInfo:
        """The graph with the smallest bucket for `prompt` tokens.

        Raises ValueError that lists what there is.
        """
        fitting = [g for g in self.graphs if g.graph == graph and (g.prompt_bucket >= prompt or g.graph == "vision")]
        if not fitting:
            there = ", ".join(f"{g.graph} ({g.prompt_bucket})" for g in self.graphs)
            raise ValueError(
                f"no {graph} graph for {prompt} prompt tokens was exported; there are {there}; "
                "export again with a larger --prompt-bucket"
            )
        return min(fitting, key=lambda g: g.prompt_bucket)

    def check_weights(self, checkpoint_hash: str, config: ModelConfig) -> None:
        """Raise CheckpointError unless the export was made from these weights and this configuration."""
        if checkpoint_hash != self.checkpoint_hash:
            raise CheckpointError(
                f"the export was made from another checkpoint: its manifest has the hash {self.checkpoint_hash}, the "
                f"weights have {checkpoint_hash}; export this checkpoint with `turbo-pi export`"
            )
        stated, asked = self.config.to_dict(), config.to_dict()
        different = [name for name in asked if asked[name] != stated[name]]
        if different:
            raise CheckpointError(
                f"the export's manifest and the checkpoint disagree about {', '.join(different)}: "
                f"{[stated[name] for name in different]} and {[asked[name] for name in different]}; export again"
            )

    def check_files(self, directory: Path, content: bool = False) -> None:
        """Raise unless every file is there and whole; see `files.check_files`."""
        graphs = {graph.file: DataFile(graph.bytes, graph.sha256) for graph in self.graphs}
        check_files(directory, {**graphs, **self.files}, content)

    def save(self, directory: Path) -> Path:
        """Write `manifest.json` into a directory; returns its path."""
        path = directory / MANIFEST
        path.write_text(json.dumps({"turbopi_export": FORMAT, **asdict(self)}, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Read a directory's manifest.

        Raises FileNotFoundError if there is none, CheckpointError if it cannot be read.
        """
        path = Path(directory) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"no {MANIFEST} in {directory}; make one with `turbo-pi export`")
        try:
            values = json.loads(path.read_text())
            if values.pop("turbopi_export") != FORMAT:
                raise ValueError(f"turbopi_export is not {FORMAT}")
            values["order"] = tuple(values["order"])
            values["graphs"] = tuple(_graph(graph) for graph in values["graphs"])
            values["files"] = {name: DataFile(**file) for name, file in values["files"].items()}
            manifest = cls(**values)
            _ = manifest.config
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is no export manifest that can be read ({error}); export again") from error
        return manifest


def _graph(values: dict[str, Any]) -> GraphInfo:
    ports = {key: tuple(_port(port) for port in values[key]) for key in ("inputs", "outputs")}
    return GraphInfo(**(values | ports))


def _port(values: dict[str, Any]) -> PortInfo:
    return PortInfo(values["name"], values["dtype"], tuple(values["shape"]))
