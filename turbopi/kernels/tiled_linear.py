"""The linear layer in `tiled_linear.cu`: bfloat16 or E4M3, Hopper, some hundred rows, tiles that fill the GPU once.

For GPUs of compute capability 9.0, whose warpgroup instructions no other has. In bfloat16 a LayerNorm in front of it
can be taken behind its sums, with moments of its rows that another product has left. What it is worth is in
docs/vision-prefix.md.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import aligned, cdiv, matrix, same_dtype, vector
from ._fp8 import E4M3, check_inverse, store_ref
from ._wgmma import BARRIER_BYTES, GROUP, SHARED_BYTES, Box, box, sums, wgmma_obstacles
from .cuda_module import CudaModule, Launch

Activation = Literal["none", "gelu"]
SOURCE = Path(__file__).with_name("tiled_linear.cu")
BLOCK = 64
"""Of K, what a slot of the ring holds: 128 bytes. In E4M3 twice as much."""
MOST_SLOTS = 8
MOST_GROUPS = 4
MOST_COLUMNS = 256
VECTOR_BYTES = 8
"""Of each column: its sum of weights, or its scale, and its bias."""
EPSILON = 1e-6
"""As in tiled_linear.cu."""


class Norm(NamedTuple):
    """A LayerNorm without affine, taken behind the sums of a product: (x Wᵀ - mean * sums of W's rows) * rstd.

    Attributes:
        sums: (N,) float32, of the weight's rows.
        moments: (M,T,2) float32 of x by tiles of K/T columns: `moments_of`.
    """

    sums: Tensor
    moments: Tensor


@dataclass(frozen=True)
class LinearTiling:
    """How a product is cut.

    Attributes:
        groups: of 64 rows of x, a warpgroup each, in a tile.
        columns: of the output in a tile, a multiple of 8.
        splits: parts of K, 1 or as many as groups, each with a CTA of a cluster that finishes one group's rows.
        most_slots: of the ring. Fewer leave room for CTAs of the kernels in front and behind.
    """

    groups: int
    columns: int
    splits: int = 1
    most_slots: int = MOST_SLOTS

    def __post_init__(self) -> None:
        if not 1 <= self.groups <= MOST_GROUPS:
            raise ValueError(f"groups is {self.groups}, expected 1 to {MOST_GROUPS}")
        if self.columns % 8 or not 8 <= self.columns <= MOST_COLUMNS:
            raise ValueError(f"columns is {self.columns}, expected a multiple of 8 up to {MOST_COLUMNS}")
        if self.splits not in (1, self.groups):
            raise ValueError(f"splits is {self.splits}, expected 1, or as many as there are groups: {self.groups}")
        if not 3 <= self.most_slots <= MOST_SLOTS:
            raise ValueError(f"most_slots is {self.most_slots}, expected 3 to {MOST_SLOTS}")
        if self.slots < 3:
            raise ValueError(f"a tile of {self.tokens} by {self.columns} does not fit into shared memory")

    @property
    def tokens(self) -> int:
        """Rows of x in a tile."""
        return 64 * self.groups

    @property
    def _slot_bytes(self) -> int:
        return (self.tokens + self.columns) * BLOCK * 2

    @property
    def slots(self) -> int:
        """Of the ring."""
        return min(self.most_slots, (SHARED_BYTES - self._beside) // (self._slot_bytes + BARRIER_BYTES))

    @property
    def _beside(self) -> int:
        """Bytes behind the ring: vectors, what other parts send of 64 rows in float32, and its barrier."""
        sent = (self.splits - 1) * 64 * self.columns * 4
        return VECTOR_BYTES * self.columns + sent + (BARRIER_BYTES if self.splits > 1 else 0)

    @property
    def shared_bytes(self) -> int:
        """Shared memory as tiled_linear.cu lays it out."""
        return self.slots * (self._slot_bytes + BARRIER_BYTES) + self._beside

    @property
    def threads(self) -> int:
        """Of a CTA: the warpgroups, and the warp that produces."""
        return GROUP * self.groups + 32

    def ctas(self, rows: int, features: int) -> int:
        """Of `rows` rows by `features` columns, in whole clusters."""
        return cdiv(rows, self.tokens) * cdiv(features, self.columns) * self.splits

    @property
    def definitions(self) -> dict[str, int | str]:
        """For the compiler. Operands of a wgmma are counted out here: the preprocessor cannot."""
        registers, operands, following = sums(self.columns)
        return {
            "GROUPS": self.groups,
            "COLUMNS": self.columns,
            "SLOTS": self.slots,
            "SPLITS": self.splits,
            "REGISTERS": registers,
            "OPERANDS": operands,
            "INPUTS": f'"%{following}, %{following + 1}"',
        }


def tiled_linear_obstacles(*operands: Tensor) -> list[str]:
    """Why `tiled_linear` does not run on such matrices and vectors; empty if it does."""
    dtype = next((t.dtype for t in operands if t.dtype not in (torch.bfloat16, E4M3)), torch.bfloat16)
    found = wgmma_obstacles(dtype, operands[0].device)
    if not aligned(*map(torch.atleast_2d, operands)):
        found.append("rows or addresses that are not multiples of 16 bytes")
    return found


def tiling_obstacles(
    tiling: LinearTiling, features: int, k: int, normed: int = 0, leaves_moments: bool = False, e4m3: bool = False
) -> list[str]:
    """Why a weight (features, k) is not cut so; empty if it can be. `normed`: tiles of the moments of x."""
    found = []
    block = 2 * BLOCK if e4m3 else BLOCK
    if tiling.splits > cdiv(k, block):
        found.append(f"{tiling.splits} parts of {cdiv(k, block)} blocks of K")
    if e4m3 and normed:
        found.append("a norm behind sums of E4M3")
    if normed and (tiling.splits > 1 or k % normed):
        found.append(f"a norm by {normed} tiles of moments with K = {k} in {tiling.splits} parts")
    if leaves_moments and features % tiling.columns:
        found.append(f"moments of {features} columns in tiles of {tiling.columns}")
    return found


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("tokens", Box),
        ("weights", Box),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("moments_of_x", ctypes.c_void_p),
        ("moments", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("residual_stride", ctypes.c_int),
        ("out_stride", ctypes.c_int),
        ("inverse", ctypes.c_float),
    ]


class _Epilogue(NamedTuple):
    """What follows the sums, as the source is told."""

    BIAS: int
    RESIDUAL: int
    GELU: int
    NORMED: int
    MOMENTS: int
    NARROW: int = 0
    E4M3: int = 0


@cache
def _module(features: int, k: int, tiling: LinearTiling, epilogue: _Epilogue, device: torch.device) -> CudaModule:
    return CudaModule(SOURCE, {"K": k, "N": features} | epilogue._asdict() | tiling.definitions, device)


def _moments(name: str, t: Tensor, rows: int, tiles: int | None = None) -> int:
    """The number of tiles."""
    if t.ndim != 3 or t.shape[::2] != (rows, 2) or t.dtype != torch.float32 or not t.is_contiguous():
        raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)}, expected float32 ({rows}, tiles, 2), contiguous")
    if tiles not in (None, t.shape[1]):
        raise ValueError(f"{name} has {t.shape[1]} tiles, expected {tiles}")
    return t.shape[1]


def _check(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    tiling: LinearTiling,
    bias: Tensor | None,
    activation: Activation,
    residual: Tensor | None,
    norm: Norm | None,
    moments: Tensor | None,
    scale: Tensor | None,
    inverse: float,
) -> tuple[int, int, int, _Epilogue]:
    """Rows, features, K and the epilogue."""
    rows, k = matrix("x", x)
    features, _ = matrix("weight", weight, width=k)
    matrix("out", out, rows, features)
    vector("bias", bias, features, None)
    if residual is not None:
        matrix("residual", residual, rows, features)
    if activation not in get_args(Activation):
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(get_args(Activation))}")
    tiles = 0
    if norm is not None:
        vector("the norm's sums", norm.sums, features)
        tiles = _moments("the norm's moments", norm.moments, rows)
    if moments is not None:
        _moments("moments", moments, rows, cdiv(features, tiling.columns))
    e4m3 = _check_e4m3(x, weight, out, scale, inverse)
    if found := tiling_obstacles(tiling, features, k, tiles, moments is not None, e4m3):
        raise ValueError(f"the product cannot be cut like this: {'; '.join(found)}")
    if out.dtype == E4M3 and (residual is not None or moments is not None):
        raise ValueError(f"a stream is not kept in {E4M3}: out has a residual or leaves moments")
    given = (bias is not None, residual is not None, activation == "gelu", tiles, moments is not None)
    return rows, features, k, _Epilogue(*map(int, (*given, out.dtype == E4M3, e4m3)))


def _check_e4m3(x: Tensor, weight: Tensor, out: Tensor, scale: Tensor | None, inverse: float) -> bool:
    """Whether the operands are in E4M3, with what belongs to that."""
    same_dtype("x", x, "weight", weight)
    e4m3 = x.dtype == E4M3
    vector("scale", scale, len(weight))
    if e4m3 != (scale is not None) or (out.dtype == E4M3 and not e4m3):
        raise ValueError(f"a scale, and out in {E4M3}, belong to operands in {E4M3} and to no others, x is {x.dtype}")
    check_inverse(out, inverse)
    return e4m3


def moments_of(x: Tensor, tiles: int) -> Tensor:
    """(M,T,2) float32 of x (M,D) by tiles of D/T columns: sums, and squared distances from the tile's mean."""
    cut = x.float().unflatten(1, (tiles, -1))
    return torch.stack((cut.sum(-1), (cut - cut.mean(-1, keepdim=True)).square().sum(-1)), dim=-1)


def _mean_and_rstd(moments: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Of whole rows of `width`, each (M,1), from those of their tiles."""
    sums, distances = moments.unbind(-1)
    size = width // moments.shape[1]
    mean = sums.sum(1, keepdim=True) / width
    variance = (distances + size * (sums / size - mean).square()).sum(1, keepdim=True) / width
    return mean, torch.rsqrt(variance + EPSILON)


def tiled_linear_ref(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    tiling: LinearTiling,
    bias: Tensor | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
    norm: Norm | None = None,
    moments: Tensor | None = None,
    scale: Tensor | None = None,
    inverse: float = 1.0,
) -> None:
    """Twin of `tiled_linear`, anywhere and in any dtype. Of the tiling only the columns of moments matter."""
    _check(x, weight, out, tiling, bias, activation, residual, norm, moments, scale, inverse)
    y = F.linear(x.float(), weight.float())
    if scale is not None:
        y = y * scale
    if norm is not None:
        mean, rstd = _mean_and_rstd(norm.moments, x.shape[1])
        y = (y - mean * norm.sums) * rstd
    if bias is not None:
        y = y + bias.float()
    if activation == "gelu":
        y = F.gelu(y, approximate="tanh")
    store_ref(y if residual is None else y + residual.float(), out, inverse)
    if moments is not None:
        moments.copy_(moments_of(out, moments.shape[1]))


def tiled_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    tiling: LinearTiling,
    bias: Tensor | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
    norm: Norm | None = None,
    moments: Tensor | None = None,
    scale: Tensor | None = None,
    inverse: float = 1.0,
) -> None:
    """out (M,N) = activation(norm(x (M,K)) · weight (N,K)ᵀ * scale + bias (N,)) + residual (M,N), float32 up to there.

    All bfloat16, rounded once, with the same bits each time; `residual` may be `out`. `moments` (M,N/columns,2) float32
    is left of the new out, for the `Norm` of who reads it. x and weight may be in E4M3, with `scale` (N,) float32 and
    no norm; then out may be in E4M3 too, times `inverse` and saturated, where it is no stream.

    The first call with a shape compiles. It is launched before the kernel in front has ended, and reads `weight`,
    `bias`, `scale` and `norm.sums` at once, which nothing right in front may write. Raises ValueError where shapes do
    not fit, and for what the two `_obstacles` name.
    """
    found = _check(x, weight, out, tiling, bias, activation, residual, norm, moments, scale, inverse)
    rows, features, k, epilogue = found
    obstacles = tiled_linear_obstacles(*(t for t in (x, weight, out, bias, residual) if t is not None))
    if obstacles:
        raise ValueError(f"the tiled product cannot run: {'; '.join(obstacles)}")
    module = _module(features, k, tiling, epilogue, x.device)
    block = BLOCK * 2 // x.itemsize
    boxes = box(module, x, tiling.tokens, block), box(module, weight, tiling.columns, block)
    sums, moments_of_x = norm or (scale, None)
    tensors = (bias, residual, out, sums, moments_of_x, moments)
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    sizes = (rows, 0 if residual is None else residual.stride(0), out.stride(0))
    launch = Launch(tiling.ctas(rows, features), tiling.threads, tiling.shared_bytes, tiling.splits, dependent=True)
    module.launch("tiled_linear", _Arguments(*boxes, *addresses, *sizes, inverse), launch)
