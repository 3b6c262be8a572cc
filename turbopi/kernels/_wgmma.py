"""What the CUDA kernels on Hopper's warpgroup instructions share: where they run, and a wgmma's operands as text."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ._fp8 import E4M3
from .cuda_module import TENSOR_MAP_BYTES, CudaModule, can_compile

CAPABILITY = (9, 0)
"""Of the only GPUs that have these instructions."""
GROUP = 128
"""Threads of a warpgroup."""
SHARED_BYTES = 227 << 10
"""That a CTA may have."""
BARRIER_BYTES = 16
"""Of each slot of a ring."""
ROWS = 2 * GROUP
"""Weight rows of a tile of tiles.cuh."""
ROW_BYTES = 128
"""Of a row in a slot of its ring."""
MOST_TOKENS = 200
"""Of a tile. A thread has 240 registers, and its sums fill one for each token."""


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


def slot_bytes(tokens: int) -> int:
    """Of a slot of the ring of tiles.cuh."""
    return (ROWS + tokens) * ROW_BYTES + BARRIER_BYTES


def tile_definitions(tokens: int, slots: int, dtype: torch.dtype) -> dict[str, int | str]:
    """For the compiler, what tiles.cuh wants to know. Operands of a wgmma are counted out: the preprocessor cannot."""
    registers, operands, after = sums(tokens)
    return {
        "TOKENS": tokens,
        "SLOTS": slots,
        "E4M3": int(dtype == E4M3),
        "REGISTERS": registers,
        "OPERANDS": operands,
        "INPUTS": f'"%{after}, %{after + 1}"',
        "ADD": f'"%{after + 2}"',
    }


def wgmma_obstacles(dtype: torch.dtype, device: torch.device, e4m3: bool = False) -> list[str]:
    """Why these kernels do not run there, those with `e4m3` in E4M3 too; empty if they do."""
    dtypes = (torch.bfloat16, E4M3) if e4m3 else (torch.bfloat16,)
    found = [] if dtype in dtypes else [f"weights in {dtype}"]
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != CAPABILITY:
        found.append(f"no GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]}")
    elif not can_compile():
        found.append("cuda-bindings is not installed")
    return found
