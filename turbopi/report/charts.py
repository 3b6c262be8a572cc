"""Plots over many episodes: success rates, outcomes, lengths, latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .svg import WIDTH, box, dot, line, linked, shortened, svg, text, ticks

_LEFT, _RIGHT, _ROW = 330, 80, 26
_LABEL_CHARACTERS = 46


@dataclass(frozen=True)
class RateRow:
    """A success rate with its interval, all in 0..1; None without episodes."""

    label: str
    rate: float | None
    interval: tuple[float, float] | None
    note: str


@dataclass(frozen=True)
class Episode:
    """One episode in a plot.

    Attributes:
        column: where it stands in the grid; its initial state.
        steps: its length.
        kind: "good", "bad" or "none".
        title: what a pointer over it shows.
        video: address of its film.
    """

    column: int
    steps: int
    kind: str
    title: str
    video: str | None = None


def rate_chart(rows: Sequence[RateRow]) -> str:
    """Rates as dots with whiskers, a row each, 0 to 100 %."""
    parts, span = _scale([20.0 * i for i in range(6)], 100, len(rows), " %"), WIDTH - _LEFT - _RIGHT
    for index, row in enumerate(rows):
        y = 18 + _ROW * index
        parts.append(_row_label(row.label, y))
        parts.append(text(WIDTH - _RIGHT + 14, y + 4, row.note, soft=True))
        if row.rate is None or row.interval is None:
            continue
        low, high = (_LEFT + span * value for value in row.interval)
        parts.append(line(low, y, high, y, "var(--accent)", 3))
        parts.append(dot(_LEFT + span * row.rate, y, 5.5, "var(--accent)"))
    return svg(_height(len(rows)), parts)


def length_chart(rows: Sequence[tuple[str, Sequence[Episode]]]) -> str:
    """Steps of every episode as dots, a row per task."""
    longest = max((episode.steps for _, episodes in rows for episode in episodes), default=0) or 1
    parts, span = _scale(ticks(0, longest), longest, len(rows), ""), WIDTH - _LEFT - _RIGHT
    for index, (label, episodes) in enumerate(rows):
        y = 18 + _ROW * index
        parts.append(_row_label(label, y))
        for e in episodes:
            mark = dot(_LEFT + span * e.steps / longest, y, 5, f"var(--{e.kind})", e.title, opacity=0.6)
            parts.append(linked(mark, e.video))
    return svg(_height(len(rows)), parts)


def episode_grid(rows: Sequence[tuple[str, Sequence[Episode]]]) -> str:
    """A square per episode, a row per task, a column per initial state; filmed ones lead to their film."""
    columns = 1 + max((episode.column for _, episodes in rows for episode in episodes), default=0)
    side = min(24.0, (WIDTH - 80) / columns)
    parts = [text(64 + side * (c + 0.5), 12, str(c), "middle", soft=True) for c in range(0, columns, 5)]
    for row, (label, episodes) in enumerate(rows):
        y = 20 + side * row
        parts.append(text(0, y + side / 2 + 4, label))
        for e in episodes:
            x = 64 + side * e.column
            parts.append(linked(box(x, y, side - 2, side - 2, f"var(--{e.kind})", e.title, radius=3), e.video))
            if e.video is not None:
                centre = (x + side / 2 - 1, y + side / 2 - 1)
                parts.append(linked(dot(*centre, side / 6, "var(--paper)", e.title), e.video))
    return svg(24 + side * len(rows), parts)


def histogram(values: Sequence[float], unit: str, marks: Mapping[str, float], bins: int = 48) -> str:
    """Counts of values; `marks` are named positions. The last bin takes all that lies beyond 1.5 × the largest mark."""
    low = min(values)
    high = min(max(values), 1.5 * max(marks.values())) if marks else max(values)
    width = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / width))] += 1
    bottom, top, step = 190, 22 + 14 * len(marks), WIDTH / bins
    parts = []
    for i, n in enumerate(counts):
        height = (bottom - top) * n / max(counts)
        title = f"{low + i * width:.1f} to {low + (i + 1) * width:.1f} {unit}: {n}"
        parts.append(box(i * step + 1, bottom - height, step - 2, height, "var(--bar)", title))
    for level, (name, value) in enumerate(marks.items()):
        x = min(WIDTH - 1.0, (value - low) / (width * bins) * WIDTH)
        side, anchor = (-5, "end") if x > WIDTH * 0.8 else (5, "start")
        parts.append(line(x, 4 + 14 * level, x, bottom, "var(--bad)"))
        parts.append(text(x + side, 14 + 14 * level, f"{name} {value:.1f} {unit}", anchor))
    parts.append(line(0, bottom, WIDTH, bottom, "var(--line)"))
    for value in ticks(low, low + width * bins):
        x = (value - low) / (width * bins) * WIDTH
        anchor = "start" if x < 20 else "end" if x > WIDTH - 20 else "middle"
        parts.append(text(x, bottom + 17, f"{value:g} {unit}", anchor, soft=True))
    return svg(bottom + 24, parts)


def _scale(values: Sequence[float], largest: float, rows: int, unit: str) -> list[str]:
    """Vertical lines at `values` behind rows that share an axis from 0 to `largest`."""
    height = _height(rows)
    parts = []
    for value in values:
        x = _LEFT + (WIDTH - _LEFT - _RIGHT) * value / largest
        parts.append(line(x, 6, x, height - 22, "var(--line)"))
        parts.append(text(x, height - 6, f"{value:g}{unit}", "middle", soft=True))
    return parts


def _row_label(label: str, y: float) -> str:
    return text(0, y + 4, shortened(label, _LABEL_CHARACTERS), title=label)


def _height(rows: int) -> int:
    return _ROW * rows + 34
