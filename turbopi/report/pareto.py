"""The page of one `turbo-pi sweep`: success against latency, and which settings nothing else beats."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from .page import flat_rows, heading, page, table, tiles
from .svg import WIDTH, dot, line, path, shortened, svg, text, ticks

SWEEP_FILE = "sweep.json"
_LEFT, _TOP, _BOTTOM, _RIGHT = 60, 24, 330, 30


@dataclass(frozen=True)
class Point:
    """One setting: latency in milliseconds (99th percentile of an inference), success with its interval, 0 to 1."""

    name: str
    ms: float
    rate: float
    interval: tuple[float, float]


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, fastest first: nothing is at least as fast and succeeds more often."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.ms, -p.rate)):
        if not front or point.rate > front[-1].rate:
            front.append(point)
    return front


def write_sweep_report(out: Path) -> Path:
    """Write report.html into a sweep's directory; returns its path.

    Raises:
        FileNotFoundError: no sweep there.
        ValueError: the file is none of ours, or no setting has an outcome yet.
    """
    file = out / SWEEP_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {SWEEP_FILE} in {out}; give the --out directory of a `turbo-pi sweep`")
    content = json.loads(file.read_text())
    if not isinstance(content, dict) or "rows" not in content:
        raise ValueError(f"{file} is no sweep; run `turbo-pi sweep` again")
    rows = [row for row in content["rows"] if row["latency"] and row["total"]["interval"]]
    if not rows:
        raise ValueError(f"{file} has no setting with an outcome yet; let `turbo-pi sweep` go on")
    path = out / "report.html"
    path.write_text(page(f"Sweep: {out.name}", _parts(content, rows)))
    return path


def _parts(content: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    points = [_point(row) for row in rows]
    front = pareto_front(points)
    yield "<h1>Success against latency</h1>"
    yield f'<p class="soft">{escape(content["when"])}, {len(rows)} of {content["settings"]} settings</p>'
    fastest, best = front[0], front[-1]
    yield tiles([(f"{100 * best.rate:.1f} %", f"most often: {best.name}"), (f"{fastest.ms:.1f} ms", fastest.name)])
    yield heading("Pareto front", "blue: nothing is as fast and succeeds more often; whiskers: 95 % intervals")
    yield pareto_chart(points)
    yield table(
        ("setting", "success", "interval", "p99, ms", "p50, ms", "Hz if the robot waits", "on the front"),
        [_cells(row, point, point in front) for row, point in zip(rows, points, strict=True)],
    )
    small = [row["name"] for row in rows if not row["enough"]]
    if small:
        yield f'<p class="bad">{escape("too few episodes for a verdict: " + ", ".join(small))}</p>'
    yield heading("Settings")
    yield table(("setting", "runtime"), [(row["name"], _told(row["runtime"])) for row in rows])


def _point(row: dict[str, Any]) -> Point:
    total = row["total"]
    return Point(row["name"], row["latency"]["p99_ms"], total["rate"], tuple(total["interval"]))


def _cells(row: dict[str, Any], point: Point, chosen: bool) -> tuple[str, ...]:
    low, high = point.interval
    counts = f"{row['total']['successes']}/{row['total']['episodes']}"
    rate = row["control"]["effective_hz"] if row["control"] else 0.0
    numbers = (f"{point.ms:.2f}", f"{row['latency']['p50_ms']:.2f}", f"{rate:.1f}")
    return (point.name, counts, f"{100 * low:.1f} to {100 * high:.1f} %", *numbers, "yes" if chosen else "")


def _told(runtime: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in flat_rows(runtime))


def pareto_chart(points: Sequence[Point]) -> str:
    """Points with whiskers, the front joined; success from 0 to 100 % over milliseconds."""
    front, most = pareto_front(points), 1.08 * max(point.ms for point in points)

    def place(ms: float, rate: float) -> tuple[float, float]:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * ms / most, _BOTTOM - (_BOTTOM - _TOP) * rate

    parts = []
    for percent in range(0, 101, 20):
        y = place(0, percent / 100)[1]
        parts += [
            line(_LEFT, y, WIDTH - _RIGHT, y, "var(--line)"),
            text(_LEFT - 8, y + 4, f"{percent} %", "end", soft=True),
        ]
    for ms in ticks(0, most):
        parts.append(text(place(ms, 0)[0], _BOTTOM + 17, f"{ms:g} ms", "middle", soft=True))
    parts.append(path([place(p.ms, p.rate) for p in front], "var(--accent)"))
    for point in points:
        x, y = place(point.ms, point.rate)
        low, high = (place(0, end)[1] for end in point.interval)
        colour = "var(--accent)" if point in front else "var(--none)"
        parts += [line(x, low, x, high, colour, 2), dot(x, y, 5, colour, f"{point.name}: {100 * point.rate:.1f} %")]
        if point in front:
            parts.append(text(x + 8, y - 6, shortened(point.name, 40), title=point.name))
    return svg(_BOTTOM + 26, parts)
