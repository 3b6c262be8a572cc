"""Gate and up of a gated MLP with GeGLU behind them, one product of `tiled_geglu.cu`: many tokens, on Hopper.

For GPUs of compute capability 9.0, whose warpgroup instructions no other has. What led to this form, and what it is
worth, is in docs/vision-prefix.md.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import aligned, cdiv, dense, multiprocessors, vector
from ._fp8 import E4M3, check_inverse, store_ref
from ._wgmma import (
    GROUP,
    MOST_TOKENS,
    ROW_BYTES,
    ROWS,
    SHARED_BYTES,
    Box,
    box,
    slot_bytes,
    tile_definitions,
    wgmma_obstacles,
)
from .cuda_module import CudaModule, Launch

SOURCE = Path(__file__).with_name("tiled_geglu.cu")
MOST_SLOTS = 4
OVERHEAD = {torch.bfloat16: 24, E4M3: 48}
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
    def fit(features: int, rows: int, ctas: int, dtype: torch.dtype = torch.bfloat16) -> Tiling:
        """With which so many CTAs take the shortest time for `rows` tokens by `features` weight rows, by count."""

        def cost(tokens: int) -> int:
            tiles = features // ROWS * cdiv(rows, tokens)
            return cdiv(tiles, ctas) * (tokens + OVERHEAD[dtype])

        tokens = min(range(MOST_TOKENS, 0, -8), key=cost)
        return Tiling(tokens, min(MOST_SLOTS, SHARED_BYTES // slot_bytes(tokens)))

    @property
    def shared_bytes(self) -> int:
        """Shared memory as tiled_geglu.cu lays it out."""
        return self.slots * slot_bytes(self.tokens)

    def tiles(self, features: int, rows: int) -> int:
        """Of `rows` tokens by `features` weight rows."""
        return features // ROWS * cdiv(rows, self.tokens)


@dataclass(frozen=True, eq=False)
class TiledGeglu:
    """Gate and up of a gated MLP in one matrix, rows in the order of `geglu_order`; `tile_geglu` makes it.

    Attributes:
        rows: (2F,K) in bfloat16, or E4M3.
        scale: (2F,) float32, by which E4M3's sums are multiplied, in the same order; else None.
        inverse: by which the input is multiplied before it is rounded to E4M3; else 1.
    """

    rows: Tensor
    scale: Tensor | None = None
    inverse: float = 1.0

    @property
    def e4m3(self) -> bool:
        """Whether it reads E4M3."""
        return self.rows.dtype == E4M3

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.rows.nbytes + (0 if self.scale is None else self.scale.nbytes)


def geglu_order(features: int) -> Tensor:
    """Row order (features,) of gate, then up, such that one thread sums up both of two neighbouring units.

    Of a warpgroup's 128 rows: two blocks of 64, of which each of four warps has 8 rows of gate and the same 8 of up.
    """
    unit = torch.arange(features // 2).view(-1, 4, 8, 2)  # group, warp, g, block
    rows = torch.stack((unit, unit + features // 2), dim=-1)
    return rows.permute(0, 3, 1, 4, 2).flatten()


def geglu_obstacles(features: int, k: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Why `tiled_geglu` does not run a weight (features,K) there; empty if it does."""
    units = (("rows of gate and up", features, ROWS), ("columns", k, ROW_BYTES // max(1, min(2, dtype.itemsize))))
    found = [f"{size} {name} are not a multiple of {unit}" for name, size, unit in units if size % unit]
    return found + wgmma_obstacles(dtype, device, e4m3=True)


def tile_geglu(weight: Tensor, scale: Tensor | None = None, inverse: float = 1.0) -> TiledGeglu:
    """weight (2F,K), gate then up, and in E4M3 its scale (2F,), reordered.

    Raises ValueError unless 2F is a multiple of 256 and a scale is there where the weight is in E4M3.
    """
    if len(weight) % ROWS:
        raise ValueError(f"weight has {len(weight)} rows, expected a multiple of {ROWS}")
    if (weight.dtype == E4M3) != (scale is not None):
        raise ValueError(f"a scale belongs to a weight in {E4M3} and to no other, weight is {weight.dtype}")
    vector("scale", scale, len(weight))
    order = geglu_order(len(weight)).to(weight.device)
    # By bytes: not every device can index E4M3.
    rows = weight.view(torch.uint8)[order].view(weight.dtype) if weight.dtype == E4M3 else weight[order]
    return TiledGeglu(rows.contiguous(), None if scale is None else scale[order].contiguous(), inverse)


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("weights", Box),
        ("tokens", Box),
        ("hidden", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("inverse", ctypes.c_float),
        ("up_to_64", ctypes.c_uint8 * 40),
    ]


@cache
def _module(features: int, k: int, tiling: Tiling, dtype: torch.dtype, device: torch.device) -> CudaModule:
    tile = tile_definitions(tiling.tokens, tiling.slots, dtype)
    return CudaModule(SOURCE, {"K": k, "N": features} | tile, device)


def _check(x: Tensor, weight: TiledGeglu, out: Tensor, inverse: float) -> tuple[int, int, int]:
    features, k = dense("weight", weight.rows)
    rows, _ = dense("x", x, None, k)
    dense("out", out, rows, features // 2)
    check_inverse(out, inverse)
    return rows, features, k


def tiled_geglu_ref(x: Tensor, weight: TiledGeglu, out: Tensor, inverse: float = 1.0) -> None:
    """Twin of `tiled_geglu`, anywhere and in any dtype."""
    rows, features, _ = _check(x, weight, out, inverse)
    product = x.float() @ weight.rows.float().T
    both = torch.empty(rows, features, device=x.device)
    both[:, geglu_order(features).to(x.device)] = product if weight.scale is None else product * weight.scale
    gate, up = both.chunk(2, dim=-1)
    store_ref(F.gelu(gate, approximate="tanh") * up, out, inverse)


def tiled_geglu(x: Tensor, weight: TiledGeglu, out: Tensor, inverse: float = 1.0) -> None:
    """out (M,F) = tanh-GELU(x (M,K) · gateᵀ) * (x · upᵀ); sums and GeGLU are in float32.

    x, weight and out are all in bfloat16, or all in E4M3, whose sums stay in the tensor cores' own registers, and whose
    out holds the result times `inverse`, saturated. The first call with a shape and a tiling compiles. Raises
    ValueError where shapes do not fit, and for what `geglu_obstacles` names.
    """
    rows, features, k = _check(x, weight, out, inverse)
    dtype = weight.rows.dtype
    found = geglu_obstacles(features, k, dtype, weight.rows.device)
    if x.dtype != dtype or out.dtype != dtype:
        found.append(f"x in {x.dtype}, weights in {dtype} and out in {out.dtype}, not all in one")
    elif not aligned(x, weight.rows, out):
        found.append("addresses that are not multiples of 16 bytes")
    if found:
        raise ValueError(f"the tiled product cannot run: {'; '.join(found)}")
    ctas = multiprocessors(x)
    tiling = Tiling.fit(features, rows, ctas, dtype)
    module = _module(features, k, tiling, dtype, x.device)
    block = ROW_BYTES // dtype.itemsize
    boxes = box(module, weight.rows, ROWS, block), box(module, x, tiling.tokens, block)
    scale = None if weight.scale is None else weight.scale.data_ptr()
    launch = Launch(min(ctas, tiling.tiles(features, rows)), ROWS + GROUP, tiling.shared_bytes, dependent=True)
    module.launch("tiled_geglu", _Arguments(*boxes, out.data_ptr(), scale, rows, inverse), launch)
