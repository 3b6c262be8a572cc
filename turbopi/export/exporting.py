"""An export from beginning to end: graphs written, operated on, checked, stored, and described in a manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import CheckerPass

from .. import __version__
from ..quant import Calibration, Quantisation
from .files import DataFile, names_of, sha256, write_graphs
from .graphs import write_graph
from .manifest import GraphInfo, Manifest, PortInfo
from .quantise import quantise
from .spec import STAGE_GRAPHS, ExportSpec, GraphName
from .stages import GraphShape
from .surgery import fold, infer_shapes, lower
from .weights import Weights

FLOAT_TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
# Gemma's residual stream may leave float16's range, which ends at 65,504; bfloat16 has float32's range.
STREAM_TYPES = {**FLOAT_TYPES, "fp16": ir.DataType.FLOAT}


def make_graph(
    name: GraphName, weights: Weights, spec: ExportSpec, prompt: int, quantisation: Quantisation | None = None
) -> tuple[ir.Model, list[dict[str, Any]]]:
    """One finished graph in memory, its weights still to be computed, and what each pass changed.

    Raises ValueError if specification, model, plan and calibration do not fit each other.
    """
    spec.check(weights.config)
    plan = spec.plan(quantisation)
    model = write_graph(name, weights, GraphShape(spec.views, prompt, spec.steps), spec.attention, spec.chosen_opset)
    infer_shapes(model)
    changes = [fold(model)]
    base = FLOAT_TYPES[spec.float_type]
    if plan is not None and quantisation is not None and quantisation.calibration is not None:
        plan.check(weights.config)
        quantisation.calibration.check(weights.hash, weights.config)
        changes.append(quantise(model, plan, quantisation.calibration, base))
    if spec.float_type != "fp32":
        changes += [lower(model, base, STREAM_TYPES[spec.float_type]), fold(model)]
    CheckerPass(full_check=True)(model)
    return model, [change.to_dict() for change in changes]


def export(
    weights: Weights,
    spec: ExportSpec,
    out: str | Path,
    quantisation: Quantisation | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Write the graphs of `spec` into the directory `out`: `*.onnx`, `*.data` and `manifest.json`.

    Args:
        weights: of the model.
        spec: what to export.
        out: a directory that holds no other export.
        quantisation: plan and calibration of the quantised precisions.
        progress: told what is being done.

    Raises:
        FileExistsError: `out` holds an export already.
        ValueError: parts that do not fit each other.
        CheckpointError: a calibration of other weights.
    """
    out = Path(out)
    if found := names_of(out):
        raise FileExistsError(f"{out} already holds {found[0].name}; choose another directory, or remove it")
    graphs, surgery, prompts = {}, {}, {}
    for name in dict.fromkeys(spec.graphs):
        for prompt in (0,) if name == "vision" else sorted(set(spec.prompt_buckets)):
            file = f"{name}.onnx" if name == "vision" else f"{name}_{prompt}.onnx"
            progress(f"building {file}")
            graphs[file], surgery[file] = make_graph(name, weights, spec, prompt, quantisation)
            prompts[file] = (name, prompt)
    progress("writing weights")
    files = write_graphs(out, graphs)
    order = tuple(name for name in (*STAGE_GRAPHS, "whole") if name in spec.graphs)
    calibration = None if quantisation is None else quantisation.calibration
    manifest = Manifest(
        checkpoint_hash=weights.hash,
        calibration_hash=None if calibration is None else calibration_hash(calibration),
        plan=None if quantisation is None else quantisation.plan.to_dict(),
        model=weights.config.to_dict(),
        spec={**asdict(spec), "opset": spec.chosen_opset, "base": spec.float_type},
        order=order,
        graphs=tuple(_info(out, file, graphs[file], *prompts[file]) for file in graphs),
        files=files,
        surgery=surgery,
        versions={"turbopi": __version__} | {name: metadata.version(name) for name in ("onnx", "onnx-ir")},
    )
    manifest.save(out)
    return manifest


def calibration_hash(calibration: Calibration) -> str:
    """Tell calibrations apart: a digest of all that one says."""
    return hashlib.sha256(json.dumps(asdict(calibration), sort_keys=True).encode()).hexdigest()[:16]


def _info(out: Path, file: str, model: ir.Model, graph: GraphName, prompt: int) -> GraphInfo:
    whole = DataFile((out / file).stat().st_size, sha256(out / file))
    inputs, outputs = (tuple(_port(value) for value in values) for values in (model.graph.inputs, model.graph.outputs))
    return GraphInfo(graph, file, prompt, inputs, outputs, whole.sha256, whole.bytes)


def _port(value: ir.Value) -> PortInfo:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    return PortInfo(value.name, value.dtype.name.lower(), value.shape.numpy())
