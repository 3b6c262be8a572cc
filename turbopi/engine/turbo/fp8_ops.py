"""Products of E4M3 operands: cuBLASLt for many rows, Triton for few and where it was measured to be faster.

cuBLASLt scales the sums by row and column, adds a bias and writes bf16; it has neither GELU nor E4M3 output with scales
of this kind, so that a pass over its result follows. Triton's kernels do all of it at once. Which of the two runs a
shape of more than `FEW_ROWS` rows is decided by the tuned file of the GPU: an entry there (written by
benchmarks/fp8_kernels.py where Triton won) means Triton with those tiles, none means the library. Of batches with more
than `MOST_TRITON_ROWS` rows only products with GELU are Triton's.

Of the prefix's qkv, `out` and `down` the library writes bare sums (`fp8_sums`), which the rotation or the norm behind
them scales; its gate and up are `kernels.tiled_geglu` where that runs. What was tried is in docs/prefix-fp8.md.

Sums are accumulated in the tensor cores' own registers ("fast accumulation"), about 14 bits. What that is expected to
cost, against the rounding of operands to E4M3, is in docs/performance.md.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ... import kernels
from ...kernels import GemmConfig
from ...kernels.tuning import tuned
from ...quant.fp8 import Fp8Weight

FAST_SUMS = True
"""Whether the library may sum in the tensor cores' own registers."""
FEW_ROWS = 64
"""Up to here weights, not products, take the time."""
MOST_TRITON_ROWS = 2048
"""Beyond, the library runs products without GELU: the tuned files know some hundred rows, and their tiles are small."""
LEAST_ROWS = 1024
MOST_SPLITS = 4
"""Parts of K, at most."""


@cache
def _ones(count: int, device: torch.device) -> Tensor:
    """(count, 1) float32. Kept for ever: captured graphs read it."""
    return torch.ones(count, 1, device=device)


@cache
def _one(device: torch.device) -> Tensor:
    """1.0 without dimensions. Kept like `_ones`."""
    return torch.ones((), device=device)


def row_scales(rows: Tensor) -> Tensor:
    """(M, 1) float32 ones, for a library that wants a scale for each row beside one for each column."""
    # Powers of two, so that few sizes are ever made, all of them when a shape is first seen and not in a capture.
    room = LEAST_ROWS
    while room < len(rows):
        room *= 2
    return _ones(room, rows.device)[: len(rows)]


def library_fp8_matmul(x: Tensor, weight: Fp8Weight, out: Tensor, bias: Tensor | None = None) -> None:
    """out (M,N) bf16 = (x (M,K) · valuesᵀ) * scale + bias, by cuBLASLt; x in E4M3, bias (N,) bf16."""
    torch._scaled_mm(
        x,
        weight.values.t(),
        row_scales(x),
        weight.scale[None],
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=FAST_SUMS,
        out=out,
    )


def _by_library(x: Tensor, out: Tensor) -> bool:
    """Whether cuBLASLt can run it and may be the faster one."""
    return len(x) > FEW_ROWS and out.dtype == torch.bfloat16


def _tiles(op: str, x: Tensor, weight: Fp8Weight) -> GemmConfig | None:
    """Tiles with which Triton beat the library on this GPU."""
    return tuned(op, GemmConfig, x, (len(x), *weight.values.shape)) if len(x) > FEW_ROWS else None


def fp8_matmul(
    x: Tensor, weight: Fp8Weight, out: Tensor, bias: Tensor | None = None, sums: Tensor | None = None
) -> None:
    """out (M,N) = (x (M,K) · valuesᵀ) * scale + bias (N,), with x in E4M3.

    `sums` (splits, M, N) float32 is scratch for tiles that cut K into parts, where there are too few for the GPU.
    """
    op = "fp8_linear" if sums is None else "fp8_stream_linear"
    tiles = None if len(x) > MOST_TRITON_ROWS else _tiles(op, x, weight)
    if tiles is None and _by_library(x, out):
        library_fp8_matmul(x, weight, out, bias)
        return
    partial = sums[: tiles.splits] if sums is not None and tiles is not None and tiles.splits > 1 else None
    kernels.linear(x, weight.values, out, bias, config=tiles, partial=partial, scale=weight.scale)


def fp8_sums(x: Tensor, weight: Fp8Weight, out: Tensor) -> None:
    """out (M,N) = x (M,K) · valuesᵀ, with x in E4M3: who reads it has to multiply it by `weight.scale`.

    The library takes up to a quarter less time without a scale for each column. Triton runs few rows, and float32.
    """
    if _by_library(x, out):
        one = _one(x.device)
        torch._scaled_mm(x, weight.values.t(), one, one, out_dtype=out.dtype, use_fast_accum=FAST_SUMS, out=out)
    else:
        kernels.linear(x, weight.values, out)


def fp8_gelu_matmul(
    x: Tensor, weight: Fp8Weight, bias: Tensor, scratch: Tensor, out: Tensor, inverse: float = 1.0
) -> None:
    """out (M,N) = tanh-GELU of `fp8_matmul`, in E4M3 times `inverse`, or in bf16. `scratch` (M,N) may be `out`."""
    tiles = _tiles("fp8_gelu_linear", x, weight)
    if tiles is None and _by_library(x, scratch):
        library_fp8_matmul(x, weight, scratch, bias)
        kernels.gelu(scratch, out, inverse)
    else:
        kernels.linear(x, weight.values, out, bias, "gelu", config=tiles, scale=weight.scale, inverse=inverse)


def fp8_geglu_matmul(x: Tensor, weight: Fp8Weight, scratch: Tensor, out: Tensor, inverse: float = 1.0) -> None:
    """out (M,F) = tanh-GELU(gate) * up of the product with gate's rows, then up's; E4M3 times `inverse`, or bf16.

    `scratch` (M,2F) bf16.
    """
    tiles = _tiles("fp8_geglu_linear", x, weight)
    if tiles is None and _by_library(x, scratch):
        library_fp8_matmul(x, weight, scratch)
        kernels.geglu(scratch, out, inverse)
    else:
        kernels.geglu_linear(x, weight.values, out, tiles, weight.scale, inverse)


def twin_fp8_matmul(
    x: Tensor, weight: Fp8Weight, out: Tensor, bias: Tensor | None = None, sums: Tensor | None = None
) -> None:
    """Twin of `fp8_matmul`."""
    kernels.linear_ref(x, weight.values, out, bias, scale=weight.scale)


def twin_fp8_sums(x: Tensor, weight: Fp8Weight, out: Tensor) -> None:
    """Twin of `fp8_sums`."""
    kernels.linear_ref(x, weight.values, out)


def twin_fp8_gelu_matmul(
    x: Tensor, weight: Fp8Weight, bias: Tensor, scratch: Tensor, out: Tensor, inverse: float = 1.0
) -> None:
    """Twin of `fp8_gelu_matmul`, rounding where the library does."""
    kernels.linear_ref(x, weight.values, scratch, bias, scale=weight.scale)
    kernels.gelu_ref(scratch, out, inverse)


def twin_fp8_geglu_matmul(x: Tensor, weight: Fp8Weight, scratch: Tensor, out: Tensor, inverse: float = 1.0) -> None:
    """Twin of `fp8_geglu_matmul`, rounding where the library does."""
    kernels.linear_ref(x, weight.values, scratch, scale=weight.scale)
    kernels.geglu_ref(scratch, out, inverse)
