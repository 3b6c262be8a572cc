"""What the device can do at most, measured in the same run as what is compared with it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ..kernels import E4M3
from .roofline import FLOAT32, Ceilings

REPEATS = 20
GPU_COPY_BYTES, CPU_COPY_BYTES = 2 << 30, 64 << 20
GPU_SIDE, CPU_SIDE = 8192, 1024


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A large copy (bytes read plus bytes written) and a large square matrix product on random data, best of 20 each.

    The best, not the median: it is a ceiling. On a GPU the copy is of 2 GiB, or a quarter of what is free. For E4M3 the
    product is the scaled one, with a scale for each matrix.
    """
    side, size = (CPU_SIDE, CPU_COPY_BYTES)
    if device.type == "cuda":
        side, size = GPU_SIDE, min(GPU_COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    return Ceilings(_flops_per_s(side, device, dtype), _bytes_per_s(size, device))


def _bytes_per_s(size: int, device: torch.device) -> float:
    source = torch.rand(size // FLOAT32, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * FLOAT32 / best_seconds(lambda: target.copy_(source), device)


def _flops_per_s(side: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    if dtype == E4M3:
        one, sixteen = torch.ones((), device=device), torch.bfloat16
        work = partial(torch._scaled_mm, a, b.t(), one, one, out_dtype=sixteen, use_fast_accum=True)
        return 2 * side**3 / best_seconds(work, device)
    out = torch.empty_like(a)
    return 2 * side**3 / best_seconds(lambda: torch.mm(a, b, out=out), device)


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The shortest of several runs: by device events on a GPU, by the clock elsewhere."""
    for _ in range(3):
        work()
    best = math.inf
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize(device)
            best = min(best, begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - start)
    return best


def on_chip_bytes(device: torch.device) -> float:
    """The GPU's L2 cache; 0 on a CPU, whose caches are not asked for."""
    if device.type != "cuda":
        return 0.0
    return float(torch.cuda.get_device_properties(device).L2_cache_size)


def describe(ceilings: Ceilings, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """For the receipt."""
    product = f"{str(dtype).removeprefix('torch.')} matrix product, random data"
    return asdict(ceilings) | {"on_chip_bytes": on_chip_bytes(device), "product": product}
