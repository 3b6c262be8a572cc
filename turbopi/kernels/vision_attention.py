"""Attention of each image's tokens among themselves, by `vision_attention.cu`: SigLIP's heads of 72, bfloat16, Hopper.

For GPUs of compute capability 9.0, whose warpgroup instructions no other has. What this kernel does not run,
`attention` does. What it is worth is in docs/vision-prefix.md.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ._common import matrix, samples
from ._fp8 import E4M3, check_inverse, store_ref
from ._wgmma import GROUP, Box, box, sums, wgmma_obstacles
from .cuda_module import CudaModule, Launch
from .tuning import entries, key

SOURCE = Path(__file__).with_name("vision_attention.cu")
TILE = 64
"""Queries of a CTA; columns and rows of what TMA copies."""
HEAD_DIM = 72
"""64 dims for wgmma, 8 beside them."""
ROWS_PER_IMAGE = 256
"""Whose logits a warpgroup holds at once: of 224 by 224 pixels in patches of 14."""
SHARED_BYTES = 64 * 128 + 2 * ROWS_PER_IMAGE * HEAD_DIM * 2 + 3 * 8
"""As vision_attention.cu lays it out: queries without their last dims, keys, values, barriers."""
ALONE_BYTES = 115 << 10
"""Of which no multiprocessor has twice as many."""


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("boxes", Box),
        ("qkv", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("qkv_stride", ctypes.c_int),
        ("out_stride", ctypes.c_int),
        ("inverse", ctypes.c_float),
        ("up_to_64", ctypes.c_uint8 * 36),
    ]


def _check(qkv: Tensor, out: Tensor, heads: int, rows_per_image: int) -> tuple[int, int]:
    """Images, and a head's dims."""
    rows, width = matrix("out", out)
    matrix("qkv", qkv, rows, 3 * width)
    if heads < 1 or width % heads:
        raise ValueError(f"out is {width} wide, expected a multiple of {heads} heads")
    return samples("qkv", rows, rows_per_image), width // heads


def vision_attention_named(like: Tensor) -> bool:
    """Whether it was measured to be faster than `attention` on the GPU of `like`, in its dtype."""
    return key(like.dtype, (ROWS_PER_IMAGE, HEAD_DIM)) in entries("vision_attention", like)


def vision_attention_misfits(head_dim: int, rows_per_image: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Why `vision_attention` runs no call of such a model there; empty if it does."""
    found = wgmma_obstacles(dtype, device)
    if (head_dim, rows_per_image) != (HEAD_DIM, ROWS_PER_IMAGE):
        found.append(f"heads of {head_dim} and {rows_per_image} rows an image, not {HEAD_DIM} and {ROWS_PER_IMAGE}")
    return found


def vision_attention_obstacles(qkv: Tensor, out: Tensor, heads: int, rows_per_image: int) -> list[str]:
    """Why `vision_attention` does not run such a call; empty if it does."""
    found = vision_attention_misfits(out.shape[1] // heads, rows_per_image, qkv.dtype, qkv.device)
    if any(t.data_ptr() % 16 or t.stride(0) * t.itemsize % 16 for t in (qkv, out)):
        found.append("rows or addresses that are not multiples of 16 bytes")
    if out.dtype not in (torch.bfloat16, E4M3):
        found.append(f"a result in {out.dtype}")
    return found


def definitions(heads: int, e4m3: bool) -> dict[str, int | str]:
    """For the compiler, operands of its wgmmas among them."""
    logits, logit_operands, query = sums(ROWS_PER_IMAGE // 2)
    registers, operands, weight = sums(TILE)
    weights = ", ".join(f"%{weight + i}" for i in range(4))
    return {
        "HEADS": heads,
        "KEYS": ROWS_PER_IMAGE,
        "HALF_KEYS": ROWS_PER_IMAGE // 2,
        "E4M3": int(e4m3),
        "LOGITS_REGISTERS": logits,
        "LOGITS_OPERANDS": logit_operands,
        "LOGITS_INPUTS": f'"%{query}, %{query + 1}"',
        "SUMS_REGISTERS": registers,
        "SUMS_OPERANDS": operands,
        "SUMS_INPUTS": f'"{{{weights}}}, %{weight + 4}"',
    }


@cache
def _module(heads: int, e4m3: bool, device: torch.device) -> CudaModule:
    return CudaModule(SOURCE, definitions(heads, e4m3), device)


def vision_attention_ref(
    qkv: Tensor, out: Tensor, heads: int, rows_per_image: int, inverse: float = 1.0, early: bool = False
) -> None:
    """Twin of `vision_attention`, anywhere and for any sizes."""
    images, head_dim = _check(qkv, out, heads, rows_per_image)
    q, k, v = qkv.float().view(images, rows_per_image, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    attended = (q @ k.transpose(2, 3)).softmax(-1) @ v
    store_ref(attended.transpose(1, 2).reshape(out.shape), out, inverse)


def vision_attention(
    qkv: Tensor, out: Tensor, heads: int, rows_per_image: int, inverse: float = 1.0, early: bool = False
) -> None:
    """qkv (n·S,3·W): q, k, v one after the other, q scaled by head_dim^-0.5 -> out (n·S,W), softmax in float32.

    Rows of an image see those of the same image. `out` in E4M3 holds the result times `inverse`, saturated. `early`: it
    is launched before the kernel in front has ended, one CTA a multiprocessor, or they would crowd where room is first.
    Raises ValueError where shapes do not fit, and for what `vision_attention_obstacles` names.
    """
    images, _ = _check(qkv, out, heads, rows_per_image)
    check_inverse(out, inverse)
    if found := vision_attention_obstacles(qkv, out, heads, rows_per_image):
        raise ValueError(f"the vision attention cannot run: {'; '.join(found)}")
    module = _module(heads, out.dtype == E4M3, qkv.device)
    addresses = [t.data_ptr() for t in (qkv, out)]
    sizes = (qkv.stride(0), out.stride(0))
    blocks = images * heads * (rows_per_image // TILE)
    launch = Launch(blocks, GROUP, ALONE_BYTES if early else SHARED_BYTES, dependent=early)
    module.launch("vision_attention", _Arguments(box(module, qkv, TILE, TILE), *addresses, *sizes, inverse), launch)
