"""Kernels that are launched before the one in front of them has ended (programmatic dependent launch, Hopper).

Such a kernel may read what no kernel writes at once, must call `after_the_last` before it touches anything else, and
must call it in every program: that is what makes everything older finished too.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import cdiv
from ._triton import GLUON, nvidia, tl, triton

LEAST_PIECE = 4096
"""Bytes that are asked for at once, at least."""


@triton.jit
def after_the_last(DEPENDENT: tl.constexpr, EARLY: tl.constexpr = False):
    """Wait until the kernel in front has finished and its results can be read, then let the next one start.

    EARLY: let it start before the wait. Only where that was measured: a kernel two places ahead takes room from the
    next one.
    """
    if DEPENDENT and EARLY:
        nvidia.gdc_launch_dependents()
    if DEPENDENT:
        nvidia.gdc_wait()
    if DEPENDENT and not EARLY:
        nvidia.gdc_launch_dependents()


@triton.jit
def fetch(start, size, piece, LANES: tl.constexpr, DEPENDENT: tl.constexpr):
    """Ask for `size` bytes (a multiple of 16) at `start` to be brought into L2, `piece` bytes a request."""
    if DEPENDENT and start is not None:
        programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        plane = tl.program_id(1) + tl.num_programs(1) * tl.program_id(2)
        program = tl.program_id(0) + tl.num_programs(0) * plane
        # Programs first: a few large requests of each.
        offset = (tl.arange(0, LANES) * programs + program) * piece
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r",
            [start.to(tl.int64) + offset, tl.minimum(size - offset, piece)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def dependent(like: Tensor) -> bool:
    """Whether kernels on the device of `like` can be launched like this."""
    return like.is_cuda and torch.cuda.get_device_capability(like.device) >= (9, 0)


def on_hopper(like: Tensor) -> bool:
    """Whether the kernels that use Hopper's own instructions run on the device of `like`."""
    return GLUON and like.is_cuda and torch.cuda.get_device_capability(like.device)[0] == 9


def options(like: Tensor, warps: int) -> dict[str, Any]:
    """How a kernel on the device of `like` is launched, and what it is told about that."""
    on = dependent(like)
    return {"DEPENDENT": on, "num_warps": warps} | ({"launch_pdl": True} if on else {})


def fetching(ahead: Tensor | None, programs: int, warps: int) -> dict[str, Any]:
    """The arguments of `fetch` for `ahead`, a contiguous tensor that a later kernel reads."""
    size = 0 if ahead is None else ahead.nbytes // 16 * 16
    piece = max(LEAST_PIECE, cdiv(cdiv(size, programs * 32 * warps), 16) * 16)
    return {"ahead": ahead, "ahead_size": size, "ahead_piece": piece, "LANES": 32 * warps}
