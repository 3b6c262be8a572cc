"""Plots as SVG inside a page. Colours come from the page's style, so that they follow its light or dark theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 960
_LEFT, _RIGHT, _ROW = 520, 80, 26


@dataclass(frozen=True)
class RateRow:
    """A success rate with its interval, all in 0..1; None without episodes."""

    label: str
    rate: float | None
    interval: tuple[float, float] | None
    note: str


@dataclass(frozen=True)
class Cell:
    """One episode in the grid: "good", "bad" or "none", and what a pointer over it shows."""

    kind: str
    title: str


def rate_chart(rows: Sequence[RateRow]) -> str:
    """Rates as dots with whiskers, a row each, 0 to 100 %."""
    height, span = _ROW * len(rows) + 34, WIDTH - _LEFT - _RIGHT
    parts = []
    for percent in range(0, 101, 20):
        x = _LEFT + span * percent / 100
        parts += [_line(x, 6, x, height - 22, "var(--line)"), _text(x, height - 6, f"{percent} %", "middle", True)]
    for index, row in enumerate(rows):
        y = 18 + _ROW * index
        parts.append(_text(_LEFT - 14, y + 4, _shortened(row.label), "end"))
        parts.append(_text(WIDTH - _RIGHT + 14, y + 4, row.note, "start", True))
        if row.rate is None or row.interval is None:
            continue
        low, high = (_LEFT + span * value for value in row.interval)
        parts.append(_line(low, y, high, y, "var(--accent)", 3))
        parts.append(f'<circle cx="{_LEFT + span * row.rate:.1f}" cy="{y}" r="5.5" fill="var(--accent)"/>')
    return _svg(height, parts)


def episode_grid(rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """A square per episode, a row per task."""
    columns = max((len(cells) for _, cells in rows), default=1)
    side = min(22.0, (WIDTH - 120) / max(columns, 1))
    height = int(side * len(rows)) + 10
    parts = []
    for row, (label, cells) in enumerate(rows):
        y = 4 + side * row
        parts.append(_text(86, y + side / 2 + 4, label, "end"))
        for column, cell in enumerate(cells):
            parts.append(
                f'<rect x="{100 + side * column:.1f}" y="{y:.1f}" width="{side - 2:.1f}" height="{side - 2:.1f}" '
                f'rx="3" fill="var(--{cell.kind})"><title>{escape(cell.title)}</title></rect>'
            )
    return _svg(height, parts)


def histogram(values: Sequence[float], unit: str, marks: Mapping[str, float], bins: int = 48) -> str:
    """Counts of values; `marks` are named positions. The last bin takes all that lies beyond 1.5 × the largest mark."""
    low = min(values)
    high = min(max(values), 1.5 * max(marks.values())) if marks else max(values)
    width = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / width))] += 1
    bottom, top, step = 150, 22, WIDTH / bins
    parts = [
        f'<rect x="{i * step + 1:.1f}" y="{bottom - (bottom - top) * n / max(counts):.1f}" width="{step - 2:.1f}" '
        f'height="{(bottom - top) * n / max(counts):.1f}" fill="var(--accent)" opacity="0.75">'
        f"<title>{low + i * width:.1f} to {low + (i + 1) * width:.1f} {escape(unit)}: {n}</title></rect>"
        for i, n in enumerate(counts)
    ]
    for level, (name, value) in enumerate(marks.items()):
        x = min(WIDTH - 1.0, (value - low) / (width * bins) * WIDTH)
        anchor = "end" if x > WIDTH * 0.8 else "start"
        parts.append(_line(x, 4, x, bottom, "var(--bad)"))
        parts.append(_text(x + (-4 if anchor == "end" else 4), 14 + 14 * level, f"{name} {value:.1f}", anchor))
    parts.append(_line(0, bottom, WIDTH, bottom, "var(--line)"))
    parts.append(_text(0, bottom + 16, f"{low:.1f} {unit}", "start", True))
    parts.append(_text(WIDTH, bottom + 16, f"{low + width * bins:.1f} {unit}", "end", True))
    return _svg(bottom + 22, parts)


def _shortened(text: str, limit: int = 84) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}" '
        'stroke-linecap="round"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, soft: bool = False) -> str:
    kind = ' class="soft"' if soft else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _svg(height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">{"".join(parts)}</svg>'
