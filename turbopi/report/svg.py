"""What every plot is drawn with. Colours come from the page's style, so that they follow its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH = 960
COLOURS = tuple(f"var(--c{i})" for i in range(6))


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    """A straight line with round ends."""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}" '
        'stroke-linecap="round"/>'
    )


def text(x: float, y: float, words: str, anchor: str = "start", *, soft: bool = False, title: str = "") -> str:
    """Words at a point; `title` is what a pointer over them shows."""
    kind = ' class="soft"' if soft else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(words)}{_title(title)}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, title: str = "", radius: float = 0) -> str:
    """A filled rectangle."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius}" '
        f'fill="{colour}">{_title(title)}</rect>'
    )


def dot(x: float, y: float, radius: float, colour: str, title: str = "", opacity: float = 1) -> str:
    """A filled circle."""
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" opacity="{opacity}">{_title(title)}</circle>'
    )


def path(points: Sequence[tuple[float, float]], colour: str) -> str:
    """A line through points."""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"/>'


def linked(part: str, address: str | None) -> str:
    """A part that leads somewhere when there is an address."""
    return part if address is None else f'<a href="{escape(address)}">{part}</a>'


def svg(height: float, parts: Sequence[str]) -> str:
    """The whole plot, `WIDTH` wide."""
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" role="img">{"".join(parts)}</svg>'


def shortened(words: str, limit: int) -> str:
    """Words cut to `limit` characters, with an ellipsis where something was cut."""
    return words if len(words) <= limit else f"{words[: limit - 1]}…"


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers within [low, high], about so many, for an axis."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _title(words: str) -> str:
    return f"<title>{escape(words)}</title>" if words else ""
