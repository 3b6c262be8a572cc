"""Tables and pictures in docs/, made from receipts.

A table stands between the marks `<!-- NAME -->` and `<!-- end of NAME -->` of a page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"


@dataclass(frozen=True)
class Options:
    """What to do."""

    write: bool = False
    """Put the tables into the page, instead of only printing them."""


def save_picture(figure: Figure, picture: Path) -> None:
    """Write an SVG whose bytes depend on nothing but what it shows."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": picture.name}):
        figure.savefig(picture, metadata={"Date": None})


def fill(page: Path, tables: Mapping[str, Callable[[], str | None]], write: bool) -> None:
    """Print every table, and put it into the page if asked to; None leaves what the page says."""
    text = page.read_text()
    for name, make in tables.items():
        table = make()
        if table is None:
            print(f"no receipt for {name} yet")
            continue
        text = placed(text, name, table)
        print(f"\n{name}\n\n{table}")
    if write:
        page.write_text(text)
        print(f"\nwrote {page}")


def placed(page: str, name: str, table: str) -> str:
    """A page's text with a table between its two marks. Raises ValueError if they are not there once each."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must have the lines {begin!r} and {end!r} once each, around the table")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def receipt(name: str, results: Path = RESULTS) -> dict[str, Any] | None:
    """A whole receipt by its name without ".json"; None if there is none."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
