"""Two curves: bandwidth against the size of what is read again and again, and a tick against the prefix's length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..checkpoint.load import usable_device
from ..config import ModelConfig
from ..engine import STAGES, DescribedEngine, Engine, Precision
from ..quant import PrecisionPlan
from .ceilings import best_seconds, on_chip_bytes
from .clock import StageClock, clock_name, on
from .contenders import Progress, contenders, make_engines
from .receipt import summary
from .subjects import EngineSubject
from .workloads import Workload, observation

MIB = 1 << 20
GPU_READ_BYTES, CPU_READ_BYTES = 4 << 30, 64 * MIB
GPU_MIB, CPU_MIB = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 96, 128, 256, 512, 1024), (1, 4, 16)
READINGS = 10
BUCKET_EDGE = 16


@dataclass(frozen=True)
class MemoryConfig:
    """What to measure.

    Attributes:
        model: sizes.
        workload: cameras, actions and steps of the ticks; its prompt length is replaced by `prompt_lengths`.
        engines, device, precision, plan, seed: as in `LatencyConfig`.
        prompt_lengths: valid prompt tokens, one point of the curve each. Empty: `edges` of the model's slots.
        repeats: ticks a point.
        warmup: untimed ticks before each point, in which an engine may capture or compile.
    """

    model: ModelConfig
    workload: Workload
    engines: tuple[str, ...]
    device: str
    precision: Precision
    prompt_lengths: tuple[int, ...] = ()
    repeats: int = 100
    warmup: int = 5
    plan: PrecisionPlan | None = None
    seed: int = 7

    def __post_init__(self) -> None:
        contenders(self.engines, self.precision)
        if min(self.repeats, self.warmup) < 1 or min(self.prompt_lengths, default=1) < 1:
            raise ValueError(
                "repeats, warmup and prompt lengths must be at least 1, got "
                f"{self.repeats}, {self.warmup} and {self.prompt_lengths}"
            )


def edges(slots: int) -> tuple[int, ...]:
    """Prompt lengths on both sides of each multiple of 16: where an engine that has buckets steps."""
    lasts = range(BUCKET_EDGE, slots + 1, BUCKET_EDGE)
    return tuple(sorted({1, slots, *lasts, *(last + 1 for last in lasts if last < slots)}))


def measure_memory(config: MemoryConfig, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Both curves. Results for `write_receipt`. Raises ValueError if an engine or the device cannot be had."""
    device = usable_device(config.device)
    with on(device), torch.no_grad():
        return _measure(config, device, progress)


def _measure(config: MemoryConfig, device: torch.device, progress: Progress) -> dict[str, Any]:
    progress("bandwidth")
    bandwidth = bandwidth_curve(device)
    lengths = config.prompt_lengths or edges(config.model.max_tokens)
    sizes = replace(config.workload, prompt_tokens=max(lengths)).fit(config.model)
    asked = contenders(config.engines, config.precision)
    engines, _ = make_engines(asked, sizes, device, config.seed, config.plan, progress)
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for length in lengths:
        shape = replace(config.workload, prompt_tokens=length)
        inputs, noise = observation(sizes, shape, 1)
        for name, engine in engines.items():
            progress(f"{name}: {length} prompt tokens")
            subject = EngineSubject(name, engine, inputs, noise, shape.steps)
            point = {"prompt_tokens": length, "prefix_tokens": shape.prefix_tokens(sizes)}
            curves[name].append(point | _point(subject, config, device))
    return {
        "bandwidth": bandwidth,
        "on_chip_bytes": on_chip_bytes(device),
        "stage_clock": clock_name(device),
        "weight_bytes": weight_bytes(engines),
        "ticks": curves,
    }


def weight_bytes(engines: Mapping[str, Engine]) -> dict[str, dict[str, int]]:
    """Bytes of the weights of each engine that tells them, by kind."""
    told = {name: each.describe() for name, each in engines.items() if isinstance(each, DescribedEngine)}
    return {name: details["weight_bytes"] for name, details in told.items() if "weight_bytes" in details}


def _point(subject: EngineSubject, config: MemoryConfig, device: torch.device) -> dict[str, Any]:
    clock = StageClock(device)
    times = []
    for repeat in range(config.warmup + config.repeats):
        subject.prepare()
        clock.start()
        subject.stages(clock.mark)
        measured = clock.stop()
        if repeat >= config.warmup:
            times.append(measured)
    medians = torch.tensor(times).median(dim=0).values.tolist()
    return {
        "tick": summary([sum(stages) for stages in times], config.repeats),
        "stages_ms": dict(zip(STAGES, medians, strict=True)),
    }


def bandwidth_curve(device: torch.device, sizes: Sequence[int] | None = None) -> list[dict[str, float]]:
    """Bytes a second that are read of working sets of the given sizes, the best of 10 runs each.

    On a GPU by a kernel that reads past the first-level cache, on a CPU by torch's sum.
    """
    reader = _gpu_reader if device.type == "cuda" else _cpu_reader
    points = []
    for size in sizes or [MIB * size for size in (GPU_MIB if device.type == "cuda" else CPU_MIB)]:
        work, read_bytes = reader(torch.rand(size // 4, device=device))
        points.append({"bytes": size, "bytes_per_s": read_bytes / best_seconds(work, device, READINGS)})
    return points


def _gpu_reader(source: torch.Tensor) -> tuple[Callable[[], object], int]:
    from .reading import BLOCK, programs, read

    out = torch.empty(programs(source.device), BLOCK, device=source.device)
    turns = max(1, GPU_READ_BYTES // (out.numel() * 4))
    return lambda: read(source, out, turns), out.numel() * turns * 4


def _cpu_reader(source: torch.Tensor) -> tuple[Callable[[], object], int]:
    turns = max(1, CPU_READ_BYTES // (source.numel() * 4))

    def work() -> None:
        for _ in range(turns):
            source.sum()

    return work, source.numel() * turns * 4
