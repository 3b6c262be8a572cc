"""`turbo-pi doctor`: what a checkpoint is, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


def doctor(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    robot: str | None = None,
    horizon: int | None = None,
    tokenizer: Path | None = None,
    asset_id: str | None = None,
    scan_values: bool = True,
    json_out: Path | None = None,
) -> int:
    """Examine a checkpoint. The exit status is 1 if a check fails.

    Args:
        checkpoint: its directory.
        robot: whose policy it should be.
        horizon: actions per chunk that you expect.
        tokenizer: the tokenizer that you will use.
        asset_id: which norm stats, where there are several.
        scan_values: read every weight in search of NaN and infinity.
        json_out: also write the report here as JSON.
    """
    from ..checkpoint.doctor import examine

    report = examine(
        checkpoint, robot=robot, horizon=horizon, tokenizer=tokenizer, asset_id=asset_id, scan_values=scan_values
    )
    facts = Table("what", "value", title=str(checkpoint))
    for fact in report.facts:
        facts.add_row(fact.name, escape(fact.value))
    checks = Table("check", "result", "detail", "remedy", title="checks")
    for check in report.checks:
        colour = COLOURS[check.status]
        checks.add_row(check.name, f"[{colour}]{check.status}[/]", escape(check.detail), escape(check.remedy))
    console = Console()
    console.print(facts, checks, sep="\n")
    console.print(f"{len(report.failed)} failed, {len(report.warned)} warnings, {len(report.checks)} checks")
    if json_out is not None:
        json_out.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    return 1 if report.failed else 0
