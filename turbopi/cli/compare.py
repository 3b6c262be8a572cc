"""`turbo-pi compare`: two evaluations over the same episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table


def compare(
    a: Annotated[Path, tyro.conf.Positional],
    b: Annotated[Path, tyro.conf.Positional],
    minimum: int = 50,
    json_out: Path | None = None,
) -> int:
    """Compare two runs of `turbo-pi eval` episode by episode, with McNemar's exact test.

    Args:
        a: directory of the run to measure against.
        b: directory of the other run.
        minimum: pairs below which no verdict is given.
        json_out: file to write the comparison to.
    """
    from ..sim.compare import compare as compare_runs
    from ..sim.episodes_file import write_json

    result = compare_runs(a, b, minimum)
    console = Console(soft_wrap=True)
    for change in result["configuration"]:
        console.print(change, markup=False, highlight=False)
    console.print(pair_table(result))
    for name in ("a", "b"):
        low, high = result["total"][f"interval_{name}"]
        rate = result["total"][f"rate_{name}"]
        console.print(
            f"{name.upper()} {result[name]}: {100 * rate:.1f} % ({100 * low:.1f} to {100 * high:.1f} %), "
            f"{result['left_out'][name]} episodes without a partner left out",
            markup=False,
            highlight=False,
        )
    console.print(result["verdict"], markup=False, highlight=False)
    if json_out is not None:
        write_json(json_out, result)
    return 0


def pair_table(result: dict[str, Any]) -> Table:
    """Pairs per task and in all; initial states of the discordant ones."""
    table = Table("task", "pairs", "both", "only A", "only B", "neither", "states only A", "states only B")
    names = ("pairs", "both", "only_a", "only_b", "neither")
    for task in result["tasks"]:
        states = (", ".join(map(str, task[f"states_{name}"])) for name in ("only_a", "only_b"))
        table.add_row(str(task["task"]), *(str(task[name]) for name in names), *states)
    table.add_row("all", *(str(result["total"][name]) for name in names), style="bold")
    return table
