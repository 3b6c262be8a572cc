"""Tanh-GELU, alone (vision) and gated (Gemma) (SPEC 1.0)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ._common import cdiv, dense, next_power_of_2
from ._fp8 import check_inverse, narrow, store_ref
from ._triton import tl, triton

BLOCK_LIMIT = 2048


def _check_geglu(gate_up: Tensor, out: Tensor) -> tuple[int, int]:
    rows, width = dense("out", out)
    dense("gate_up", gate_up, rows, 2 * width)
    return rows, width


def _check_gelu(x: Tensor, out: Tensor) -> tuple[int, int]:
    rows, width = dense("x", x)
    dense("out", out, rows, width)
    return rows, width


def geglu_ref(gate_up: Tensor, out: Tensor, inverse: float = 1.0) -> None:
    """Twin of `geglu`."""
    _check_geglu(gate_up, out)
    gate, up = gate_up.float().chunk(2, dim=-1)
    store_ref(F.gelu(gate, approximate="tanh") * up, out, inverse)


def gelu_ref(x: Tensor, out: Tensor, inverse: float = 1.0) -> None:
    """Twin of `gelu`."""
    _check_gelu(x, out)
    store_ref(F.gelu(x.float(), approximate="tanh"), out, inverse)


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(u)) = x * sigmoid(2u), with u = sqrt(2/pi) (x + 0.044715 x³): one exponential, no overflow."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))


@triton.jit
def _geglu(gate_up, out, width, inverse, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < width
    gate = tl.load(gate_up + 2 * row + offsets, mask=inside).to(tl.float32)
    up = tl.load(gate_up + 2 * row + width + offsets, mask=inside).to(tl.float32)
    tl.store(out + row + offsets, narrow(gelu_tanh(gate) * up, inverse, out.dtype.element_ty), mask=inside)


@triton.jit
def _gelu(x, out, width, inverse, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < width
    f = tl.load(x + row + offsets, mask=inside).to(tl.float32)
    tl.store(out + row + offsets, narrow(gelu_tanh(f), inverse, out.dtype.element_ty), mask=inside)


def _launch(kernel, x: Tensor, out: Tensor, rows: int, width: int, inverse: float) -> None:
    check_inverse(out, inverse)
    block = min(BLOCK_LIMIT, next_power_of_2(width))
    kernel[(rows, cdiv(width, block))](x, out, width, inverse, BLOCK=block, num_warps=4)


def geglu(gate_up: Tensor, out: Tensor, inverse: float = 1.0) -> None:
    """gate_up (M,2F), gate first -> out (M,F): tanh-GELU(gate) * up, in float32.

    `out` in E4M3 holds it times `inverse`, saturated. Raises ValueError where shapes do not fit.
    """
    _launch(_geglu, gate_up, out, *_check_geglu(gate_up, out), inverse)


def gelu(x: Tensor, out: Tensor, inverse: float = 1.0) -> None:
    """x (M,F) -> out (M,F): tanh-GELU, in float32. `out` may be `x`; in E4M3 it holds it times `inverse`, saturated.

    Raises ValueError where shapes do not fit.
    """
    _launch(_gelu, x, out, *_check_gelu(x, out), inverse)
