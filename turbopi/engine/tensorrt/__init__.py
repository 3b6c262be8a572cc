"""The stages as TensorRT engines, built from the same ONNX graphs.

Written against TensorRT's documented Python API (10 and 11). TensorRT could not be run where this was built: the tests
hold it against a fake of that API only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...model import Pi0
from ...quant import Quantisation
from ..base import Precision, register_engine
from ..capture import CudaGraphRecorder, require_cuda

if TYPE_CHECKING:
    from ..graphs.engine import GraphEngine

PLANS = Path("~/.cache/turbo-pi/tensorrt")
"""Where built engines are kept, unless an export's directory is given: then beside its graphs."""


@register_engine("tensorrt", ("fp32", "bf16", "fp8", "int8"))
def create_tensorrt(
    model: Pi0, precision: Precision, quantisation: Quantisation | None = None, directory: str | None = None
) -> GraphEngine:
    """Exported graphs built by TensorRT for the GPU of the model; built ones are kept and used again.

    Args:
        model: on a CUDA GPU. With a directory it only says which checkpoint is meant.
        precision: of the products.
        quantisation: plan and calibration of quantised precisions.
        directory: what `turbo-pi export` wrote; None exports what is needed into a temporary directory.

    Raises:
        ImportError: TensorRT, or what exporting needs, is not installed.
        FileNotFoundError, CheckpointError: no export in the directory, a damaged one, or one of another checkpoint.
        ValueError: a model that is on no GPU, or a precision that is not the export's.
    """
    device = require_cuda(next(model.parameters()).device, "tensorrt")
    try:
        from ..graphs.engine import GraphEngine
        from ..graphs.source import open_graphs
    except ImportError as error:
        raise ImportError(
            f"the engine 'tensorrt' needs onnx and onnx-ir: pip install 'turbo-pi[onnx]' ({error})"
        ) from error
    from .api import load_tensorrt
    from .plans import PlanCache
    from .runtime import TensorrtRunner

    graphs = open_graphs(model, precision, quantisation, directory)
    plans = PlanCache(PLANS.expanduser() if directory is None else Path(directory) / "plans")
    runner = TensorrtRunner(load_tensorrt(), plans, device, CudaGraphRecorder(device))
    return GraphEngine("tensorrt", graphs, runner, precision, device)
