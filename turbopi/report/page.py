"""One self-contained HTML page: style, tiles, tables, pictures inside the file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

STRIP_FRAMES = 8

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #66707c; --line: #d8dde3; --card: #f5f7f9; --paper: #fff;
  --accent: #1f6feb; --bar: #6ea1f2; --good: #2da44e; --bad: #cf3f4f; --none: #a8b0b9;
  --c0: #4a7fd4; --c1: #e0913a; --c2: #3a9d76; --c3: #8b6fc7; --c4: #a9b2bc; --c5: #c75a86; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --soft: #98a2ae; --line: #38414c; --card: #20262e;
  --paper: #161b22; --accent: #5b9cf5; --bar: #3f74c2; --good: #3fb860; --bad: #e4606e; --none: #59626d; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1040px; padding: 28px 20px 60px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 16px; margin: 34px 0 8px; }
p { margin: 6px 0; } .soft { color: var(--soft); } .verdict { font-size: 18px; margin: 8px 0 18px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; }
.tile { background: var(--card); border-radius: 8px; padding: 10px 14px; min-width: 130px; }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; } th { color: var(--soft); font-weight: 600; }
a { color: var(--accent); } svg { display: block; max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg text.soft { fill: var(--soft); }
.strip { margin: 10px 0 18px; } .strip div { display: flex; flex-wrap: wrap; gap: 3px; }
.strip img { width: calc(25% - 3px); height: auto; flex: none; border-radius: 3px; }
video { width: 100%; max-width: 768px; border-radius: 4px; }
.legend span { margin-right: 18px; font-size: 13px; color: var(--soft); white-space: nowrap; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.ok { color: var(--good); } .bad { color: var(--bad); }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page; `parts` are HTML already."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
    )
    return "\n".join([head, *parts, "</body></html>", ""])


def heading(text: str, note: str = "") -> str:
    """A section's heading, and a soft line below it."""
    return f"<h2>{escape(text)}</h2>" + (f'<p class="soft">{escape(note)}</p>' if note else "")


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """(number, what it is) as a row of cards."""
    cards = "".join(f'<div class="tile"><b>{escape(n)}</b><span>{escape(what)}</span></div>' for n, what in values)
    return f'<div class="tiles">{cards}</div>'


def legend(names: Mapping[str, str]) -> str:
    """What the colours of a plot mean: name to colour."""
    entries = "".join(f'<span><i style="background: {c}"></i>{escape(name)}</span>' for name, c in names.items())
    return f'<p class="legend">{entries}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def flat_rows(values: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested JSON values as (dotted name, value) rows."""
    if isinstance(values, dict) and values:
        prefix = f"{name}." if name else ""
        return [row for key, value in values.items() for row in flat_rows(value, f"{prefix}{key}")]
    return [(name, values if isinstance(values, str) else json.dumps(values))]


def film_strip(directory: Path, frames: Sequence[str]) -> str:
    """Up to `STRIP_FRAMES` of the pictures in `directory`, evenly spread from the first to the last."""
    last, count = len(frames) - 1, min(STRIP_FRAMES, len(frames))
    chosen = [frames[round(i * last / max(count - 1, 1))] for i in range(count)]
    return f"<div>{''.join(picture(directory / name, Path(name).stem) for name in chosen)}</div>"


def picture(path: Path, title: str) -> str:
    """A JPEG or PNG inside the page. Raises FileNotFoundError if it is gone."""
    kind = "png" if path.suffix == ".png" else "jpeg"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(title)}" title="{escape(title)}">'
