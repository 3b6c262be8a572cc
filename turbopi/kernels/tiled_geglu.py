"""Gate and up of a gated MLP with GeGLU behind them, one product of `tiled_geglu.cu`: many tokens, bfloat16, Hopper.

For GPUs of compute capability 9.0, whose warpgroup instructions no other has. What led to this form, and what it is
worth, is in docs/performance.md.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import aligned, cdiv, dense, multiprocessors
from ._wgmma import BARRIER_BYTES, GROUP, SHARED_BYTES, Box, box, sums, wgmma_obstacles
from .cuda_module import CudaModule, Launch

SOURCE = Path(__file__).with_name("tiled_geglu.cu")
ROWS = 2 * GROUP
"""Weight rows of a tile."""
BLOCK = 64
"""Of K, what a slot of the ring holds."""
MOST_SLOTS = 4
MOST_TOKENS = 200
"""Of a tile. A thread has 240 registers, and its sums fill one for each token."""
OVERHEAD = 24
"""What a tile costs beside its arithmetic, in tokens: so that few large tiles win over many small ones."""


@dataclass(frozen=True)
class Tiling:
    """How the tokens are cut.

    Attributes:
        tokens: of a tile, a multiple of 8.
        slots: of the ring.
    """

    tokens: int
    slots: int

    @staticmethod
    def fit(features: int, rows: int, ctas: int) -> Tiling:
        """With which so many CTAs take the shortest time for `rows` tokens by `features` weight rows, by count."""

        def cost(tokens: int) -> int:
            tiles = features // ROWS * cdiv(rows, tokens)
            return cdiv(tiles, ctas) * (tokens + OVERHEAD)

        tokens = min(range(MOST_TOKENS, 0, -8), key=cost)
        return Tiling(tokens, min(MOST_SLOTS, SHARED_BYTES // _slot_bytes(tokens)))

    @property
    def shared_bytes(self) -> int:
        """Shared memory as tiled_geglu.cu lays it out."""
        return self.slots * _slot_bytes(self.tokens)

    def tiles(self, features: int, rows: int) -> int:
        """Of `rows` tokens by `features` weight rows."""
        return features // ROWS * cdiv(rows, self.tokens)

    @property
    def definitions(self) -> dict[str, int | str]:
        """For the compiler. Operands of a wgmma are counted out here: the preprocessor cannot."""
        registers, operands, after = sums(self.tokens)
        return {
            "TOKENS": self.tokens,
            "SLOTS": self.slots,
            "REGISTERS": registers,
            "OPERANDS": operands,
            "INPUTS": f'"%{after}, %{after + 1}"',
            "ADD": f'"%{after + 2}"',
        }


def _slot_bytes(tokens: int) -> int:
    return (ROWS + tokens) * BLOCK * 2 + BARRIER_BYTES


@dataclass(frozen=True, eq=False)
class TiledGeglu:
    """Gate and up of a gated MLP in one matrix, rows in the order of `geglu_order`; `tile_geglu` makes it.

    Attributes:
        rows: (2F,K).
    """

    rows: Tensor


def geglu_order(features: int) -> Tensor:
    """Row order (features,) of gate, then up, such that one thread sums up both of two neighbouring units.

    Of a warpgroup's 128 rows: two blocks of 64, of which each of four warps has 8 rows of gate and the same 8 of up.
    """
    unit = torch.arange(features // 2).view(-1, 4, 8, 2)  # group, warp, g, block
    rows = torch.stack((unit, unit + features // 2), dim=-1)
    return rows.permute(0, 3, 1, 4, 2).flatten()


def geglu_obstacles(features: int, k: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Why `tiled_geglu` does not run a weight (features,K) there; empty if it does."""
    units = (("rows of gate and up", features, ROWS), ("columns", k, BLOCK))
    found = [f"{size} {name} are not a multiple of {unit}" for name, size, unit in units if size % unit]
    return found + wgmma_obstacles(dtype, device)


def tile_geglu(weight: Tensor) -> TiledGeglu:
    """weight (2F,K), gate then up, with its rows reordered. Raises ValueError unless 2F is a multiple of 256."""
    if len(weight) % ROWS:
        raise ValueError(f"weight has {len(weight)} rows, expected a multiple of {ROWS}")
    return TiledGeglu(weight[geglu_order(len(weight)).to(weight.device)].contiguous())


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("weights", Box),
        ("tokens", Box),
        ("hidden", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("up_to_64", ctypes.c_uint8 * 52),
    ]


@cache
def _module(features: int, k: int, tiling: Tiling, device: torch.device) -> CudaModule:
    return CudaModule(SOURCE, {"K": k, "N": features} | tiling.definitions, device)


def _check(x: Tensor, weight: TiledGeglu, out: Tensor) -> tuple[int, int, int]:
    features, k = dense("weight", weight.rows)
    rows, _ = dense("x", x, None, k)
    dense("out", out, rows, features // 2)
    return rows, features, k


def tiled_geglu_ref(x: Tensor, weight: TiledGeglu, out: Tensor) -> None:
    """Twin of `tiled_geglu`, anywhere and in any dtype."""
    rows, features, _ = _check(x, weight, out)
    both = torch.empty(rows, features, device=x.device)
    both[:, geglu_order(features).to(x.device)] = x.float() @ weight.rows.float().T
    gate, up = both.chunk(2, dim=-1)
    out.copy_(F.gelu(gate, approximate="tanh") * up)


def tiled_geglu(x: Tensor, weight: TiledGeglu, out: Tensor) -> None:
    """out (M,F) = tanh-GELU(x (M,K) · gateᵀ) * (x · upᵀ) in bfloat16; sums and GeGLU are in float32.

    The first call with a shape and a tiling compiles. Raises ValueError where shapes do not fit, and for what
    `geglu_obstacles` names.
    """
    rows, features, k = _check(x, weight, out)
    found = geglu_obstacles(features, k, weight.rows.dtype, weight.rows.device)
    if x.dtype != torch.bfloat16 or out.dtype != torch.bfloat16:
        found.append(f"x in {x.dtype} and out in {out.dtype}, not torch.bfloat16")
    elif not aligned(x, weight.rows, out):
        found.append("addresses that are not multiples of 16 bytes")
    if found:
        raise ValueError(f"the tiled product cannot run: {'; '.join(found)}")
    ctas = multiprocessors(x)
    tiling = Tiling.fit(features, rows, ctas)
    module = _module(features, k, tiling, x.device)
    boxes = box(module, weight.rows, ROWS, BLOCK), box(module, x, tiling.tokens, BLOCK)
    launch = Launch(min(ctas, tiling.tiles(features, rows)), ROWS + GROUP, tiling.shared_bytes)
    module.launch("tiled_geglu", _Arguments(*boxes, out.data_ptr(), rows), launch)
