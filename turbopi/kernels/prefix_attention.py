"""Attention of many queries over a cache of valid keys that share one key head, by `prefix_attention.cu`, on Hopper.

The same call as `attention`, and the same result; what this kernel does not run, that one does.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ._common import cdiv
from ._fp8 import E4M3, check_inverse
from ._wgmma import BARRIER_BYTES, GROUP, SHARED_BYTES, Box, box, sums, wgmma_obstacles
from .attention import LOG2_E, check_attention
from .cuda_module import CudaModule, Launch
from .tuning import PrefixAttentionConfig, tuned

SOURCE = Path(__file__).with_name("prefix_attention.cu")
ROWS, TILE = 128, 64
"""Rows of a cluster: queries times heads. Rows and dims of a copy."""
HEAD_DIM = 256
"""The only one that was tried; the source would take 128 too."""
WARPS = ROWS // 16
QUERY_BYTES, STATS_BYTES = ROWS * HEAD_DIM * 2, 512
"""Of a CTA in shared memory; of what it gets beside a warp's sums."""
LEAST_KEYS, MOST_KEYS = 128, 208
"""Of one of three CTAs, all at once: what it is sent takes the place of some; logits and weights fill registers."""
MOST_OF_MANY = 128
"""Keys at once beside sums that are kept."""


@dataclass(frozen=True)
class Tiling:
    """CTAs of a cluster, among which the keys are divided; keys at once; whether a CTA may have more than those."""

    parts: int
    keys: int
    many: bool

    @staticmethod
    def fit(rows: int, batch: int, slots: int, multiprocessors: int) -> Tiling:
        """For so many rows, and slots of keys, of each sample."""
        clusters = batch * cdiv(rows, ROWS)
        # Of its 132 multiprocessors an H200 has 39 clusters of three at once, and 66 of two.
        if 44 * clusters <= 13 * multiprocessors and slots <= 3 * MOST_KEYS:
            return Tiling(3, max(cdiv(cdiv(slots, 3), 16) * 16, LEAST_KEYS), False)
        parts = 2 if 2 * clusters <= multiprocessors else 1
        each = cdiv(slots, parts)
        return Tiling(parts, cdiv(cdiv(each, cdiv(each, MOST_OF_MANY)), 16) * 16, True)

    @property
    def received(self) -> int:
        """Warps' sums that a CTA gets from others, at most."""
        return cdiv(WARPS, self.parts) * (self.parts - 1)

    @property
    def slot_bytes(self) -> int:
        """Of the ring, with its barriers."""
        return self.keys * TILE * 2 + BARRIER_BYTES

    @property
    def slots(self) -> int:
        """Of the ring: an even number; without a next block, as many as can ever be waiting."""
        room = SHARED_BYTES - QUERY_BYTES - self.received * STATS_BYTES - (1 + WARPS) * 8
        return min(room // self.slot_bytes // 2 * 2, 12 if self.many else 6)

    @property
    def shared_bytes(self) -> int:
        """Queries, the ring, maxima and masses, barriers."""
        return QUERY_BYTES + self.slots * self.slot_bytes + self.received * STATS_BYTES + (1 + WARPS) * 8


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


def definitions(tiling: Tiling, columns: int, e4m3: bool) -> dict[str, int | str]:
    """For the compiler, operands of its wgmmas among them."""
    logits, logit_operands, query = sums(tiling.keys)
    registers, operands, weight = sums(columns)
    weights = ", ".join(f"%{weight + i}" for i in range(4))
    return {
        "D": HEAD_DIM,
        "PARTS": tiling.parts,
        "KEYS": tiling.keys,
        "MANY": int(tiling.many),
        "SLOTS": tiling.slots,
        "COLUMNS": columns,
        "E4M3": int(e4m3),
        "LOGITS_REGISTERS": logits,
        "LOGITS_OPERANDS": logit_operands,
        "LOGITS_INPUTS": f'"%{query}, %{query + 1}"',
        "LOGITS_ADD": f'"%{query + 2}"',
        "SUMS_REGISTERS": registers,
        "SUMS_OPERANDS": operands,
        "SUMS_INPUTS": f'"{{{weights}}}, %{weight + 4}"',
        "SUMS_ADD": f'"%{weight + 5}"',
    }


@cache
def _module(tiling: Tiling, columns: int, e4m3: bool, device: torch.device) -> CudaModule:
    return CudaModule(SOURCE, definitions(tiling, columns, e4m3), device)


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
    tiling: Tiling | None = None,
) -> None:
    """As `attention`, whose twin is this one's too: q (B*N, H*d), keys and values (B, 1, slots, d), lengths (B,) int32.

    Raises ValueError where shapes do not fit, for a scale that is not positive, and for what
    `prefix_attention_obstacles` names.
    """
    shape = check_attention(q, keys, values, lengths, out, rows_per_sample)
    check_inverse(out, inverse)
    found = prefix_attention_obstacles(q, keys, values, lengths, out)
    if scale <= 0.0:
        found.append(f"a scale of {scale}, expected a positive one")
    if found:
        raise ValueError(f"the prefix attention cannot run: {'; '.join(found)}")
    assert lengths is not None
    rows = rows_per_sample * shape.heads
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    tiling = tiling or Tiling.fit(rows, shape.batch, shape.slots, multiprocessors)
    config = config or prefix_attention_config(q, rows, HEAD_DIM) or PrefixAttentionConfig()
    module = _module(tiling, config.columns, out.dtype == E4M3, q.device)
    boxes = [
        box(module, t.view(-1, HEAD_DIM), n, TILE) for t, n in ((q, TILE), (keys, tiling.keys), (values, tiling.keys))
    ]
    arguments = _Arguments(*boxes, lengths.data_ptr(), out.data_ptr(), rows, shape.slots, scale * LOG2_E, inverse)
    blocks = shape.batch * cdiv(rows, ROWS) * tiling.parts
    module.launch("prefix_attention", arguments, Launch(blocks, 3 * GROUP, tiling.shared_bytes, tiling.parts))
