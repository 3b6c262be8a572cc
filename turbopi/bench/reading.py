"""A kernel that only reads: bandwidth of a working set, wherever in the GPU's memory system it lies. Needs Triton."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels._triton import tl, triton

BLOCK = 4096
PROGRAMS_PER_SM = 8


@triton.jit
def _read_kernel(source, out, blocks, turns, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    # Programs start evenly spread and walk around: everything is read once before anything is read again.
    start = (program.to(tl.int64) * blocks) // tl.num_programs(0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for turn in range(turns):
        block = (start + turn) % blocks
        # Past the first-level cache, which is too small to be what is asked about.
        total += tl.load(source + block * BLOCK + lanes, cache_modifier=".cg")
    tl.store(out + program * BLOCK + lanes, total)


def read(source: Tensor, out: Tensor, turns: int) -> None:
    """Each program adds up `turns` blocks, so that `out.numel() * turns` floats are read.

    source: float32, a multiple of BLOCK elements. out: (programs, BLOCK) float32.
    """
    _read_kernel[(out.shape[0],)](source, out, source.numel() // BLOCK, turns, BLOCK=BLOCK, num_warps=8)


def read_ref(source: Tensor, out: Tensor, turns: int) -> None:
    """The twin of `read`."""
    blocks = source.view(-1, BLOCK)
    for program in range(out.shape[0]):
        start = program * len(blocks) // out.shape[0]
        out[program] = 0
        for turn in range(turns):
            out[program] += blocks[(start + turn) % len(blocks)]


def programs(device: torch.device) -> int:
    """Enough to keep every multiprocessor's loads in flight."""
    return PROGRAMS_PER_SM * int(torch.cuda.get_device_properties(device).multi_processor_count)
