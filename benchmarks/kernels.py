"""Every Triton kernel at the full model's shapes: time, share of the GPU's own ceiling, torch's time, error.

    python benchmarks/kernels.py            # with the tiles that turbopi/kernels/tuned has for this GPU
    python benchmarks/kernels.py --tune     # find the best tiles first, and write them there

Each time is of one launch in a CUDA graph of many. Operands change from launch to launch until two L2 caches are full
(at most 64 sets), so that weights come from memory. The error is against the twin in float32, of its largest value.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from kernel_cases import Call, Case, all_cases
from kernel_tiles import Config
from rich.console import Console
from rich.table import Table

from turbopi.bench import write_receipt
from turbopi.bench.ceilings import measure_ceilings
from turbopi.kernels import tuning

MAX_SETS, MIN_LAUNCHES = 64, 32
# Twice bfloat16's rounding of the largest value, and the rounded attention weights.
MAX_ERROR = 2e-2


@dataclass(frozen=True)
class Options:
    """What to do."""

    tune: bool = False
    """Try every tile of benchmarks/kernel_cases.py and write the best."""
    only: str = ""
    """Only ops whose name or place contains this."""
    budget_s: float = 200.0
    """Seconds after which tuning keeps what it has found."""
    workers: int = min(16, os.cpu_count() or 1)
    """Processes that compile before tuning."""
    repeats: int = 7
    """Timed replays of each graph; the median is kept."""
    out: Path | None = None
    """The receipt; the default name says on which GPU."""


def operand_sets(case: Case) -> list[Call]:
    """Enough sets of operands to fill two L2 caches."""
    first = case.build()
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(MAX_SETS, -(-2 * cache // first.bytes))
    return [first, *(case.build() for _ in range(count - 1))]


def graph_us(work: Sequence[Callable[[], object]], repeats: int) -> float:
    """Microseconds of one launch: the median replay of a graph that goes through `work` in turn."""
    launches, times = max(len(work), MIN_LAUNCHES), []
    torch.cuda.synchronize()
    # Captured by hand: torch.cuda.graph also empties the allocator's cache, over a thousand times in a tuning run.
    with torch.cuda.stream(torch.cuda.Stream()):
        work[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for launch in range(launches):
            work[launch % len(work)]()
        graph.capture_end()
        graph.replay()
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return 1e3 * sorted(times)[len(times) // 2] / launches


def error_of(call: Call, config: Config | None) -> float:
    """Largest difference from the float32 twin, of the twin's largest value; NaN counts as infinite."""
    wants = call.want()
    call.run(config)
    errors = [
        ((got.float() - want).abs().max() / want.abs().max()).item()
        for got, want in zip(call.outputs, wants, strict=True)
    ]
    return max(float("inf") if error != error else error for error in errors)


def compile_one(case: Case, config: Config) -> str | None:
    """In a worker process: launch once, so that the compiled kernel is in Triton's disk cache. Returns what failed."""
    try:
        case.build().run(config)
        torch.cuda.synchronize()
    except Exception as error:  # whatever a candidate dies of, the others go on; it is reported
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return None


def compile_all(cases: list[Case], workers: int) -> dict[str, str]:
    """Compile every candidate once, in parallel. Returns the failures by name."""
    jobs: dict[tuple[Any, ...], tuple[Case, Config]] = {}
    for case in cases:
        for config in case.candidates:
            depth = 0 if not hasattr(config, "block_k") else case.sizes[2] % config.block_k
            jobs.setdefault((case.op, case.variant, config, depth), (case, config))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(compile_one, *zip(*jobs.values(), strict=True), chunksize=4)) if jobs else []
    names = [f"{op} {config}" for op, _, config, _ in jobs]
    return {name: failure for name, failure in zip(names, results, strict=True) if failure is not None}


def best_config(case: Case, repeats: int, failures: dict[str, str]) -> tuple[Config | None, dict[str, float]]:
    """The fastest candidate that is right, None if there is none; and every candidate's time."""
    sets, times = operand_sets(case), {}
    best: tuple[float, Config | None] = (float("inf"), None)
    for config in case.candidates:
        if f"{case.op} {config}" in failures:
            continue
        error = error_of(sets[0], config)
        if error > MAX_ERROR:
            failures[f"{case.op} {case.sizes} {config}"] = f"error {error:.1e}"
            continue
        us = graph_us([lambda call=call, config=config: call.run(config) for call in sets], repeats)
        times[str(config)] = us
        best = min(best, (us, config), key=lambda pair: pair[0])
    return best[1], times


def tune(cases: list[Case], options: Options, console: Console) -> dict[str, Any]:
    """Find and write the best tiles. Returns what was tried, for the receipt."""
    tunable = [case for case in cases if case.candidates]
    start = time.perf_counter()
    failures = compile_all(tunable, options.workers)
    console.print(f"compiled in {time.perf_counter() - start:.0f} s, {len(failures)} candidates failed")
    file = tuning.gpu_file(torch.device("cuda"))
    configs = json.loads(file.read_text())["configs"] if file.is_file() else {}
    tried: dict[str, Any] = {}
    for case in tunable:
        name = f"{case.op} {tuning.key(torch.bfloat16, case.sizes)}"
        if name in tried:
            continue
        if time.perf_counter() - start > options.budget_s:
            failures[name] = "not tuned: out of budget"
            continue
        best, tried[name] = best_config(case, 3, failures)
        if best is not None:
            configs.setdefault(case.op, {})[tuning.key(torch.bfloat16, case.sizes)] = asdict(best)
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "command": "benchmarks/kernels.py --tune"}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(facts | {"configs": configs}, indent=1) + "\n")
    tuning.forget()
    console.print(f"tuned in {time.perf_counter() - start:.0f} s: {file}")
    return {"failures": failures, "candidates_us": tried}


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """One line of the report."""
    error = error_of(case.build(), None)
    sets = operand_sets(case)
    us = graph_us([lambda call=call: call.run(None) for call in sets], repeats)
    others = [call.other for call in sets if call.other is not None]
    other_us = graph_us(others, repeats) if others else None
    return {
        "op": case.op,
        "where": case.where,
        "sizes": list(case.sizes),
        "sets": len(sets),
        "us": us,
        "bytes": sets[0].bytes,
        "flops": sets[0].flops,
        "error": error,
        "other": sets[0].other_name,
        "other_us": other_us,
    }


def report(lines: list[dict[str, Any]], ceilings: Any) -> Table:
    """Each kernel beside the ceiling that its bytes or operations are nearer to."""
    table = Table("op", "where", "sizes", "us", "achieved", "of ceiling", "torch us", "by", "error")
    reached = f"{ceilings.bytes_per_s / 1e12:.2f} TB/s copy, {ceilings.flops_per_s / 1e12:.0f} TFLOP/s product"
    table.title = f"{torch.cuda.get_device_name()}, its own ceilings: {reached}"
    for line in lines:
        seconds = line["us"] / 1e6
        bandwidth, speed = line["bytes"] / seconds, line["flops"] / seconds
        by_bytes, by_flops = bandwidth / ceilings.bytes_per_s, speed / ceilings.flops_per_s
        achieved = f"{bandwidth / 1e9:.0f} GB/s" if by_bytes >= by_flops else f"{speed / 1e12:.0f} TFLOP/s"
        other = "" if line["other_us"] is None else f"{line['other_us']:.1f}"
        sizes, share = "x".join(map(str, line["sizes"])), f"{max(by_bytes, by_flops):.0%}"
        error = f"{line['error']:.1e}"
        table.add_row(
            line["op"], line["where"], sizes, f"{line['us']:.1f}", achieved, share, other, line["other"], error
        )
    return table


def main() -> None:
    """Tune if asked, measure, print, write the receipt."""
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=140)
    torch.manual_seed(0)
    cases = [case for case in all_cases() if options.only in f"{case.op} {case.where}"]
    tried = tune(cases, options, console) if options.tune else {}
    ceilings = measure_ceilings(torch.device("cuda"), torch.bfloat16)
    lines = [measure(case, options.repeats) for case in cases]
    console.print(report(lines, ceilings))
    gpu = tuning.gpu_file(torch.device("cuda")).stem
    out = options.out or Path(__file__).parent / "results" / f"kernels_{gpu}.json"
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    write_receipt(out, "Triton kernels", {"kernels": lines, "ceilings": asdict(ceilings), "tuning": tried}, settings)
    wrong = [line for line in lines if not line["error"] <= MAX_ERROR]
    if wrong:
        raise SystemExit(f"wrong results: {', '.join(line['op'] + ' ' + line['where'] for line in wrong)}")


if __name__ == "__main__":
    main()
