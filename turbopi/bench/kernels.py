"""A profile per kernel: which kernels a tick is made of, stage by stage, and how long each takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..checkpoint.load import usable_device
from ..config import ModelConfig
from ..engine import Precision
from ..quant import PrecisionPlan
from .clock import StageClock, on
from .contenders import Progress, contenders, make_engines
from .launches import Launch, Marker, cut, divided, record, summed
from .subjects import EngineSubject
from .workloads import Workload, observation

Recorder = Callable[[Callable[[], None], torch.device], list[Launch]]


@dataclass(frozen=True)
class KernelsConfig:
    """What to profile.

    Attributes:
        model, workload, engines, device, precision, plan, seed: as in `LatencyConfig`.
        batch: observations at once.
        repeats: ticks that are profiled, and as many that are timed without the profiler.
        warmup: ticks before them, in which an engine may capture or compile.
        trace: folder for each engine's trace, which trace viewers show; None keeps none.
    """

    model: ModelConfig
    workload: Workload
    engines: tuple[str, ...]
    device: str
    precision: Precision
    batch: int = 1
    repeats: int = 20
    warmup: int = 5
    plan: PrecisionPlan | None = None
    seed: int = 7
    trace: str | None = None

    def __post_init__(self) -> None:
        contenders(self.engines, self.precision)
        if min(self.repeats, self.warmup) < 1:
            raise ValueError(f"repeats and warmup must be at least 1, got {self.repeats} and {self.warmup}")
        if not 1 <= self.batch <= 256:
            raise ValueError(f"batch must be between 1 and 256, got {self.batch}")


def measure_kernels(config: KernelsConfig, progress: Progress = lambda _: None) -> dict[str, Any]:
    """A profile of every engine. Results for `write_receipt`.

    Raises ValueError if the device is no CUDA GPU or an engine cannot be had, RuntimeError if launches were lost.
    """
    device = usable_device(config.device)
    if device.type != "cuda":
        raise ValueError(
            f"a profile per kernel needs a CUDA GPU, got {config.device!r}; `--what latency` times stages on a CPU"
        )
    with on(device), torch.no_grad():
        sizes = config.workload.fit(config.model)
        asked = contenders(config.engines, config.precision)
        engines, _ = make_engines(asked, sizes, device, config.seed, config.plan, progress)
        inputs, noise = observation(sizes, config.workload, config.batch)
        found = {}
        for name, engine in engines.items():
            progress(f"{name}: profile")
            subject = EngineSubject(name, engine, inputs, noise, config.workload.steps)
            measured = profile(subject, config, device, _recorder(config, name))
            found[name] = measured | {"engine": subject.describe()}
        return {"prefix_tokens": config.workload.prefix_tokens(sizes), "batch": config.batch, "engines": found}


def _recorder(config: KernelsConfig, name: str) -> Recorder:
    if config.trace is None:
        return record
    folder = Path(config.trace)
    folder.mkdir(parents=True, exist_ok=True)
    keep = folder / f"{name.replace(':', '_').replace('/', '_')}.json"
    return lambda work, device: record(work, device, keep)


def profile(subject: EngineSubject, config: KernelsConfig, device: torch.device, recorder: Recorder) -> dict[str, Any]:
    """One engine's kernels by stage: of the whole tick's graph where it has one, else of its stages in a row."""
    subject.prepare()
    for _ in range(config.warmup):
        _tick(subject, lambda: None)
    timed = _timed(subject, config.repeats, device)
    has_graph, marker = subject.graph() is not None, Marker(device)
    pieces = len(subject.stage_names) + has_graph

    def work() -> None:
        for _ in range(config.repeats):
            marker()
            _tick(subject, marker)

    marker()
    launches = recorder(work, device)
    marks = config.repeats * (pieces + 1)
    parts = cut(launches, marks)
    ticks = [parts[i : i + pieces] for i in range(0, marks, pieces + 1)]
    stages = [divided(tick[-1], tick[:-1]) if has_graph else tick for tick in ticks]
    whole = [[launch for stage in tick for launch in stage] for tick in stages]
    return {
        "profiled": "the whole tick's graph" if has_graph else "stages one after the other",
        "ticks": config.repeats,
        "unprofiled_ms": timed,
        "tick": {key: value for key, value in summed(whole).items() if key != "kernels"},
        "stages": {name: summed([tick[i] for tick in stages]) for i, name in enumerate(subject.stage_names)},
    }


def _tick(subject: EngineSubject, mark: Callable[[], None]) -> None:
    """The stages one by one, then the whole tick's graph if there is one, with a mark after each."""
    subject.stages(mark)
    graph = subject.graph()
    if graph is not None:
        graph()
        mark()


def _timed(subject: EngineSubject, repeats: int, device: torch.device) -> dict[str, float]:
    """Medians of the same by device events, without the profiler, in milliseconds."""
    clock, times = StageClock(device), []
    for _ in range(repeats):
        clock.start()
        _tick(subject, clock.mark)
        times.append(clock.stop())
    names = (*subject.stage_names, "tick")
    return {name: median(values) for name, values in zip(names, zip(*times, strict=True), strict=False)}
