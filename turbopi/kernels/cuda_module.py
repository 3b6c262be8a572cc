"""CUDA C++ kernels compiled at first use by NVRTC, for what Triton cannot express; the binary is kept on disk.

Needs a GPU and the `cuda-bindings` package that PyTorch's CUDA builds bring. No compiler has to be installed.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..files import write_whole

_log = logging.getLogger(__name__)

TENSOR_MAP_BYTES = 128


def cache_directory() -> Path:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/turbopi/kernels`, by default under `~/.cache`."""
    # Set to nothing it counts as not set, says the specification.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turbopi" / "kernels"


@dataclass(frozen=True)
class Launch:
    """Blocks in clusters of `cluster`, threads of a block, and its bytes of dynamic shared memory.

    `dependent`: it may start before the kernel in front of it has ended, and waits for that one itself.
    """

    blocks: int
    threads: int
    shared_bytes: int
    cluster: int = 1
    dependent: bool = False


class CudaModule:
    """One source, compiled for one device with one set of definitions.

    Args:
        source: a `.cu` file, its kernels `extern "C"`. What it includes lies beside it.
        definitions: preprocessor definitions, name to a number or to text, put in front of the source.
        device: the GPU.

    Raises:
        RuntimeError: `cuda-bindings` is missing, or the source does not compile; holds the compiler's words.
    """

    def __init__(self, source: Path, definitions: Mapping[str, int | str], device: torch.device) -> None:
        self._driver, self._nvrtc = _bindings()
        self.device = device
        torch.cuda.current_stream(device).synchronize()  # makes the device's context before the driver is asked
        major, minor = torch.cuda.get_device_capability(device)
        options = [f"--gpu-architecture=sm_{major}{minor}{'a' if major >= 9 else ''}", "--std=c++17"]
        text = defined(source, definitions).encode()
        with torch.cuda.device(device):
            self._module = self._load(text, options)
        self._functions: dict[str, Any] = {}

    def launch(self, name: str, arguments: ctypes.Structure, launch: Launch) -> None:
        """Put a kernel with one structure as its argument on the current stream."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        function = self._function(name, launch.shared_bytes)
        self._check(self._driver.cuLaunchKernelEx(self._config(launch), function, ctypes.addressof(pointers), 0))

    def tensor_map(self, matrix: Tensor, box_rows: int, box_columns: int) -> bytes:
        """128 bytes by which TMA copies boxes of a bfloat16 or E4M3 matrix to shared memory, swizzled over 128 bytes.

        What lies beyond the last row is zeros. The matrix's address and the distance of its rows are multiples of 16
        bytes.
        """
        driver = self._driver
        types = driver.CUtensorMapDataType
        kind = {2: types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 1: types.CU_TENSOR_MAP_DATA_TYPE_UINT8}[matrix.itemsize]
        encoded = self._check(
            driver.cuTensorMapEncodeTiled(
                kind,
                2,
                matrix.data_ptr(),
                [driver.cuuint64_t(size) for size in (matrix.shape[1], matrix.shape[0])],
                [driver.cuuint64_t(matrix.stride(0) * matrix.itemsize)],
                [driver.cuuint32_t(size) for size in (box_columns, box_rows)],
                [driver.cuuint32_t(1)] * 2,
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        )
        return ctypes.string_at(int(encoded.getPtr()), TENSOR_MAP_BYTES)

    def clusters(self, name: str, launch: Launch) -> int:
        """How many clusters of such a launch the device holds at once."""
        function = self._function(name, launch.shared_bytes)
        return int(self._check(self._driver.cuOccupancyMaxActiveClusters(function, self._config(launch))))

    def _config(self, launch: Launch) -> Any:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes = launch.shared_bytes
        config.hStream = torch.cuda.current_stream(self.device).cuda_stream
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster = attribute.value.clusterDim
        cluster.x, cluster.y, cluster.z = launch.cluster, 1, 1
        attributes = [attribute]
        if launch.dependent:
            attributes.append(driver.CUlaunchAttribute())
            attributes[1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[1].value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config

    def _function(self, name: str, shared_bytes: int) -> Any:
        if name not in self._functions:
            self._functions[name] = self._check(self._driver.cuModuleGetFunction(self._module, name.encode()))
        if shared_bytes > 48 << 10:
            limit = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._check(self._driver.cuFuncSetAttribute(self._functions[name], limit, shared_bytes))
        return self._functions[name]

    def _load(self, source: bytes, options: list[str]) -> Any:
        """The module from the binary that is kept; where there is none, or none that loads, it is compiled and kept."""
        version = self._check(self._nvrtc.nvrtcVersion())
        key = hashlib.sha256(repr((source, options, version)).encode()).hexdigest()[:32]
        path = cache_directory() / f"{key}.cubin"
        try:
            if path.exists():
                return self._check(self._driver.cuModuleLoadData(path.read_bytes()))
        except (OSError, RuntimeError) as error:
            _log.warning("%s does not load (%s): it is compiled anew", path, error)
        binary = self._compile(source, options)
        try:
            write_whole(path, binary)
        except OSError as error:
            _log.warning("%s cannot be kept (%s): every start compiles it anew", path, error)
        return self._check(self._driver.cuModuleLoadData(binary))

    def _compile(self, source: bytes, options: list[str]) -> bytes:
        nvrtc = self._nvrtc
        program = self._check(nvrtc.nvrtcCreateProgram(source, b"kernels.cu", 0, [], []))
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * self._check(nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"CUDA kernels do not compile with {' '.join(options)}:\n{log.decode(errors='replace')}")
        binary = b" " * self._check(nvrtc.nvrtcGetCUBINSize(program))
        self._check(nvrtc.nvrtcGetCUBIN(program, binary))
        nvrtc.nvrtcDestroyProgram(program)
        return binary

    @staticmethod
    def _check(answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if int(status) != 0:
            raise RuntimeError(f"the CUDA driver answered {status!r}")
        return values[0] if values else None


def defined(source: Path, definitions: Mapping[str, int | str]) -> str:
    """The source behind its definitions, with what it includes, all lines counted as in their files."""
    lines = [f"#define {name} {value}\n" for name, value in sorted(definitions.items())]
    return "".join(lines) + _with_included(source, set())


def _with_included(source: Path, seen: set[Path]) -> str:
    """The text of a source, each `#include` of a file beside it replaced by that file's, once: no path is searched."""
    seen.add(source)
    text = [f'#line 1 "{source.name}"\n']
    for number, line in enumerate(source.read_text().splitlines(keepends=True), 1):
        name = re.fullmatch(r'#include "([\w.]+)"\n', line)
        if name is None:
            text.append(line)
            continue
        included = source.with_name(name[1])
        text.append("" if included in seen else _with_included(included, seen))
        text.append(f'#line {number + 1} "{source.name}"\n')
    return "".join(text)


def can_compile() -> bool:
    """Whether the package that CUDA sources are compiled and launched through is installed."""
    try:
        return find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:
        return False


def _bindings() -> tuple[ModuleType, ModuleType]:
    try:
        return import_module("cuda.bindings.driver"), import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise RuntimeError(
            "the CUDA kernels need the package cuda-bindings, which PyTorch's CUDA builds bring; install it"
        ) from error
