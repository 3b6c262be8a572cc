"""The LayerNorm in `early_norm.cu`, for the products in E4M3 of `tiled_linear`: as early as they, a warp a row.

For GPUs of compute capability 9.0. `layer_norm_ref` is its twin.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ._common import aligned, cdiv, dense
from ._fp8 import E4M3
from ._wgmma import wgmma_obstacles
from .cuda_module import CudaModule, Launch

SOURCE = Path(__file__).with_name("early_norm.cu")
WARPS = 2
"""Rows of a CTA."""
PIECE = 8
"""Columns that a lane reads at once."""


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("inverse", ctypes.c_float),
    ]


@cache
def _module(width: int, device: torch.device) -> CudaModule:
    return CudaModule(SOURCE, {"WIDTH": width, "WARPS": WARPS}, device)


def early_norm_obstacles(x: Tensor, out: Tensor) -> list[str]:
    """Why `early_norm` does not run such a call; empty if it does."""
    found = wgmma_obstacles(x.dtype, x.device)
    if out.dtype != E4M3:
        found.append(f"a result in {out.dtype}")
    if x.shape[1] % PIECE or not aligned(x):
        found.append("rows or addresses that are not multiples of 16 bytes")
    return found


def early_norm(x: Tensor, out: Tensor, *, inverse: float = 1.0) -> None:
    """x (M,D) bfloat16 -> out (M,D) E4M3: (x - mean) * rsqrt(variance + 1e-6) * inverse, in float32, saturated.

    It is launched before the kernel in front has ended. Raises ValueError where shapes do not fit, and for what
    `early_norm_obstacles` names.
    """
    rows, width = dense("x", x)
    dense("out", out, rows, width)
    if found := early_norm_obstacles(x, out):
        raise ValueError(f"the early norm cannot run: {'; '.join(found)}")
    module = _module(width, x.device)
    launch = Launch(cdiv(rows, WARPS), 32 * WARPS, 0, dependent=True)
    module.launch("early_norm", _Arguments(x.data_ptr(), out.data_ptr(), rows, inverse), launch)
