"""A built engine over tensors of ours, on PyTorch's stream, replayed as a CUDA graph."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...export import GraphInfo
from ...export.files import sha256
from ..capture import Recorder
from ..graphs.source import FoundGraph, torch_dtype
from .api import PlanKey, gpu_facts
from .build import BuildOptions, build_plan
from .plans import PlanCache


class BoundPlan:
    """An engine with its execution context and static tensors; see `BoundGraph`.

    Raises CheckpointError if the engine's tensors are not those of the graph that it should have been built from.
    """

    def __init__(
        self,
        trt: Any,
        plan: bytes,
        info: GraphInfo,
        device: torch.device,
        given: Mapping[str, Tensor],
        recorder: Recorder | None,
    ) -> None:
        self.device = device
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        # The logger must outlive the engine.
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._engine = trt.Runtime(self._logger).deserialize_cuda_engine(plan)
        if self._engine is None:
            raise CheckpointError(
                f"TensorRT {trt.__version__} cannot load the engine of {info.file}: built by another version or for "
                "another GPU; remove it to build anew"
            )
        self._check_tensors(trt, info)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise RuntimeError(f"{device} has too little memory for the TensorRT engine of {info.file}")
        for ports, tensors in ((info.inputs, self.inputs), (info.outputs, self.outputs)):
            for port in ports:
                shape, dtype = port.shape, torch_dtype(port.dtype)
                here = given.get(port.name) if tensors is self.inputs else None
                tensors[port.name] = torch.zeros(shape, dtype=dtype, device=device) if here is None else here
                self._context.set_tensor_address(port.name, tensors[port.name].data_ptr())
        self.run = self._launch if recorder is None else recorder.record(self._launch)

    def _check_tensors(self, trt: Any, info: GraphInfo) -> None:
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        shapes = {name: tuple(self._engine.get_tensor_shape(name)) for name in names}
        wanted_modes = {p.name: True for p in info.inputs} | {p.name: False for p in info.outputs}
        wanted_shapes = {port.name: port.shape for port in (*info.inputs, *info.outputs)}
        if modes != wanted_modes or shapes != wanted_shapes:
            raise CheckpointError(
                f"the TensorRT engine of {info.file} has other tensors than the graph: {sorted(shapes.items())[:3]}, "
                f"expected {sorted(wanted_shapes.items())[:3]}; remove it to build anew"
            )

    def _launch(self) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if not self._context.execute_async_v3(stream):
            raise RuntimeError("TensorRT refused to run an engine; its log says why")


class TensorrtRunner:
    """Builds and opens graphs in TensorRT.

    Args:
        trt: TensorRT's module.
        plans: where built engines are kept.
        device: a CUDA GPU.
        recorder: what captures a run; None launches it anew each time.
        options: of building; None has the cache's own timing file.
    """

    def __init__(
        self,
        trt: Any,
        plans: PlanCache,
        device: torch.device,
        recorder: Recorder | None,
        options: BuildOptions | None = None,
    ) -> None:
        self.trt = trt
        self.plans = plans
        self.device = device
        self.recorder = recorder
        self.options = options or BuildOptions(timing_cache=plans.timing_cache)
        self._gpu, self._capability = gpu_facts(device)

    def open(self, found: FoundGraph, given: Mapping[str, Tensor]) -> BoundPlan:
        """See `GraphRunner`."""
        weights = hashlib.sha256("".join(found.weights).encode()).hexdigest()
        key = PlanKey(self._gpu, self._capability, self.trt.__version__, sha256(found.path), weights)
        plan = self.plans.get(key, lambda: build_plan(self.trt, found.path, self.options))
        return BoundPlan(self.trt, plan, found.info, self.device, given, self.recorder)

    def describe(self) -> dict[str, Any]:
        """See `GraphRunner`."""
        return {
            "tensorrt": self.trt.__version__,
            "gpu": self._gpu,
            "plans": str(self.plans.directory),
            "cuda_graphs": self.recorder is not None,
        }
