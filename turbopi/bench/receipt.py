"""Receipts: a measurement as a JSON file that says what was timed, on what, by which command, and every raw sample."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__

PACKAGES = ("numpy", "torch", "triton")


def summary(samples_ms: Sequence[float]) -> dict[str, Any]:
    """Median, p90, p99, smallest and largest of samples in milliseconds, and the samples."""
    values = np.asarray(samples_ms, dtype=float)
    if values.size == 0:
        raise ValueError("no samples to summarise; measure at least one")
    return {
        "median_ms": float(np.median(values)),
        "p90_ms": float(np.percentile(values, 90)),
        "p99_ms": float(np.percentile(values, 99)),
        "min_ms": float(values.min()),
        "max_ms": float(values.max()),
        "samples_ms": [round(float(v), 4) for v in values],
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
    return facts


def write_receipt(path: str | Path, what: str, results: dict[str, Any], config: dict[str, Any]) -> Path:
    """Write a receipt: `what` was measured, under which configuration, with which results. Returns its path."""
    path = Path(path)
    receipt = {
        "what": what,
        "command": " ".join(["python", *sys.argv]),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "-C", str(Path(__file__).parent), "status", "--porcelain")),
        "machine": machine(),
        "config": config,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(receipt, indent=1) + "\n")
    return path


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
