"""Receipts: a measurement as a JSON file that says what was timed, on what, by which command, and every raw sample."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..files import write_whole

PACKAGES = ("numpy", "torch", "triton", "lerobot", "transformers")
_GPU_QUERY = (
    "nvidia-smi",
    "--query-gpu=driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit,"
    "clocks_event_reasons.active",
    "--format=csv",
)
JETSON = {"nvpmodel": ("nvpmodel", "-q"), "jetson_clocks": ("jetson_clocks", "--show")}
"""On a Jetson the power mode decides the speed, and nvidia-smi does not know it."""


def summary(samples_ms: Sequence[float], keep: int | None = None) -> dict[str, Any]:
    """Percentiles, extremes and spread of samples in milliseconds, and the samples in their order.

    With more than `keep` samples, every k-th is kept in "samples_ms" ("samples_every" is k); the figures are always
    those of all of them, "count". Raises ValueError if there are none.
    """
    values = np.asarray(samples_ms, dtype=float)
    if values.size == 0:
        raise ValueError("no samples to summarise; measure at least one")
    every = 1 if keep is None else -(-values.size // max(keep, 1))
    p50, p90, p99, p99_9 = (float(v) for v in np.percentile(values, (50, 90, 99, 99.9)))
    return {
        "count": int(values.size),
        "median_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "p99_9_ms": p99_9,
        "min_ms": float(values.min()),
        "max_ms": float(values.max()),
        "std_ms": float(values.std()),
        "samples_every": every,
        "samples_ms": [round(float(v), 4) for v in values[::every]],
    }


def machine() -> dict[str, Any]:
    """What the measurement ran on: processor, GPUs and their clocks, versions, threads."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "turbopi": __version__,
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["clocks"] = _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader")
        facts["gpu_state"] = _output(*_GPU_QUERY)
    facts |= {name: said for name, command in JETSON.items() if (said := _output(*command)) is not None}
    return facts


def gpu_state_during(work: Callable[[], object]) -> str | None:
    """The GPUs' clocks, temperature and power while `work` is repeated: idle ones say little. None if nobody knows."""
    try:
        query = subprocess.Popen(_GPU_QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    work()
    while query.poll() is None:
        work()
    said = query.communicate()[0].strip()
    return said if query.returncode == 0 else None


def write_receipt(path: str | Path, what: str, results: dict[str, Any], config: dict[str, Any]) -> Path:
    """Write a receipt: `what` was measured, under which configuration, with which results. Returns its path."""
    path = Path(path)
    receipt = {
        "what": what,
        "command": _command(sys.argv),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "-C", str(Path(__file__).parent), "status", "--porcelain")),
        "machine": machine(),
        "config": config,
        "results": results,
    }
    write_whole(path, (_numbers_on_one_line(json.dumps(receipt, indent=1)) + "\n").encode())
    return path


def _command(arguments: Sequence[str]) -> str:
    """What to type to run this again."""
    program = arguments[0]
    return shlex.join([*((Path(program).name,) if Path(program).suffix == "" else ("python", program)), *arguments[1:]])


def _numbers_on_one_line(text: str) -> str:
    """The same JSON with each list of plain numbers on one line: samples by the thousand stay readable and small."""
    return re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda found: "".join(found.group().split()), text)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, None if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
