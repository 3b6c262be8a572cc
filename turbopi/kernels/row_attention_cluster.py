"""`row_attention` in one launch for Hopper: a cluster of CTAs adds up the parts in its shared memory."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ._common import cdiv
from ._fp8 import E4M3
from ._wgmma import Box, box, wgmma_obstacles
from .attention import LOG2_E, Shape
from .cuda_module import CudaModule, Launch

SOURCE = Path(__file__).with_name("row_attention_cluster.cu")
HEAD_DIM = 256
PARTS = 8
"""CTAs of a cluster, as many as every GPU with clusters takes."""
ROWS, KEYS = 32, 128
"""Of a CTA."""
RUN, PIECE = 32, 64
"""Slots and dims of a copy."""
THREADS = 256
SMALL_BYTES = 2048
"""Barriers, maxima and sums in shared memory."""


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("queries", Box),
        ("keys", Box),
        ("values", Box),
        ("lengths", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("ahead", ctypes.c_void_p),
        ("ahead_bytes", ctypes.c_uint64),
        ("rows", ctypes.c_int),
        ("slots", ctypes.c_int),
        ("extra", ctypes.c_int),
        ("token_rows", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("inverse", ctypes.c_float),
        ("up_to_64", ctypes.c_uint8 * 8),
    ]


def cluster_misfits(
    kv_heads: int, head_dim: int, slots: int, dtype: torch.dtype, result: torch.dtype, device: torch.device
) -> list[str]:
    """Why this kernel does not attend in such a model there; empty if it does."""
    found = wgmma_obstacles(dtype, device)
    if (kv_heads, head_dim) != (1, HEAD_DIM):
        found.append(f"{kv_heads} key heads of {head_dim}, not one of {HEAD_DIM}")
    if slots > PARTS * KEYS:
        found.append(f"{slots} slots, more than {PARTS * KEYS}")
    if result not in (torch.bfloat16, E4M3):
        found.append(f"a result in {result}")
    return found


def obstacles(q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> list[str]:
    """Why this kernel does not run such a call; empty if it does. A fixed rule."""
    _, kv_heads, slots, head_dim = keys.shape
    found = cluster_misfits(kv_heads, head_dim, slots, q.dtype, out.dtype, q.device)
    if not all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (q, keys, values, out)):
        found.append("tensors with gaps")
    return found


def definitions(e4m3: bool) -> dict[str, int | str]:
    """For the compiler."""
    return {"D": HEAD_DIM, "PARTS": PARTS, "E4M3": int(e4m3)}


@cache
def _module(e4m3: bool, device: torch.device) -> CudaModule:
    return CudaModule(SOURCE, definitions(e4m3), device)


def launch(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    out: Tensor,
    shape: Shape,
    extra: int,
    state_token: bool,
    ahead: Tensor | None,
    inverse: float = 1.0,
) -> None:
    """`row_attention` where there are no `obstacles`, of a call that was checked. Needs no scratch."""
    module = _module(out.dtype == E4M3, q.device)
    boxes = [box(module, t.view(-1, HEAD_DIM), RUN, PIECE) for t in (q, keys, values)]
    rows = shape.rows_per_sample * shape.heads
    arguments = _Arguments(
        *boxes,
        lengths.data_ptr(),
        out.data_ptr(),
        0 if ahead is None else ahead.data_ptr(),
        0 if ahead is None else ahead.nbytes,
        rows,
        shape.slots,
        extra,
        shape.group if state_token else 0,
        LOG2_E,
        inverse,
    )
    shared = 2 * (2 * KEYS * HEAD_DIM + ROWS * HEAD_DIM + ROWS * KEYS) + SMALL_BYTES
    blocks = shape.batch * cdiv(rows, ROWS) * PARTS
    module.launch("row_attention_cluster", arguments, Launch(blocks, THREADS, shared, PARTS, dependent=True))
