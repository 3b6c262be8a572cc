"""Attention of many queries over a cache of valid keys that share one key head, by `prefix_attention.cu`, on Hopper.

The same call as `attention`, and the same result; what this kernel does not run, that one does.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ._common import cdiv
from ._fp8 import E4M3, check_inverse
from ._wgmma import BARRIER_BYTES, GROUP, Box, box, sums, wgmma_obstacles
from .attention import LOG2_E, check_attention
from .cuda_module import CudaModule, Launch
from .tuning import PrefixAttentionConfig, tuned

SOURCE = Path(__file__).with_name("prefix_attention.cu")
TILE = 64
"""Rows of a CTA: queries times heads. Keys of a block."""
HEAD_DIM = 256
"""The only one that was tried; the source would take 64, 128 and 192 too."""


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("queries", Box),
        ("keys", Box),
        ("values", Box),
        ("lengths", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("slots", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("inverse", ctypes.c_float),
        ("up_to_64", ctypes.c_uint8 * 32),
    ]


def attention_misfits(kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Why `prefix_attention` runs no call of such a model there; empty if it does."""
    found = wgmma_obstacles(dtype, device)
    if (kv_heads, head_dim) != (1, HEAD_DIM):
        found.append(f"{kv_heads} key heads of {head_dim}, not one of {HEAD_DIM}")
    return found


def prefix_attention_config(like: Tensor, rows: int, head_dim: int) -> PrefixAttentionConfig | None:
    """The config that was measured to be faster than `attention` on this GPU, in this dtype; None where none was.

    `like` is on the GPU; `rows` are queries of a sample times heads.
    """
    return tuned("prefix_attention", PrefixAttentionConfig, like, (rows, head_dim))


def prefix_attention_obstacles(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None, out: Tensor
) -> list[str]:
    """Why `prefix_attention` does not run such a call; empty if it does."""
    found = attention_misfits(keys.shape[1], keys.shape[3], q.dtype, q.device)
    if not all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (q, keys, values, out)):
        found.append("tensors with gaps")
    if out.dtype not in (torch.bfloat16, E4M3):
        found.append(f"a result in {out.dtype}")
    return found if lengths is not None else [*found, "no lengths"]


def definitions(head_dim: int, slots: int, e4m3: bool) -> dict[str, int | str]:
    """For the compiler, operands of its wgmmas among them."""
    logits, logit_operands, query = sums(TILE)
    registers, operands, weight = sums(head_dim)
    weights = ", ".join(f"%{weight + i}" for i in range(4))
    return {
        "D": head_dim,
        "SLOTS": slots,
        "E4M3": int(e4m3),
        "LOGITS_REGISTERS": logits,
        "LOGITS_OPERANDS": logit_operands,
        "LOGITS_INPUTS": f'"%{query}, %{query + 1}"',
        "LOGITS_ADD": f'"%{query + 2}"',
        "SUMS_REGISTERS": registers,
        "SUMS_OPERANDS": operands,
        "SUMS_INPUTS": f'"{{{weights}}}, %{weight + 4}"',
    }


@cache
def _module(head_dim: int, slots: int, e4m3: bool, device: torch.device) -> CudaModule:
    return CudaModule(SOURCE, definitions(head_dim, slots, e4m3), device)


def prefix_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    rows_per_sample: int,
    scale: float = 1.0,
    config: PrefixAttentionConfig | None = None,
    inverse: float = 1.0,
) -> None:
    """As `attention`, whose twin is this one's too: q (B*N, H*d), keys and values (B, 1, slots, d), lengths (B,) int32.

    Raises ValueError where shapes do not fit, and for what `prefix_attention_obstacles` names.
    """
    shape = check_attention(q, keys, values, lengths, out, rows_per_sample)
    check_inverse(out, inverse)
    if found := prefix_attention_obstacles(q, keys, values, lengths, out):
        raise ValueError(f"the prefix attention cannot run: {'; '.join(found)}")
    assert lengths is not None
    rows, head_dim = rows_per_sample * shape.heads, shape.head_dim
    config = config or prefix_attention_config(q, rows, head_dim) or PrefixAttentionConfig()
    module = _module(head_dim, config.slots, out.dtype == E4M3, q.device)
    boxes = [box(module, t.view(-1, head_dim), TILE, TILE) for t in (q, keys, values)]
    arguments = _Arguments(*boxes, lengths.data_ptr(), out.data_ptr(), rows, shape.slots, scale * LOG2_E, inverse)
    shared = (1 + config.slots) * TILE * head_dim * 2 + (config.slots + 1) * BARRIER_BYTES
    module.launch("prefix_attention", arguments, Launch(shape.batch * cdiv(rows, TILE), 3 * GROUP, shared))
