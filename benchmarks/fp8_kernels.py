"""The full model's products in E4M3: cuBLASLt against Triton's tiles, and what bf16 takes.

    python benchmarks/fp8_kernels.py            # with the tiles that turbopi/kernels/tuned has for this GPU
    python benchmarks/fp8_kernels.py --tune     # find the best first; where they beat the library, write them there

Each time is of one launch in a CUDA graph of many, operands changing until two L2 caches are full, as in
benchmarks/kernels.py. "engine" is what the engine does with the tuned file as it is in the end.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from fp8_cases import Fp8Call, all_cases
from kernel_cases import Case
from kernels import compile_all, error_of, graph_us, operand_sets
from rich.console import Console
from rich.table import Table

from turbopi.bench import write_receipt
from turbopi.bench.ceilings import measure_ceilings
from turbopi.engine.turbo.fp8_ops import FEW_ROWS
from turbopi.kernels import E4M3, GemmConfig, tuning

MAX_ERROR, MAX_ERROR_E4M3 = 5e-2, 1e-1
"""Of the largest value: what short sums of 16384 products may cost, and a step of E4M3 beside it."""
MARGIN = 0.98
"""Triton is taken where it needs less than this part of the library's time: the rest is noise."""


@dataclass(frozen=True)
class Options:
    """What to do."""

    tune: bool = False
    """Try every tile of benchmarks/fp8_cases.py and keep the best."""
    only: str = ""
    """Only products whose name contains this, such as "prefix" or "expert down 10"."""
    budget_s: float = 45.0
    """Seconds after which tuning keeps what it has found."""
    workers: int = min(16, os.cpu_count() or 1)
    """Processes that compile before tuning."""
    repeats: int = 5
    """Timed replays of each graph; the median is kept."""
    out: Path | None = None
    """The receipt; the default name says on which GPU."""


def wrong(call: Fp8Call, config: GemmConfig | None) -> str | None:
    """What is wrong with a kernel's result, if anything."""
    error = error_of(call, config)
    return f"error {error:.1e}" if error > (MAX_ERROR_E4M3 if call.outputs[0].dtype == E4M3 else MAX_ERROR) else None


def best_tiles(
    case: Case, options: Options, failures: dict[str, str]
) -> tuple[float, GemmConfig | None, dict[str, float]]:
    """The fastest tiles that are right, their microseconds, and every candidate's."""
    sets, times = operand_sets(case), {}
    best: tuple[float, GemmConfig | None] = (float("inf"), None)
    for config in case.candidates:
        name = f"{case.op} {config}"
        if name in failures:
            continue
        if (found := wrong(sets[0], config)) is not None:
            failures[f"{name} {case.where}"] = found
            continue
        us = graph_us([lambda call=call, config=config: call.run(config) for call in sets], options.repeats)
        times[str(config)] = us
        best = min(best, (us, config), key=lambda pair: pair[0])
    return *best, times


def tune(cases: list[Case], options: Options, console: Console) -> dict[str, Any]:
    """Find the best tiles, keep those that win. Returns what was tried, for the receipt."""
    start = time.perf_counter()
    failures = compile_all(cases, options.workers)
    console.print(f"compiled in {time.perf_counter() - start:.0f} s, {len(failures)} candidates failed")
    file = tuning.gpu_file(torch.device("cuda"))
    known = json.loads(file.read_text()) if file.is_file() else {"gpu": torch.cuda.get_device_name()}
    configs, tried = known.setdefault("configs", {}), {}
    for case in cases:
        if time.perf_counter() - start > options.budget_s:
            failures[case.where] = "not tuned: out of budget"
            continue
        us, config, times = best_tiles(case, options, failures)
        library = None
        if case.sizes[0] > FEW_ROWS:
            library = graph_us([call.ways["library"] for call in operand_sets(case)], options.repeats)
        tried[case.where] = times | {"library": library}
        entries, key = configs.setdefault(case.op, {}), tuning.key(E4M3, case.sizes)
        entries.pop(key, None)
        if config is not None and (library is None or us < MARGIN * library):
            entries[key] = asdict(config)
    known["configs"] = {op: entries for op, entries in configs.items() if entries}
    file.write_text(json.dumps(known, indent=1) + "\n")
    tuning.forget()
    console.print(f"tuned in {time.perf_counter() - start:.0f} s: {file}")
    return {"failures": failures, "candidates_us": tried}


def engines_way(case: Case, call: Fp8Call) -> tuple[str, GemmConfig | None]:
    """Which way it is, and with which tiles if it is Triton's."""
    if case.sizes[0] > FEW_ROWS and "tiled" in call.ways:
        return "tiled", None
    if case.op in ("fp8_linear", "fp8_stream_linear") and case.variant == "fp8 plain":
        return "two scales", None
    found = tuning.tuned(case.op, GemmConfig, call.outputs[0].new_empty(0, dtype=E4M3), case.sizes)
    return ("triton" if found is not None or case.sizes[0] <= FEW_ROWS else "library"), found


def measure(case: Case, options: Options) -> dict[str, Any]:
    """One line of the report."""
    sets: list[Fp8Call] = operand_sets(case)
    way, config = engines_way(case, sets[0])
    found = wrong(sets[0], config)
    times = {"triton": graph_us([lambda call=call: call.run(config) for call in sets], options.repeats)}
    for name in sets[0].ways:
        if case.sizes[0] > FEW_ROWS or name == "bf16":
            times[name] = graph_us([call.ways[name] for call in sets], options.repeats)
    first = sets[0]
    return {
        "where": case.where,
        "sizes": list(case.sizes),
        "way": way,
        "tiles": None if config is None else asdict(config),
        "us": times,
        "engine_us": times[way],
        "bytes": first.bytes,
        "flops": first.flops,
        "wrong": found,
        "sum_errors": first.sum_errors(),
    }


def report(lines: list[dict[str, Any]], title: str) -> Table:
    """Microseconds of every way, and what each way of summing costs, relative."""
    ways = ("triton", "library", "bf16", "channel scales", "two scales", "exact sums", "tiled")
    sums = ("fast", "exact", "triton")
    names = ("product", "M x N x K", "engine", "us", *ways, "TFLOP/s", "GB/s", *(f"{name} sums" for name in sums))
    table = Table(*names, title=title)
    for line in lines:
        times = [f"{line['us'][way]:.1f}" if way in line["us"] else "" for way in ways]
        us = line["engine_us"]
        rates = f"{line['flops'] / us / 1e6:.0f}", f"{line['bytes'] / us / 1e3:.0f}"
        errors = [f"{line['sum_errors'][name]:.1e}" if name in line["sum_errors"] else "" for name in sums]
        sizes = "x".join(map(str, line["sizes"]))
        table.add_row(line["where"], sizes, line["way"], f"{us:.1f}", *times, *rates, *errors)
    return table


def main() -> None:
    """Tune if asked, measure, print, write the receipt."""
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=200)
    torch.manual_seed(0)
    cases = [case for case in all_cases() if options.only in case.where]
    tried = tune(cases, options, console) if options.tune else {}
    ceilings = measure_ceilings(torch.device("cuda"), torch.bfloat16)
    lines = [measure(case, options) for case in cases]
    console.print(report(lines, f"{torch.cuda.get_device_name()}, microseconds"))
    gpu = tuning.gpu_file(torch.device("cuda")).stem
    out = options.out or Path(__file__).parent / "results" / f"fp8_kernels_{gpu}.json"
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    results = {"products": lines, "bf16_ceilings": asdict(ceilings), "tuning": tried}
    write_receipt(out, "products in E4M3", results, settings)
    if bad := [f"{line['where']} ({line['wrong']})" for line in lines if line["wrong"]]:
        raise SystemExit(f"wrong results: {', '.join(bad)}")


if __name__ == "__main__":
    main()
