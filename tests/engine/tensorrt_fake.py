"""A stand-in for the module `tensorrt`, with the names and signatures of its documented Python API (10.x and 11.x).

It proves that the engine asks for things that exist, in an order that makes sense, and that pointers and shapes are
right: a "plan" is the ONNX file's path, and running it means ONNX Runtime over the addresses that were set. It proves
nothing of TensorRT itself.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

import onnxruntime as ort


class FakeTensorRT:
    """What `import tensorrt as trt` gives. `calls` is what was asked of it; the flags below make it fail."""

    def __init__(self, version: str = "10.13.2.6") -> None:
        self.__version__ = version
        self.calls: list[tuple[Any, ...]] = []
        self.parses = self.builds = self.loads = self.runs = True
        self.timing_cache_fits = True
        self.extra_tensor = False
        fake = self

        class Logger:
            WARNING = 2

            def __init__(self, min_severity: int) -> None:
                self.min_severity = min_severity

        class NetworkDefinitionCreationFlag(enum.IntEnum):
            STRONGLY_TYPED = 1

        class MemoryPoolType(enum.Enum):
            WORKSPACE = 0

        class TensorIOMode(enum.Enum):
            NONE = 0
            INPUT = 1
            OUTPUT = 2

        class Builder:
            def __init__(self, logger: Logger) -> None:
                assert isinstance(logger, Logger)

            def create_network(self, flags: int = 0) -> dict[str, Any]:
                fake.calls.append(("create_network", flags))
                return {"flags": flags}

            def create_builder_config(self) -> BuilderConfig:
                return BuilderConfig()

            def build_serialized_network(self, network: dict[str, Any], config: BuilderConfig) -> HostMemory | None:
                fake.calls.append(("build", network["path"], config.pools))
                return HostMemory(json.dumps({"onnx": network["path"]}).encode()) if fake.builds else None

        class HostMemory(bytes):
            """TensorRT's gives its bytes through the buffer protocol."""

        class TimingCache:
            def __init__(self, known: bytes) -> None:
                self.known = known

            def serialize(self) -> HostMemory:
                return HostMemory(self.known + b"measured")

        class BuilderConfig:
            def __init__(self) -> None:
                self.pools: dict[MemoryPoolType, int] = {}
                self.cache: TimingCache | None = None

            def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
                self.pools[pool] = pool_size

            def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
                return TimingCache(serialized_timing_cache)

            def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
                fake.calls.append(("timing cache", cache.known))
                fits = fake.timing_cache_fits or not cache.known
                self.cache = cache if fits else self.cache
                return fits

            def get_timing_cache(self) -> TimingCache:
                assert self.cache is not None
                return self.cache

        class ParserError:
            def desc(self) -> str:
                return "unknown operator"

        class OnnxParser:
            num_errors = 1

            def __init__(self, network: dict[str, Any], logger: Logger) -> None:
                self._network = network

            def parse_from_file(self, model: str) -> bool:
                self._network["path"] = model
                return fake.parses

            def get_error(self, index: int) -> ParserError:
                assert index == 0
                return ParserError()

        class Runtime:
            def __init__(self, logger: Logger) -> None:
                assert isinstance(logger, Logger)

            def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None:
                return CudaEngine(json.loads(serialized_engine)["onnx"]) if fake.loads else None

        class CudaEngine:
            def __init__(self, path: str) -> None:
                options = ort.SessionOptions()
                options.log_severity_level = 3
                self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                self._inputs = {port.name: port for port in self.session.get_inputs()}
                self._ports = {**self._inputs, **{port.name: port for port in self.session.get_outputs()}}

            @property
            def num_io_tensors(self) -> int:
                return len(self._ports) + fake.extra_tensor

            def get_tensor_name(self, index: int) -> str:
                return [*self._ports, "extra"][index]

            def get_tensor_mode(self, name: str) -> TensorIOMode:
                return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

            def get_tensor_shape(self, name: str) -> list[int]:
                return self._ports[name].shape if name in self._ports else [1]

            def create_execution_context(self) -> ExecutionContext | None:
                return ExecutionContext(self)

        class ExecutionContext:
            def __init__(self, engine: CudaEngine) -> None:
                self._engine = engine
                self._binding = engine.session.io_binding()
                self._left = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}

            def set_tensor_address(self, name: str, memory: int) -> bool:
                assert isinstance(memory, int)
                port = self._engine._ports[name]
                element = {"tensor(float)": 1, "tensor(int64)": 7}[port.type]
                bind = self._binding.bind_input if name in self._engine._inputs else self._binding.bind_output
                bind(name, "cpu", 0, element, port.shape, memory)
                self._left.discard(name)
                return True

            def execute_async_v3(self, stream_handle: int) -> bool:
                assert not self._left, f"no address for {self._left}"
                fake.calls.append(("execute", stream_handle))
                if fake.runs:
                    self._engine.session.run_with_iobinding(self._binding)
                return fake.runs

        self.Logger, self.Builder, self.OnnxParser, self.Runtime = Logger, Builder, OnnxParser, Runtime
        self.NetworkDefinitionCreationFlag = NetworkDefinitionCreationFlag
        self.MemoryPoolType, self.TensorIOMode = MemoryPoolType, TensorIOMode

    def named(self, what: str) -> list[tuple[Any, ...]]:
        """The calls of that name."""
        return [call for call in self.calls if call[0] == what]


def plans(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.plan"))
