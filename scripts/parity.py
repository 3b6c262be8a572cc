"""Compare the reference with golden records of openpi, lerobot and the JAX original, tap by tap.

    python scripts/parity.py tests/data/tiny tests/data/long            # seconds
    python scripts/parity.py ../shared/fixtures/full                    # the real 3.3B models: 16 GiB, minutes
    python scripts/parity.py --mkl-intel-path tests/data/tiny           # bit for bit on any x86-64 CPU

Prints a table, and with --out writes it as a JSON receipt.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from turbopi.audit.golden import Golden, compare, open_golden
from turbopi.bench import write_receipt

SHIM = Path(__file__).with_name("mkl_intel_path.c")


@dataclass(frozen=True)
class Options:
    """What to compare."""

    records: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Golden files, or directories of them."""
    device: str = "cpu"
    """Where the reference runs."""
    threads: int = 2
    """CPU threads; the records were made with two."""
    mkl_intel_path: bool = False
    """Make MKL take its Intel code path (needs a C compiler)."""
    out: Path | None = None
    """Write the results here as JSON."""


def run_with_intel_path() -> int:
    """Run this command again with the shim preloaded."""
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "mkl_intel_path.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, SHIM], check=True)
        environment = os.environ | {"LD_PRELOAD": str(library)}
        return subprocess.run([sys.executable, *sys.argv], env=environment).returncode


def golden_files(paths: tuple[Path, ...]) -> list[Path]:
    """The golden files among `paths`; inputs of other tests (weights, guided runs) lie beside them."""
    files = [f for p in paths for f in (sorted(p.glob("*.safetensors")) if p.is_dir() else [p])]
    return [f for f in files if not f.name.startswith("weights_") and "_rtc" not in f.name]


def measure(golden: Golden, options: Options) -> dict[str, Any]:
    """Compare one record; the row of the receipt."""
    start = time.perf_counter()
    model = golden.build(device=options.device)
    built = time.perf_counter()
    errors = compare(golden, model)
    worst = max(errors, key=lambda e: e.relative)
    actions = next(e for e in errors if e.name == "actions")
    return {
        "record": golden.path.name.removesuffix(".safetensors"),
        "profile": golden.numerics,
        "taps": len(errors),
        "bit_equal": sum(e.equal for e in errors),
        "worst_tap": worst.name,
        "worst_relative": worst.relative,
        "actions_relative": actions.relative,
        "actions_max_relative": actions.max_relative,
        "build_s": round(built - start, 1),
        "run_s": round(time.perf_counter() - built, 1),
    }


def main() -> int:
    """Compare and report."""
    options = tyro.cli(Options, description=__doc__)
    if options.mkl_intel_path and "mkl_intel_path" not in os.environ.get("LD_PRELOAD", ""):
        return run_with_intel_path()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")
    rows = []
    table = Table("record", "profile", "bit-equal", "worst tap", "relative rms", "actions", title="parity")
    for path in golden_files(options.records):
        row = measure(open_golden(path), options)
        rows.append(row)
        table.add_row(
            row["record"],
            row["profile"],
            f"{row['bit_equal']}/{row['taps']}",
            row["worst_tap"],
            f"{row['worst_relative']:.1e}",
            f"{row['actions_relative']:.1e}",
        )
    Console(width=120).print(table)
    if options.out is not None:
        config = {"device": options.device, "threads": options.threads, "mkl_intel_path": options.mkl_intel_path}
        write_receipt(options.out, "parity of the reference with golden records", {"rows": rows}, config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
