"""`turbo-pi bench`: latency receipts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from .init import Preset

if TYPE_CHECKING:
    from ..bench import Workload
    from ..bench.kernels import KernelsConfig
    from ..bench.latency import LatencyConfig
    from ..bench.memory import MemoryConfig


@dataclass(frozen=True)
class BenchOptions:
    """What to time, and on what.

    Attributes:
        what: latency; memory: bandwidth against the working set, and a tick against the prefix's length; or kernels: a
            profile per kernel, stage by stage, on a CUDA GPU.
        workload: libero (2 views, 40 prompt tokens, 10 actions), droid (2, 80, 15) or full (3, 200, 50).
        preset: sizes of the model; pi0 and pi05 are the published ones.
        engines: by name, or name:precision such as turbo:fp8, in turns on the same weights.
        precision: of engines named without one. Default: bf16 on a GPU, fp32 on a CPU.
        plan: JSON file that says which products a quantised precision leaves in another format.
        device: auto, cpu, cuda, cuda:1, ...
        batch: observations at once, 1 to 256; several give a run each, a profile of kernels takes one.
        calls: timed whole calls of each engine.
        stage_calls: timed ticks taken apart. Default: a fifth of the calls; for memory, 100 at each length; for
            kernels, 20 that are profiled.
        warmup: untimed calls.
        blocks: turns into which the calls are divided; the first engine runs one more at the end.
        hz: control rate whose deadline is counted.
        views: cameras, instead of the workload's.
        prompt_tokens: valid prompt tokens, instead of the workload's.
        horizon: actions, instead of the workload's.
        steps: flow-matching evaluations, instead of 10.
        prompt_lengths: points of the memory curve. Default: both sides of every multiple of 16.
        peer: other implementations to time beside the engines, if they are installed.
        trace: of kernels: folder that keeps each engine's trace for a trace viewer.
        seed: of the hash weights.
        threads: of torch on a CPU. Default: torch's own choice.
        out: receipt to write. Default: bench_<what>_<preset>_<workload>.json here.
    """

    what: Literal["latency", "memory", "kernels"] = "latency"
    workload: Literal["libero", "droid", "full"] = "libero"
    preset: Preset = "pi05"
    engines: tuple[str, ...] = ("eager",)
    precision: Literal["fp32", "bf16", "fp8", "int8", "w8a16", "w4a16", "nvfp4"] | None = None
    plan: Path | None = None
    device: str = "auto"
    batch: tuple[int, ...] = (1,)
    calls: int = 1000
    stage_calls: int | None = None
    warmup: int = 10
    blocks: int = 10
    hz: float = 20.0
    views: int | None = None
    prompt_tokens: int | None = None
    horizon: int | None = None
    steps: int | None = None
    prompt_lengths: tuple[int, ...] = ()
    peer: tuple[Literal["lerobot", "lerobot-compiled"], ...] = ()
    trace: Path | None = None
    seed: int = 7
    threads: int | None = None
    out: Path | None = None

    def shape(self) -> Workload:
        """The workload, under a name that says what is not as usual."""
        from ..bench import workload

        shape = workload(self.workload)
        asked = {name: getattr(self, name) for name in ("views", "prompt_tokens", "horizon", "steps")}
        changes = {name: value for name, value in asked.items() if value is not None}
        if not changes:
            return shape
        words = (f"{name.replace('_', '-')}{value}" for name, value in changes.items())
        return dataclasses.replace(shape, name="-".join((shape.name, *words)), **changes)

    def settings(self) -> LatencyConfig | MemoryConfig | KernelsConfig:
        """What the measurement is given. Raises ValueError for values that cannot be measured."""
        from ..bench.kernels import KernelsConfig
        from ..bench.latency import LatencyConfig
        from ..bench.memory import MemoryConfig
        from ..config import preset
        from ..policy import choose_device
        from ..quant import PrecisionPlan

        device = choose_device(self.device)
        common: dict[str, Any] = {
            "model": preset(self.preset),
            "workload": self.shape(),
            "engines": self.engines,
            "device": device,
            "precision": self.precision or ("fp32" if device == "cpu" else "bf16"),
            "plan": None if self.plan is None else PrecisionPlan.load(self.plan),
            "seed": self.seed,
            "warmup": self.warmup,
        }
        if self.what == "memory":
            repeats = 100 if self.stage_calls is None else self.stage_calls
            return MemoryConfig(**common, prompt_lengths=self.prompt_lengths, repeats=repeats)
        if self.what == "kernels":
            repeats = 20 if self.stage_calls is None else self.stage_calls
            if len(self.batch) != 1:
                raise ValueError(f"a profile per kernel is of one batch size, got --batch {self.batch}")
            trace = None if self.trace is None else str(self.trace)
            return KernelsConfig(**common, batch=self.batch[0], repeats=repeats, trace=trace)
        return LatencyConfig(
            **common,
            peers=self.peer,
            batches=self.batch,
            calls=self.calls,
            stage_calls=max(1, self.calls // 5) if self.stage_calls is None else self.stage_calls,
            blocks=self.blocks,
            hz=self.hz,
        )


_DEFAULTS = BenchOptions()


def bench(options: Annotated[BenchOptions, tyro.conf.arg(name="")] = _DEFAULTS) -> int:
    """Time engines side by side on random observations and hash weights. Writes a receipt and an HTML page beside it.

    Args:
        options: what to time, and on what.
    """
    import torch

    from ..bench import write_receipt
    from ..report import write_bench_report

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = options.settings()
    results = _measure(settings)
    name = f"bench_{options.what}_{options.preset}_{settings.workload.name}.json"
    path = write_receipt(options.out or Path(name), f"bench {options.what}", results, dataclasses.asdict(settings))
    console = Console(soft_wrap=True)
    tables = {"latency": latency_tables, "memory": memory_tables, "kernels": kernel_tables}
    for table in tables[options.what](results):
        console.print(table)
    console.print(f"wrote {path} and {write_bench_report(path)}")
    return 0


def _measure(settings: LatencyConfig | MemoryConfig | KernelsConfig) -> dict[str, Any]:
    from ..bench.kernels import KernelsConfig, measure_kernels
    from ..bench.latency import LatencyConfig, measure_latency
    from ..bench.memory import measure_memory

    with Console(stderr=True).status("starting") as status:
        if isinstance(settings, LatencyConfig):
            return measure_latency(settings, status.update)
        if isinstance(settings, KernelsConfig):
            return measure_kernels(settings, status.update)
        return measure_memory(settings, status.update)


def latency_tables(results: dict[str, Any]) -> Iterator[Table]:
    """Whole calls and stages, and what they reach of the device's ceilings."""
    for run in results["runs"]:
        title = f"batch {run['batch']}, {run['prefix_tokens']} prefix tokens, milliseconds"
        names = ("p50", "p90", "p99", "p99.9", "max", "missed", "device", "beyond", "per s")
        calls = Table("call", *names, title=title)
        stages = Table(
            "stage", "engine", "device ms", "least ms", "times", "TFLOP/s", "TB/s", title="against the floor"
        )
        device = Table("device time within the call", "p50", "p90", "p99", "p99.9", "max", "p99/p50")
        for name, subject in run["subjects"].items():
            calls.add_row(name, *_call_cells(subject))
            if "device_in_call" in subject:
                within = subject["device_in_call"]
                device.add_row(name, *_times(within), f"{within['p99_over_p50']:.3f}")
            for stage, row in subject.get("roofline", {}).items():
                numbers = (row["measured_ms"], row["least_ms"], row["times_the_floor"], row["tflop_per_s"])
                stages.add_row(stage, name, *(f"{value:.3g}" for value in (*numbers, row["tb_per_s"])))
        yield calls
        yield from (table for table in (device, stages) if table.row_count)


def _call_cells(subject: dict[str, Any]) -> tuple[str, ...]:
    call = subject["call"]
    device = [f"{subject[key]:.2f}" if key in subject else "" for key in ("device_ms", "outside_device_ms")]
    misses = f"{100 * call['deadline_miss_rate']:.1f} %"
    return (*_times(call), misses, *device, f"{call['samples_per_s']:.1f}")


def _times(found: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{found[key]:.2f}" for key in ("median_ms", "p90_ms", "p99_ms", "p99_9_ms", "max_ms"))


def memory_tables(results: dict[str, Any]) -> Iterator[Table]:
    """Bandwidth by working set, bytes of weights, and ticks by prompt length."""
    bandwidth = Table("working set MiB", "TB/s", title="reading again and again")
    for point in results["bandwidth"]:
        bandwidth.add_row(f"{point['bytes'] / 2**20:g}", f"{point['bytes_per_s'] / 1e12:.3f}")
    yield bandwidth
    if results["weight_bytes"]:
        weights = Table("engine", "MB", "of which", title="weights")
        for name, kinds in results["weight_bytes"].items():
            parts = ", ".join(f"{kind} {size / 1e6:.0f}" for kind, size in kinds.items())
            weights.add_row(name, f"{sum(kinds.values()) / 1e6:.0f}", parts)
        yield weights
    ticks = Table("prompt", "prefix", *results["ticks"], title="device milliseconds of a tick, median")
    for points in zip(*results["ticks"].values(), strict=True):
        first = points[0]
        cells = [f"{point['tick']['median_ms']:.2f}" for point in points]
        ticks.add_row(str(first["prompt_tokens"]), str(first["prefix_tokens"]), *cells)
    yield ticks


def kernel_tables(results: dict[str, Any]) -> Iterator[Table]:
    """Each engine's kernels by stage: what they add to it, and the median of one launch."""
    for name, engine in results["engines"].items():
        for stage, found in engine["stages"].items():
            title = f"{name}, {stage}: {found['span_ms']:.3f} ms, {found['launches']:g} launches, gaps"
            rows = Table(
                "kernel", "launches", "adds ms", "share", "median us", title=f"{title} {found['gaps_ms']:.3f} ms"
            )
            for row in found["kernels"]:
                numbers = (f"{row['own_ms']:.3f}", f"{100 * row['share']:.1f} %", f"{row['median_us']:.1f}")
                rows.add_row(row["label"], f"{row['count']:g}", *numbers)
            yield rows
