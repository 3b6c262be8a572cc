"""One product of the assembly, in the format in which its weight is kept: bf16 (or float32), or E4M3.

An fp8 product reads its input in E4M3, which whoever makes the input writes at once (`Target`), and leaves what belongs
on the residual stream beside it, for the next norm to add: its library adds nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...kernels import E4M3, TiledGeglu
from ...quant.fold import FoldedAffine
from ...quant.fp8 import Fp8Weight
from .ops import Ops

Product = Tensor | Fp8Weight


class Target(NamedTuple):
    """Where a product's input is written, and by what it is multiplied on the way (1 unless that is E4M3)."""

    tensor: Tensor
    inverse: float


def target(product: Product | TiledGeglu | None, plain: Tensor, fp8: Tensor) -> Target:
    """`fp8` for an fp8 product, `plain` for any other and for None, what is never quantised."""
    if isinstance(product, Fp8Weight) or (isinstance(product, TiledGeglu) and product.e4m3):
        return Target(fp8, product.inverse)
    return Target(plain, 1.0)


class Update(NamedTuple):
    """What the next norm has to add to the stream: (M,N), each column times its scale (N,) float32."""

    sums: Tensor
    scale: Tensor


def width(product: Product) -> int:
    """Columns of its output."""
    return len(product.values if isinstance(product, Fp8Weight) else product)


def operand(product: Product) -> tuple[Tensor, Tensor | None]:
    """What rows are multiplied with, and by what the sums of each column are; None: by nothing."""
    return (product.values, product.scale) if isinstance(product, Fp8Weight) else (product, None)


def multiply(ops: Ops, x: Tensor, product: Product, out: Tensor, bias: Tensor | None = None) -> None:
    """out (M,N) = x (M,K) · product (N,K)ᵀ + bias (N,)."""
    if isinstance(product, Fp8Weight):
        ops.fp8_matmul(x, product, out, bias=bias)
    else:
        ops.matmul(x, product, out, bias=bias)


def multiply_gelu(ops: Ops, x: Tensor, linear: FoldedAffine[Product], scratch: Tensor, into: Target) -> None:
    """into (M,N) = tanh-GELU(x · weightᵀ + bias); scratch (M,N) in the stream's dtype, may be `into`."""
    weight = linear.weight
    if isinstance(weight, Fp8Weight):
        ops.fp8_gelu_matmul(x, weight, linear.bias, scratch, into.tensor, into.inverse)
    elif into.tensor.dtype == E4M3:
        ops.matmul(x, weight, scratch, bias=linear.bias)
        ops.gelu(scratch, into.tensor, into.inverse)
    else:
        ops.matmul(x, weight, into.tensor, bias=linear.bias, activation="gelu")


def multiply_geglu(ops: Ops, x: Tensor, product: Product | TiledGeglu, scratch: Tensor, into: Target) -> None:
    """into (M,F) = tanh-GELU(x · gateᵀ) * (x · upᵀ); scratch (M,2F)."""
    if isinstance(product, TiledGeglu):
        ops.tiled_geglu(x, product, into.tensor, into.inverse)
    elif isinstance(product, Fp8Weight):
        ops.fp8_geglu_matmul(x, product, scratch, into.tensor, into.inverse)
    else:
        ops.geglu_matmul(x, product, scratch, into.tensor, into.inverse)


def multiply_for(ops: Ops, x: Tensor, product: Product, out: Tensor) -> Tensor | None:
    """`multiply` for a reader who scales the columns by what is returned, (N,) float32; not at all if that is None."""
    if isinstance(product, Fp8Weight):
        ops.fp8_sums(x, product, out)
        return product.scale
    ops.matmul(x, product, out)
    return None


def add_product(ops: Ops, x: Tensor, product: Product, stream: Tensor, update: Tensor, sums: Tensor) -> Tensor | None:
    """stream (M,N) += x · productᵀ at once, and None; or, in fp8, `update` with what the next norm has to add.

    `sums` is scratch, see `fp8_matmul`.
    """
    if isinstance(product, Fp8Weight):
        ops.fp8_matmul(x, product, update, bias=product.bias, sums=sums)
        return update
    ops.matmul(x, product, stream, residual=stream)
    return None


def add_later(ops: Ops, x: Tensor, product: Product, stream: Tensor, update: Tensor) -> Update | None:
    """`add_product`, of a product without bias, for a norm that scales what it adds: `update` then holds bare sums."""
    if isinstance(product, Fp8Weight):
        ops.fp8_sums(x, product, update)
        return Update(update, product.scale)
    ops.matmul(x, product, stream, residual=stream)
    return None
