"""`turbo-pi export`: a checkpoint's stages as ONNX graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..export import ExportSpec, Manifest, Weights
    from ..quant import Quantisation


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        checkpoint: directory of an openpi, lerobot or JAX checkpoint.
        out: directory to write; it must hold no other export.
        stages: vision, prefill and denoise, separated by commas: a graph each; or whole: all of them in one graph.
        format: of the graphs.
        precision: of the matrix products; fp8-qdq and int8-qdq mark them for an engine that has such products.
        base: type of what is neither quantised nor an island of float32. Default: the precision's own; fp32 for qdq.
        attention: explicit is MatMul, Softmax, MatMul; fused is opset 23's Attention.
        steps: flow-matching evaluations that the denoise graph unrolls.
        views: cameras that are there.
        prompt_bucket: prompt slots, a prefill and a denoise graph each. Default: the model's.
        opset: version of the ONNX operators. Default: 21, or 23 for fused attention.
        calibration: JSON file of `turbo-pi calibrate`, for qdq. Default: calibration.json in the checkpoint.
        plan: JSON file that says which products are left in the base type.
    """

    checkpoint: Path
    out: Path
    stages: str = "vision,prefill,denoise"
    format: Literal["onnx"] = "onnx"
    precision: Literal["fp32", "fp16", "bf16", "fp8-qdq", "int8-qdq"] = "fp32"
    base: Literal["fp32", "fp16", "bf16"] | None = None
    attention: Literal["explicit", "fused"] = "explicit"
    steps: int = 10
    views: int = 2
    prompt_bucket: tuple[int, ...] = ()
    opset: int | None = None
    calibration: Path | None = None
    plan: Path | None = None

    def spec(self, max_tokens: int) -> ExportSpec:
        """The same for the exporter. Raises ValueError for what cannot be exported."""
        from ..export import ExportSpec

        return ExportSpec(
            graphs=tuple(name.strip() for name in self.stages.split(",")),  # type: ignore[misc]
            precision=self.precision,
            base=self.base,
            attention=self.attention,
            steps=self.steps,
            views=self.views,
            prompt_buckets=self.prompt_bucket or (max_tokens,),
            opset=self.opset,
        )

    def quantisation(self, weights: Weights) -> Quantisation | None:
        """Plan and calibration of the quantised precisions. Raises ValueError for others that are given either."""
        from ..export import QDQ
        from ..policy import load_quantisation

        # Precisions without quantisation are all alike to whom reads plans.
        precision = QDQ.get(self.precision, "fp32")
        return load_quantisation(self.checkpoint, precision, weights.config, self.plan, self.calibration)  # type: ignore[arg-type]


def export_(options: Annotated[ExportOptions, tyro.conf.arg(name="")]) -> int:
    """Write a checkpoint's stages as ONNX graphs with weights beside them, and a manifest.

    Weights are read and written one at a time: memory holds little more than the largest of them.

    Args:
        options: what to export.
    """
    try:
        from ..export import export, weights_of_checkpoint
    except ImportError as error:
        raise ImportError(f"exporting needs onnx and onnx-ir: pip install 'turbo-pi[onnx]' ({error})") from error
    from ..checkpoint import open_checkpoint

    console = Console(soft_wrap=True)
    checkpoint = open_checkpoint(options.checkpoint)
    spec = options.spec(checkpoint.config.max_tokens)
    with console.status("reading weights") as status:
        weights = weights_of_checkpoint(checkpoint)
        quantisation = options.quantisation(weights)
        manifest = export(weights, spec, options.out, quantisation, status.update)
    console.print(graph_table(manifest))
    console.print(f"wrote {options.out}: {sum(f.bytes for f in manifest.files.values()) / 1e6:,.1f} MB of weights")
    return 0


def graph_table(manifest: Manifest) -> Table:
    """What was written, and what surgery did."""
    table = Table("graph", "prompt slots", "inputs", "outputs", "surgery", title="ONNX graphs")
    for graph in manifest.graphs:
        done = "; ".join(
            f"{p['pass']}: {p['nodes_before']} to {p['nodes_after']} nodes" for p in manifest.surgery[graph.file]
        )
        ports = [f"{len(ports)}, {', '.join(p.name for p in ports[-2:])}" for ports in (graph.inputs, graph.outputs)]
        table.add_row(graph.file, str(graph.prompt_bucket or "-"), *ports, done)
    return table
