"""Triton where it is installed; elsewhere a stand-in that says how to get it at the first launch.

The twins need no Triton, so importing `turbopi.kernels` must work on every machine.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NoReturn

from ._common import aligned

INSTALLED = importlib.util.find_spec("triton") is not None
MESSAGE = (
    "the Triton kernels need the package 'triton', which is not installed here; expected Linux with a CUDA GPU: "
    "run `pip install 'turbo-pi[turbo]'`, or use the engine 'eager'"
)


class _MissingKernel:
    """What a kernel's name stands for without Triton: any launch raises."""

    def __getitem__(self, grid: object) -> NoReturn:
        raise ImportError(MESSAGE)


class _MissingTriton:
    """Just enough of `triton` and `triton.language` for the kernel files to import."""

    constexpr = object

    @staticmethod
    def jit(function: Callable[..., Any]) -> _MissingKernel:
        return _MissingKernel()


triton: Any = importlib.import_module("triton") if INSTALLED else _MissingTriton()
tl: Any = importlib.import_module("triton.language") if INSTALLED else _MissingTriton()
# Statements for NVIDIA's GPUs alone.
nvidia: Any = importlib.import_module("triton.language.extra.cuda") if INSTALLED else _MissingTriton()


def _gluon(name: str) -> Any:
    """A module of Gluon, in which kernels lay out their memory themselves."""
    return importlib.import_module(f"triton.experimental.gluon{name}") if GLUON else _MissingTriton()


# Gluon is experimental: 3.9 has other names. Its kernels run where they were written and measured, others elsewhere.
GLUON = INSTALLED and tuple(map(int, triton.__version__.split(".")[:2])) == (3, 6)
gluon: Any = _gluon("")
gl: Any = _gluon(".language")
hopper: Any = _gluon(".language.nvidia.hopper")
ampere: Any = _gluon(".language.nvidia.ampere")


def gluon_descriptor(tensor: Any, block: list[int]) -> Any:
    """`host_descriptor` for a Gluon kernel: rows of 128 bytes in shared memory, swizzled."""
    bits = 8 * tensor.itemsize
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=len(block))
    module = importlib.import_module("triton.experimental.gluon.nvidia.hopper")
    return module.TensorDescriptor.from_tensor(tensor, block, layout)


def host_descriptor(tensor: Any, block: list[int]) -> Any:
    """A TMA descriptor of a row-major matrix, made on the host and passed to the kernel by value.

    Raises ValueError where the matrix does not stand at multiples of 16 bytes.
    """
    if not INSTALLED:
        raise ImportError(MESSAGE)
    if not aligned(tensor):
        raise ValueError(
            f"a {tuple(tensor.shape)} {tensor.dtype} matrix with strides {tensor.stride()} does not stand at multiples "
            "of 16 bytes, which descriptors need: use a config without descriptors"
        )
    return importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor.from_tensor(tensor, block)
