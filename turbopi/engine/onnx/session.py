"""One graph in ONNX Runtime, bound to tensors of ours: nothing is allocated or copied by a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from ...errors import CheckpointError
from ...export import GraphInfo
from ..graphs.source import FoundGraph, torch_dtype

_ELEMENTS = {"float": 1, "int8": 3, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}
"""ONNX's numbers of element types, by the manifest's names."""


def providers(device: torch.device, stream: torch.cuda.Stream | None) -> list[tuple[str, dict[str, Any]]]:
    """ONNX Runtime's way to compute on a device; on a GPU on the given stream.

    Raises ValueError if this installation has none: it would fall back to the CPU by itself otherwise.
    """
    if device.type == "cpu":
        return [("CPUExecutionProvider", {})]
    check_cuda(device)
    handle = "0" if stream is None else str(stream.cuda_stream)
    # Float32 products are float32 unless told otherwise: ONNX Runtime would round their operands to TF32.
    options = {"device_id": device.index or 0, "user_compute_stream": handle, "use_tf32": "0"}
    return [("CUDAExecutionProvider", options)]


def check_cuda(device: torch.device) -> None:
    """Raise ValueError unless this installation of ONNX Runtime computes on CUDA GPUs."""
    if device.type != "cuda" or "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ValueError(
            f"ONNX Runtime {ort.__version__} has no provider for the device {device} here, only "
            f"{', '.join(ort.get_available_providers())}; install onnxruntime-gpu instead of onnxruntime, or load the "
            "model on 'cpu'"
        )


def open_session(
    path: Path,
    device: torch.device,
    stream: torch.cuda.Stream | None = None,
    *,
    eight_bit_floats: bool,
    bfloat16: bool = False,
) -> ort.InferenceSession:
    """A session over a graph's file, which holds fp8 or bfloat16 values or does not.

    Raises CheckpointError if the file or its weights cannot be read, ValueError if an operator cannot be run here or
    the GPU cannot be used.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Waiting threads that spin take the cores that the robot's other work needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if eight_bit_floats:
        # ONNX Runtime 1.31 takes fp8's Q/DQ for int8's and refuses the graph that it makes of them.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # It joins int8 products with their biases into a Gemm of types that ONNX Runtime 1.31 then refuses.
    disabled = ["MatMulAddFusion"]
    if bfloat16:
        # It joins float32 norms with bfloat16 scales into one node, for which the CUDA provider has no kernel.
        disabled.append("SimplifiedLayerNormFusion")
    asked = providers(device, stream)
    try:
        session = ort.InferenceSession(
            str(path), options, providers=asked, disabled_optimizers=disabled, enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's own exceptions share no other base, and some are bare RuntimeErrors
        if not type(error).__module__.startswith("onnxruntime") and not isinstance(error, RuntimeError):
            raise
        raise _explained(error, path, device) from error
    if asked[0][0] not in session.get_providers():
        # It goes on without a provider whose library it cannot load, and would take the GPU's addresses for the host's.
        raise ValueError(
            f"ONNX Runtime {ort.__version__} could not load its provider for {device}; it needs the CUDA and cuDNN "
            "libraries of the release that it was built for (onnxruntime.print_debug_info() names them): install "
            "those, or load the model on 'cpu'"
        )
    return session


def _explained(error: Exception, path: Path, device: torch.device) -> Exception:
    """What ONNX Runtime's refusal of a graph means."""
    if "NOT_IMPLEMENTED" in str(error) or "Failed to find kernel" in str(error):
        return ValueError(
            f"ONNX Runtime cannot run {path.name} on {device.type!r}: {error}; choose another precision, such as 'fp32'"
        )
    if "CUDA failure" in str(error):
        return ValueError(f"ONNX Runtime cannot use {device} for {path.name}: {error}; load the model on 'cpu'")
    return CheckpointError(f"ONNX Runtime cannot read {path}: {error}; export again, or copy it")


class BoundSession:
    """A graph with tensors of ours as inputs and outputs; see `BoundGraph`.

    Args:
        session: over the graph.
        info: its ports.
        device: where the tensors lie.
        given: inputs that lie somewhere already, such as another graph's outputs.
        stream: on which the session computes; None on a CPU.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        info: GraphInfo,
        device: torch.device,
        given: Mapping[str, Tensor],
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._stream = stream
        self.session = session
        self.device = device
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._binding = session.io_binding()
        for port in info.inputs:
            tensor = given.get(port.name)
            if tensor is None:
                tensor = torch.zeros(port.shape, dtype=torch_dtype(port.dtype), device=device)
            self.inputs[port.name] = tensor
            self._bind(self._binding.bind_input, port.name, port.dtype, tensor)
        for port in info.outputs:
            self.outputs[port.name] = torch.zeros(port.shape, dtype=torch_dtype(port.dtype), device=device)
            self._bind(self._binding.bind_output, port.name, port.dtype, self.outputs[port.name])

    def _bind(self, bind: Any, name: str, dtype: str, tensor: Tensor) -> None:
        bind(name, self.device.type, self.device.index or 0, _ELEMENTS[dtype], tuple(tensor.shape), tensor.data_ptr())

    def run(self) -> None:
        """Compute the outputs from the inputs; on a GPU after what the current stream was asked for.

        ONNX Runtime waits for its stream at the end of a run, and must. Told not to, it keeps the pinned memory of all
        runs until the session goes, and frees it from a callback of the stream: CUDA forbids that, the process ends.
        """
        if self._stream is None:
            self.session.run_with_iobinding(self._binding)
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        self.session.run_with_iobinding(self._binding)
        current.wait_stream(self._stream)


class OnnxRunner:
    """Opens graphs in ONNX Runtime. Raises ValueError if it has no provider for the device."""

    def __init__(self, device: torch.device, *, eight_bit_floats: bool) -> None:
        self.device = device
        self.eight_bit_floats = eight_bit_floats
        self._stream: torch.cuda.Stream | None = None
        if device.type != "cpu":
            check_cuda(device)
            # A stream of its own: torch's default stream has the handle 0, which ONNX Runtime takes for none.
            self._stream = torch.cuda.Stream(device)

    def open(self, found: FoundGraph, given: Mapping[str, Tensor]) -> BoundSession:
        """See `GraphRunner`."""
        ports = (*found.info.inputs, *found.info.outputs)
        session = open_session(
            found.path,
            self.device,
            self._stream,
            eight_bit_floats=self.eight_bit_floats,
            bfloat16=any(port.dtype == "bfloat16" for port in ports),
        )
        return BoundSession(session, found.info, self.device, given, self._stream)

    def describe(self) -> dict[str, Any]:
        """See `GraphRunner`."""
        provider = providers(self.device, self._stream)[0][0]
        return {"onnxruntime": ort.__version__, "provider": provider, "threads": torch.get_num_threads()}
