"""What the runtime's ticks take on a GPU: full and fast ticks, steps one by one, guidance, and two streams.

    python benchmarks/runtime_latency.py                     # pi05 at full size, bf16, LIBERO's shape: about 3 minutes
    python benchmarks/runtime_latency.py --preset pi05-tiny --repeats 20 --steps 1 2     # to try it

Times whole ticks by the host's clock, from host memory to host memory, and stages by the device's. Hash weights: time
does not depend on them. The receipt is benchmarks/results/runtime_latency_GPU.json.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from turbopi import ModelInput, RuntimeConfig, preset
from turbopi.audit.golden import hash_model
from turbopi.bench import Workload, summary, workload, write_receipt
from turbopi.bench.workloads import as_uint8, observation
from turbopi.engine.capture import CudaGraphRecorder
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo.loops import LoopName
from turbopi.engine.turbo.ops import triton_ops
from turbopi.engine.turbo.pipeline import OverlapPipeline
from turbopi.runtime import ReuseConfig, RtcConfig, Runtime
from turbopi.runtime.guidance import guidance

OBSERVATIONS = 8
LOOPS: tuple[LoopName, ...] = ("persistent", "fused", "rows")


@dataclass(frozen=True)
class Options:
    """What to time."""

    preset: str = "pi05"
    """Model."""
    workload: str = "libero"
    """Shape of an observation."""
    steps: tuple[int, ...] = (1, 2, 3, 5, 10)
    """Flow-matching evaluations."""
    repeats: int = 300
    """Timed ticks of each kind."""
    warm_up: int = 20
    """Ticks before."""
    out: Path | None = None
    """The receipt."""


def main() -> None:
    """Measure, write the receipt, show the table."""
    options = tyro.cli(Options, description=__doc__)
    if not torch.cuda.is_available():
        raise ValueError("this times a GPU, and torch finds none; benchmarks/runtime_decision.py runs anywhere")
    shape = workload(options.workload)
    config = shape.fit(preset(options.preset))
    device = torch.device("cuda")
    model = hash_model(config, 7, torch.bfloat16, device)
    engine = TurboEngine(model, "bf16", triton_ops(), CudaGraphRecorder(device))
    del model
    asked = [observation(config, shape, 1, seed) for seed in range(OBSERVATIONS)]
    asked = [(as_uint8(x), noise) for x, noise in asked]
    rows = {str(steps): measure(engine, shape, asked, steps, options) for steps in options.steps}
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    path = options.out or Path(__file__).parent / "results" / f"runtime_latency_{name}.json"
    config_said = {n: str(v) if isinstance(v, Path) else v for n, v in vars(options).items()}
    write_receipt(path, "the runtime's ticks", {"steps": rows}, config_said)
    Console().print(table(rows), f"wrote {path}")


def measure(
    engine: TurboEngine, shape: Workload, asked: list[tuple[ModelInput, Tensor]], steps: int, options: Options
) -> dict[str, Any]:
    """Full and fast ticks, the stages alone, guided ticks, and the throughput of two streams."""
    found: dict[str, Any] = {}
    for name, runtime in {
        "full": RuntimeConfig(steps),
        "fast": RuntimeConfig(steps, reuse=ReuseConfig(every=10**9)),
        "guided": RuntimeConfig(steps, rtc=RtcConfig()),
    }.items():
        looped = Runtime(engine, runtime)
        looped.warm_up(shape.views, torch.uint8)
        found[name] = ticks(looped, asked, name, options)
    found["stages"] = stages(engine, asked[0], steps, options)
    for loop in LOOPS:
        found[f"overlap_{loop}"] = overlap(engine, shape, asked, steps, options, loop)
    stage = found["stages"]
    prefix = stage["encode_images"]["median_ms"] + stage["prefill"]["median_ms"]
    found["least_overlap_ms"] = max(prefix, stage["denoise"]["median_ms"])
    found["fast_beyond_denoise_ms"] = found["fast"]["median_ms"] - stage["denoise"]["median_ms"]
    return found


def ticks(looped: Runtime, asked: list[tuple[ModelInput, Tensor]], name: str, options: Options) -> dict[str, Any]:
    """Whole ticks as a policy asks for them; each with another observation."""
    looped.reset()
    prompt, (_, start) = asked[0][0].tokens, asked[0]
    left = start[:, :, :7].contiguous()
    config = looped.engine.config
    steering = guidance(left, (1, config.horizon, config.action_dim), 2, config.horizon, "LINEAR", 10.0)
    samples: list[float] = []
    for tick in range(options.warm_up + options.repeats):
        inputs, noise = asked[tick % len(asked)]
        # The same task, so that a prefix may be used again.
        inputs = dataclasses.replace(inputs, tokens=prompt)
        begin = time.perf_counter()
        looped.sample(inputs, noise, None, steering if name == "guided" else None)
        samples.append(1e3 * (time.perf_counter() - begin))
    return summary(samples[options.warm_up :], keep=200)


def stages(
    engine: TurboEngine, asked: tuple[ModelInput, Tensor], steps: int, options: Options
) -> dict[str, dict[str, Any]]:
    """Each stage's device time, captured, nothing else on the device."""
    tick = engine.place(*asked, steps)
    tick.upload()
    found = {}
    for stage in ("encode_images", "prefill", "denoise"):
        found[stage] = device_ms(lambda stage=stage: tick.launch_stage(stage), options)
    return found


def device_ms(work: Callable[[], None], options: Options) -> dict[str, Any]:
    """Device time between two events around the work, the host ahead of it."""
    samples = []
    for _ in range(options.warm_up + options.repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        begin.record()
        work()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end))
    return summary(samples[options.warm_up :], keep=100)


def overlap(
    engine: TurboEngine,
    shape: Workload,
    asked: list[tuple[ModelInput, Tensor]],
    steps: int,
    options: Options,
    loop: LoopName,
) -> dict[str, Any]:
    """Milliseconds an observation when the next prefix runs beside stage 3, and whether anything was captured."""
    pipeline = OverlapPipeline(engine, steps, first_loop=loop)
    pipeline.warm_up(shape.views)
    for tick in range(options.warm_up):
        pipeline.submit(*asked[tick % len(asked)])
    pipeline.drain()
    recorded, begin = pipeline.recorded, time.perf_counter()
    for tick in range(options.repeats):
        pipeline.submit(*asked[tick % len(asked)])
    pipeline.drain()
    ms = 1e3 * (time.perf_counter() - begin) / options.repeats
    return {"ms_per_observation": ms, "captured": pipeline.recorded - recorded, "observations": options.repeats}


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """A row a step count."""
    columns = ("steps", "full p50", "p99", "fast p50", "p99", "denoise", "fast beyond", "guided p50", *LOOPS)
    shown = Table(*columns, "least", title="the runtime's ticks, ms")
    for steps, found in rows.items():
        values = [found[kind][key] for kind in ("full", "fast") for key in ("median_ms", "p99_ms")]
        values += [
            found["stages"]["denoise"]["median_ms"],
            found["fast_beyond_denoise_ms"],
            found["guided"]["median_ms"],
        ]
        values += [found[kind]["ms_per_observation"] for kind in (f"overlap_{loop}" for loop in LOOPS)]
        shown.add_row(steps, *(f"{value:.3f}" for value in (*values, found["least_overlap_ms"])))
    return shown


if __name__ == "__main__":
    main()
