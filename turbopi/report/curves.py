"""Plots of measurements: parts of a whole as bars, and values along an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .svg import COLOURS, WIDTH, box, dot, line, path, shortened, svg, text, ticks

_LABEL, _LABEL_CHARACTERS = 170, 24
_LEFT, _BOTTOM, _CEILING = 60, 250, 30


@dataclass(frozen=True)
class StackRow:
    """Parts that add up to a whole, (name, value) each; a mark where the least possible lies, if that is known."""

    label: str
    parts: Sequence[tuple[str, float]]
    mark: float | None = None


def stack_chart(rows: Sequence[StackRow], unit: str) -> str:
    """A bar of parts for each row, on one scale from 0, with the parts' names above."""
    names = list(dict.fromkeys(name for row in rows for name, _ in row.parts))
    scale = (WIDTH - _LABEL - 90) / (max(sum(value for _, value in row.parts) for row in rows) or 1.0)
    parts = _legend(names, _LABEL)
    for index, row in enumerate(rows):
        y, x = 28 + 36 * index, float(_LABEL)
        parts.append(text(_LABEL - 12, y + 16, shortened(row.label, _LABEL_CHARACTERS), "end", title=row.label))
        for name, value in row.parts:
            title = f"{name} {value:.3g} {unit}"
            parts.append(box(x, y, max(value * scale - 1, 0.5), 22, _colour(names.index(name)), title, radius=2))
            x += value * scale
        parts.append(text(x + 8, y + 16, f"{sum(value for _, value in row.parts):.2f} {unit}"))
        if row.mark is not None:
            place = _LABEL + row.mark * scale
            parts.append(line(place, y - 4, place, y + 26, "var(--bad)", 2))
    return svg(34 + 36 * len(rows), parts)


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, marks: Mapping[str, float]
) -> str:
    """Points joined by lines; y from 0, x over what there is; `marks` are named places on x."""
    points = [point for values in series.values() for point in values]
    low, high, top = min(x for x, _ in points), max(x for x, _ in points), max(y for _, y in points) or 1.0
    right = WIDTH - 20

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (right - _LEFT) * (x - low) / ((high - low) or 1.0), _BOTTOM - (_BOTTOM - _CEILING) * y / top

    parts = _legend(list(series), _LEFT)
    for value in ticks(0, top):
        y = place(low, value)[1]
        parts += [line(_LEFT, y, right, y, "var(--line)"), text(_LEFT - 8, y + 4, f"{value:g}", "end", soft=True)]
    for value in ticks(low, high):
        parts.append(text(place(value, 0)[0], _BOTTOM + 17, f"{value:g}", "middle", soft=True))
    for name, x in marks.items():
        at = place(x, 0)[0]
        parts += [line(at, _CEILING, at, _BOTTOM, "var(--bad)"), text(at + 4, _CEILING + 12, name)]
    for index, (name, values) in enumerate(series.items()):
        parts.append(path([place(*point) for point in values], _colour(index)))
        for x, y in values:
            parts.append(dot(*place(x, y), 3, _colour(index), f"{name}: {x:g} {across}, {y:.4g} {up}"))
    return svg(_BOTTOM + 24, parts)


def _legend(names: Sequence[str], left: float) -> list[str]:
    parts, x = [], left
    for index, name in enumerate(names):
        parts += [box(x, 2, 12, 12, _colour(index), radius=2), text(x + 18, 12, name, soft=True)]
        x += 42 + 7 * len(name)
    return parts


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
