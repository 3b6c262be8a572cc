"""What the CUDA kernels on Hopper's warpgroup instructions share: where they run, and a wgmma's operands as text."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cuda_module import TENSOR_MAP_BYTES, CudaModule, can_compile

CAPABILITY = (9, 0)
"""Of the only GPUs that have these instructions."""
GROUP = 128
"""Threads of a warpgroup."""
SHARED_BYTES = 227 << 10
"""That a CTA may have."""
BARRIER_BYTES = 16
"""Of each slot of a ring."""


class Box(ctypes.Structure):
    """A tensor map as part of a kernel's arguments."""

    _fields_ = [("words", ctypes.c_uint64 * (TENSOR_MAP_BYTES // 8))]


def box(module: CudaModule, matrix: Tensor, rows: int, columns: int) -> Box:
    """By which a kernel copies boxes of so many rows and columns."""
    return Box.from_buffer_copy(module.tensor_map(matrix, rows, columns))


def sums(columns: int) -> tuple[str, str, int]:
    """The sums of a product of 64 rows: as registers, as operands `d[i]` of an asm, and the number that comes next."""
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    return f'"{{{registers}}}"', ", ".join(f'"+f"(d[{i}])' for i in range(count)), count


def wgmma_obstacles(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Why these kernels do not run there; empty if they do."""
    found = [] if dtype == torch.bfloat16 else [f"weights in {dtype}"]
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != CAPABILITY:
        found.append(f"no GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]}")
    elif not can_compile():
        found.append("cuda-bindings is not installed")
    return found
