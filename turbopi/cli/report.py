"""`turbo-pi report`: draw what a sweep has measured."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console


def report(sweep: Path) -> int:
    """Draw the Pareto front of a sweep, success against latency, into its directory.

    Args:
        sweep: the --out directory of `turbo-pi sweep`; one that is still running, too.
    """
    from ..report import write_sweep_report

    Console(soft_wrap=True).print(f"wrote {write_sweep_report(sweep)}", markup=False, highlight=False)
    return 0
