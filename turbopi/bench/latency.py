"""Latency of engines side by side: whole calls by the wall clock, stages by the device's, against the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.load import usable_device
from ..config import ModelConfig
from ..engine import Engine, Precision, precision_dtype
from ..model import ModelInput
from ..quant import PrecisionPlan
from .ceilings import describe, measure_ceilings, on_chip_bytes
from .clock import StageClock, clock_name, on, wall_ms
from .contenders import WEIGHT_BYTES, Contender, Progress, contenders, make_engines
from .peers import LerobotSubject
from .receipt import gpu_state_during, summary
from .roofline import Ceilings, Cost, against_ceilings, least_ms, tick_costs
from .subjects import EngineSubject, Subject, transfer_tensors
from .workloads import WORKLOADS, Workload, observation

Peer = Literal["lerobot", "lerobot-compiled"]
CALL_SAMPLES, STAGE_SAMPLES = 20_000, 4_000
"""Raw samples that one receipt keeps, of all subjects together: about 200 kB."""
TRANSFERS = 200
Costs = dict[str, Cost]


@dataclass(frozen=True)
class LatencyConfig:
    """What to time.

    Attributes:
        model: sizes.
        workload: shape of the tick.
        engines: "engine" or "engine:precision"; they run in turns, block by block, and the first runs one more block at
            the end.
        peers: other implementations to time beside them.
        device: where, such as "cuda" or "cpu".
        precision: of engines that are named without one, and of peers.
        plan: of quantised precisions; None quantises every product alike. Their calibration is made from noise.
        batches: observations at once, each of them a run.
        calls: timed whole calls of each subject.
        stage_calls: timed ticks taken apart into stages.
        warmup: untimed calls of each subject.
        blocks: turns.
        hz: control rate whose deadline is counted.
        seed: of the hash weights.
    """

    model: ModelConfig
    workload: Workload = WORKLOADS["libero"]
    engines: tuple[str, ...] = ("eager",)
    peers: tuple[Peer, ...] = ()
    device: str = "cpu"
    precision: Precision = "fp32"
    plan: PrecisionPlan | None = None
    batches: tuple[int, ...] = (1,)
    calls: int = 1000
    stage_calls: int = 200
    warmup: int = 10
    blocks: int = 10
    hz: float = 20.0
    seed: int = 7

    def __post_init__(self) -> None:
        for name in ("calls", "stage_calls", "warmup", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.engines and not self.peers:
            raise ValueError("nothing to time: name at least one engine or peer")
        contenders(self.engines, self.precision)
        if not self.batches or not all(1 <= batch <= 256 for batch in self.batches):
            raise ValueError(f"batches must be between 1 and 256, got {self.batches}")
        if self.hz <= 0:
            raise ValueError(f"hz must be positive, got {self.hz}")
        unknown = [peer for peer in self.peers if peer not in get_args(Peer)]
        if unknown:
            raise ValueError(f"unknown peer {unknown[0]!r}; known: {', '.join(get_args(Peer))}")


@dataclass
class Times:
    """Milliseconds of one subject: whole calls by both clocks, calls taken apart, stages, the whole tick's graph."""

    call: list[float] = field(default_factory=list)
    device_in_call: list[float] = field(default_factory=list)
    split: list[dict[str, float]] = field(default_factory=list)
    stages: list[list[float]] = field(default_factory=list)
    graph: list[float] = field(default_factory=list)


def measure_latency(config: LatencyConfig, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Time every subject at every batch. Results for `write_receipt`.

    Raises ValueError, ImportError or RuntimeError if an engine or a peer cannot be had here.
    """
    device = usable_device(config.device)
    with on(device), torch.no_grad():
        return _measure(config, device, progress)


def _measure(config: LatencyConfig, device: torch.device, progress: Progress) -> dict[str, Any]:
    dtype = precision_dtype(config.precision)
    sizes = config.workload.fit(config.model)
    asked = contenders(config.engines, config.precision)
    progress("ceilings: a large copy, large matrix products")
    ceilings = {kind: measure_ceilings(device, kind) for kind in {dtype, *(each.product_dtype for each in asked)}}
    engines, made_s = make_engines(asked, sizes, device, config.seed, config.plan, progress)
    return {
        "ceilings": describe(ceilings[dtype], device, dtype),
        "other_ceilings": [describe(found, device, kind) for kind, found in ceilings.items() if kind != dtype],
        "stage_clock": clock_name(device),
        "engine_made_s": made_s,
        "runs": [_run(config, sizes, batch, engines, ceilings, device, progress) for batch in config.batches],
    }


def _costs(config: LatencyConfig, sizes: ModelConfig, batch: int, precision: Precision, device: torch.device) -> Costs:
    element, weight = precision_dtype(precision).itemsize, WEIGHT_BYTES[precision]
    return tick_costs(sizes, config.workload, batch, element, on_chip_bytes(device), weight)


def _run(
    config: LatencyConfig,
    sizes: ModelConfig,
    batch: int,
    engines: Mapping[str, Engine],
    ceilings: Mapping[torch.dtype, Ceilings],
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    inputs, noise = observation(sizes, config.workload, batch)
    inputs.check(sizes)
    subjects = _subjects(config, sizes, inputs, noise, engines, device)
    ready = {}
    for subject in subjects:
        progress(f"batch {batch}, {subject.name}: warm-up")
        ready[subject.name] = _make_ready(subject, config.warmup)
    times = {subject.name: Times() for subject in subjects}
    for block in range(config.blocks):
        for subject in subjects:
            progress(f"batch {batch}, turn {block + 1} of {config.blocks}: {subject.name}")
            _turn(subject, times[subject.name], config, block, device)
    state = gpu_state_during(subjects[0].call) if device.type == "cuda" else None
    again = Times()
    _calls(subjects[0], again, _share(config.calls, config.blocks, 0))
    costs = _costs(config, sizes, batch, config.precision, device)
    least = {stage: least_ms(cost, ceilings[precision_dtype(config.precision)]) for stage, cost in costs.items()}
    asked = {each.name: each for each in contenders(config.engines, config.precision)}
    series = len(subjects) * len(config.batches)
    return {
        "batch": batch,
        "prefix_tokens": config.workload.prefix_tokens(sizes),
        "gpu_state": state,
        "least_ms": least | {"tick": sum(least.values())},
        "cost": {stage: asdict(cost) for stage, cost in costs.items()},
        "transfers": _transfers(inputs, noise, device),
        "subjects": {
            subject.name: ready[subject.name]
            | _results(config, sizes, batch, asked.get(subject.name), subject, times[subject.name], ceilings, series)
            for subject in subjects
        },
        "drift": _drift(subjects[0].name, times[subjects[0].name].call, again.call),
    }


def _results(
    config: LatencyConfig,
    sizes: ModelConfig,
    batch: int,
    contender: Contender | None,
    subject: Subject,
    times: Times,
    ceilings: Mapping[torch.dtype, Ceilings],
    series: int,
) -> dict[str, Any]:
    """One subject's part of the receipt, against the ceilings of its own precision; a peer has the run's."""
    precision = config.precision if contender is None else contender.precision
    reach = ceilings[precision_dtype(precision) if contender is None else contender.product_dtype]
    device = torch.device(config.device)
    costs = _costs(config, sizes, batch, precision, device)
    found = subject_results(subject.stage_names, times, costs, reach, batch, config.hz, series)
    return {"precision": precision} | found


def _make_ready(subject: Subject, calls: int) -> dict[str, Any]:
    """Everything that is done once, and how long it took."""
    ready: dict[str, Any] = {
        "warm_up_s": wall_ms(subject.warm_up) / 1e3,
        "first_call_s": wall_ms(subject.call) / 1e3,
    }
    for _ in range(calls):
        subject.call()
        subject.split()
        subject.prepare()
        subject.stages(lambda: None)
    return ready | ({"engine": subject.describe()} if isinstance(subject, EngineSubject) else {})


def _subjects(
    config: LatencyConfig,
    sizes: ModelConfig,
    inputs: ModelInput,
    noise: Tensor,
    engines: Mapping[str, Engine],
    device: torch.device,
) -> list[Subject]:
    steps, dtype = config.workload.steps, precision_dtype(config.precision)
    found: list[Subject] = [EngineSubject(name, engine, inputs, noise, steps) for name, engine in engines.items()]
    for peer in config.peers:
        found.append(LerobotSubject(sizes, inputs, noise, steps, device, dtype, compiled=peer == "lerobot-compiled"))
    return found


def _calls(subject: Subject, times: Times, count: int) -> None:
    for _ in range(count):
        times.call.append(wall_ms(subject.call))
        device_ms = subject.call_device_ms()
        if device_ms is not None:
            times.device_in_call.append(device_ms)


def _turn(subject: Subject, times: Times, config: LatencyConfig, block: int, device: torch.device) -> None:
    """One block of a subject: its share of the calls, then of the ticks taken apart."""
    _calls(subject, times, _share(config.calls, config.blocks, block))
    clock = StageClock(device)
    for _ in range(_share(config.stage_calls, config.blocks, block)):
        times.split.append(subject.split())
        subject.prepare()
        graph = subject.graph()
        if subject.stage_names:
            clock.start()
            subject.stages(clock.mark)
            times.stages.append(clock.stop())
        if graph is not None:
            clock.start()
            graph()
            clock.mark()
            times.graph += clock.stop()


def _share(total: int, blocks: int, block: int) -> int:
    """How many of `total` fall to this block, so that all blocks together have exactly them."""
    return -(-total * (block + 1) // blocks) + (-total * block // blocks)


def subject_results(
    stage_names: Sequence[str],
    times: Times,
    costs: Mapping[str, Cost],
    ceilings: Ceilings,
    batch: int,
    hz: float,
    series: int,
) -> dict[str, Any]:
    """One subject's part of the receipt."""
    call = summary(times.call, CALL_SAMPLES // series)
    results: dict[str, Any] = {
        "call": call | call_rates(times.call, batch, hz),
        "split_ms": {name: float(np.median([split[name] for split in times.split])) for name in times.split[0]},
    }
    keep = STAGE_SAMPLES // (5 * series)
    if times.device_in_call:
        found = summary(times.device_in_call, keep)
        results["device_in_call"] = found | {"p99_over_p50": found["p99_ms"] / found["median_ms"]}
    if not times.stages:
        return results
    measured = np.asarray(times.stages)
    stages = {name: summary(measured[:, i].tolist(), keep) for i, name in enumerate(stage_names)}
    results |= {"stages": stages, "tick_device": summary(measured.sum(axis=1).tolist(), keep)}
    if times.graph:
        results["graph"] = summary(times.graph, keep)
    device_ms = results.get("graph", results["tick_device"])["median_ms"]
    medians = {name: stage["median_ms"] for name, stage in stages.items()}
    results["device_ms"] = device_ms
    results["outside_device_ms"] = call["median_ms"] - device_ms
    results["roofline"] = against_ceilings(costs, medians, ceilings)
    return results


def call_rates(calls: Sequence[float], batch: int, hz: float) -> dict[str, float]:
    """Jitter, misses of a control deadline, and throughput of whole calls in milliseconds."""
    values = np.asarray(calls)
    p50, p99 = np.percentile(values, (50, 99))
    return {
        "p99_over_p50": float(p99 / p50),
        "deadline_hz": hz,
        "deadline_miss_rate": float((values > 1e3 / hz).mean()),
        "samples_per_s": float(1e3 * batch / p50),
    }


def _drift(name: str, calls: Sequence[float], again: Sequence[float]) -> dict[str, Any]:
    """Medians of the first subject's first calls, and of as many after everything else."""
    first, last = (float(np.median(walls)) for walls in (calls[: len(again)], again))
    return {"subject": name, "first_ms": first, "last_ms": last, "count": len(again)}


def _transfers(inputs: ModelInput, noise: Tensor, device: torch.device) -> dict[str, Any] | None:
    """The bare copies of a tick from pageable memory, None where nothing has to be copied."""
    if device.type != "cuda":
        return None
    names = ("observation_to_device", "actions_to_host")
    return {
        name: summary([wall_ms(copy) for _ in range(TRANSFERS)], TRANSFERS)
        for name, copy in zip(names, transfer_tensors(inputs, noise, device), strict=True)
    }
