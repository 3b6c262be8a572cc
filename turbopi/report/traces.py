"""Plots along one episode: what each inference took, and what the robot was told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .svg import COLOURS, WIDTH, box, line, path, svg, text, ticks

_LEFT, _TOP = 58, 8


def stacked_bars(parts_of: Mapping[str, Sequence[float]], unit: str) -> str:
    """A bar per call, stacked from named parts in the order given; all sequences are equally long."""
    names, calls = list(parts_of), list(zip(*parts_of.values(), strict=True))
    bottom = 200
    largest = max(map(sum, calls), default=0.0) or 1.0
    scale, step = (bottom - _TOP) / largest, (WIDTH - _LEFT) / max(len(calls), 1)
    parts = _levels(ticks(0, largest, 5), lambda value: bottom - scale * value, f" {unit}")
    for index, call in enumerate(calls):
        y, x = float(bottom), _LEFT + index * step + min(3, step / 8)
        for name, colour, value in zip(names, COLOURS, call, strict=False):
            y -= scale * value
            title = f"call {index}: {name} {value:.1f} of {sum(call):.1f} {unit}"
            parts.append(box(x, y, step - 2 * min(3, step / 8), scale * value, colour, title))
    return svg(bottom + 8, parts)


def line_chart(series: Mapping[str, Sequence[float]], marks: Sequence[float] = (), height: float = 130) -> str:
    """Named sequences over their index; `marks` are positions on that axis, thin lines behind."""
    length = max((len(values) for values in series.values()), default=0)
    everything = [value for values in series.values() for value in values] or [0.0]
    low, high = min(everything), max(everything)
    room = 0.06 * (high - low) or 1.0
    low, high, bottom, span = low - room, high + room, height - 22, max(length - 1, 1)

    def across(index: float) -> float:
        return _LEFT + (WIDTH - _LEFT - 8) * index / span

    def up(value: float) -> float:
        return bottom - (bottom - _TOP) * (value - low) / (high - low)

    parts = [line(across(mark), _TOP, across(mark), bottom, "var(--line)", 0.5) for mark in marks]
    parts += _levels(ticks(low, high, 4), up)
    for (_, values), colour in zip(series.items(), COLOURS, strict=False):
        parts.append(path([(across(i), up(value)) for i, value in enumerate(values)], colour))
    parts += [text(across(i), height - 5, f"{i:g}", "middle", soft=True) for i in ticks(0, max(length - 1, 0), 8)]
    return svg(height, parts)


def _levels(values: Sequence[float], up: Callable[[float], float], unit: str = "") -> list[str]:
    parts = []
    for value in values:
        parts.append(line(_LEFT, up(value), WIDTH, up(value), "var(--line)", 0.7))
        parts.append(text(_LEFT - 6, up(value) + 4, f"{value:g}{unit}", "end", soft=True))
    return parts
