"""Grids of cases, guarded buffers and tolerances for the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest value: float32 for the order of sums, the others one rounding and, in attention, the rounded weights.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GUARD = 64


def cases(small: Iterable[Any], full: Iterable[Any] = ()) -> list[Any]:
    """(dtype, shape) cases: `small` in float32 and float16; on a GPU those again, and `small` and `full` in bfloat16.

    The interpreter's dot is wrong in bfloat16, and slow.
    """
    small, full = list(small), list(full)
    here = [pytest.param(d, s, id=name(d, s)) for s in small for d in (torch.float32, torch.float16)]
    gpu = [(d, s) for s in small for d in (torch.float32, torch.float16)]
    gpu += [(torch.bfloat16, s) for s in small + full]
    return here + [pytest.param(d, s, id=f"gpu-{name(d, s)}", marks=pytest.mark.gpu) for d, s in gpu]


def name(dtype: torch.dtype, shape: Any) -> str:
    return f"{dtype}"[6:] + "-" + "x".join(map(str, shape if isinstance(shape, tuple) else (shape,)))


def seeded(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values with NaN around them in memory: whoever reads past the end shows it.

    Drawn on the CPU in float32 from the shape alone, so that every dtype and device tests the same numbers.
    """
    generator = torch.Generator().manual_seed(hash(shape) % 2**31)
    t = guarded(*shape, dtype=dtype)
    t.copy_(torch.randn(shape, generator=generator) * scale)
    return t


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN of this shape in the middle of a larger NaN buffer, so that it starts at an aligned address."""
    count = torch.Size(shape).numel()
    buffer = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype, device=DEVICE)
    return buffer[GUARD : GUARD + count].view(shape)


def assert_guard(t: Tensor) -> None:
    """Nobody wrote around a guarded tensor."""
    storage = torch.tensor([], dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    assert storage[:GUARD].float().isnan().all(), "written before the start"
    assert storage[-GUARD:].float().isnan().all(), "written past the end"


def assert_equal_up_to_rounding(got: Tensor, want: Tensor, factor: float = 1.0) -> None:
    """`want` is the twin's, in float32; NaN anywhere fails."""
    assert got.shape == want.shape
    error = (got.float() - want).abs().max().item()
    limit = TOLERANCE[got.dtype] * factor * max(want.abs().max().item(), 1e-3)
    assert error <= limit, f"largest error {error:.3e}, allowed {limit:.3e}"


def up(t: Tensor | None) -> Tensor | None:
    """The same values in float32, for the twin."""
    return None if t is None else t.float()
