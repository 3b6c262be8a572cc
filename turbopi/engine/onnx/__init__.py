"""The stages as ONNX graphs, run by ONNX Runtime on a CPU or a CUDA GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...model import Pi0
from ...quant import Quantisation
from ..base import Precision, register_engine

if TYPE_CHECKING:
    from ..graphs.engine import GraphEngine

HINT = "the engine 'onnx' needs onnxruntime and onnx-ir: pip install 'turbo-pi[onnx]'"


@register_engine("onnx", ("fp32", "bf16", "fp8", "int8"))
def create_onnx(
    model: Pi0, precision: Precision, quantisation: Quantisation | None = None, directory: str | None = None
) -> GraphEngine:
    """Exported graphs in ONNX Runtime.

    Args:
        model: whose stages are run. With a directory it only says which checkpoint is meant.
        precision: of the products.
        quantisation: plan and calibration of quantised precisions.
        directory: what `turbo-pi export` wrote; None exports what is needed into a temporary directory.

    Raises:
        ImportError: ONNX Runtime is not installed.
        FileNotFoundError, CheckpointError: no export in the directory, a damaged one, or one of another checkpoint.
        ValueError: what ONNX Runtime cannot run on the model's device, or a precision that is not the export's.
    """
    try:
        from ..graphs.engine import GraphEngine
        from ..graphs.source import open_graphs
        from .session import OnnxRunner
    except ImportError as error:
        raise ImportError(f"{HINT} ({error})") from error
    device = next(model.parameters()).device
    if precision == "bf16" and device.type == "cpu" and directory is None:
        raise ValueError(
            "ONNX Runtime has no bfloat16 products on a CPU; use precision 'fp32', an export in fp16 "
            "(engine='onnx:DIRECTORY'), or load the model on 'cuda'"
        )
    graphs = open_graphs(model, precision, quantisation, directory)
    runner = OnnxRunner(device, eight_bit_floats=graphs.eight_bit_floats)
    return GraphEngine("onnx", graphs, runner, precision, device)
