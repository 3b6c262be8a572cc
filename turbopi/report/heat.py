"""Heat maps: a coloured square for each row and column."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .svg import WIDTH, box, shortened, svg, text

_LEFT, _RIGHT, _TOP, _ROW = 110, 72, 70, 22
_WIDEST = 64.0
_LABEL_CHARACTERS = 15
Scale = Callable[[float], float]


@dataclass(frozen=True)
class HeatMap:
    """Values by row and column.

    Attributes:
        rows, columns: labels.
        values: a list a row; None where there is nothing, infinity for what is not a number.
        words: a value as a pointer over it shows it.
        scale: a value to 0..1.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    words: Callable[[float], str]
    scale: Scale


def heat_map(heat: HeatMap) -> str:
    """Squares from the paper's colour (0) to the bad colour (1)."""
    side = min(_WIDEST, (WIDTH - _LEFT - _RIGHT) / max(1, len(heat.columns)))
    parts = []
    for c, label in enumerate(heat.columns):
        x = _LEFT + side * (c + 0.5)
        name = text(0, 0, shortened(label, _LABEL_CHARACTERS), "start", soft=True, title=label)
        parts.append(f'<g transform="translate({x:.1f},{_TOP - 8}) rotate(-40)">{name}</g>')
    for r, (label, row) in enumerate(zip(heat.rows, heat.values, strict=True)):
        y = _TOP + _ROW * r
        parts.append(text(0, y + 15, shortened(label, _LABEL_CHARACTERS), title=label))
        for c, value in enumerate(row):
            if value is not None:
                title = f"{label}, {heat.columns[c]}: {heat.words(value)}"
                parts.append(box(_LEFT + side * c, y, side - 2, _ROW - 2, _colour(heat.scale(value)), title, radius=2))
    return svg(_TOP + _ROW * len(heat.rows) + 6, parts)


def _colour(share: float) -> str:
    percent = 100 * min(1.0, max(0.0, share))
    return f"color-mix(in srgb, var(--bad) {percent:.0f}%, var(--card))"


def logarithmic(low: float, high: float) -> Scale:
    """A scale on which `low` is 0 and `high` 1, even in the logarithm."""
    span = math.log(high / low) if high > low > 0 else 1.0

    def scale(value: float) -> float:
        if math.isinf(value):
            return 1.0
        return math.log(value / low) / span if value > 0 and low > 0 else 0.0

    return scale
