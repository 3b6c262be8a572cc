"""What the device ran, kernel by kernel: recorded by CUPTI through torch's profiler, cut into stages, summed by name.

Kernels may overlap: with programmatic dependent launch one begins before the one in front of it has ended. So a kernel
has two times: how long it ran, and its own part, by which it moved the end of the work. Own parts and gaps add up to
the time from the first kernel's start to the last one's end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
MICROSECONDS = 1e3
NAME_LENGTH, LABEL_LENGTH = 400, 64
_NOISE = ("void ", "at::native::", "(anonymous namespace)::")


@dataclass(frozen=True)
class Launch:
    """One kernel, copy or fill on the device; times in microseconds of the trace's clock."""

    name: str
    start: float
    duration: float
    grid: tuple[int, ...] = ()

    @property
    def end(self) -> float:
        """When it had ended."""
        return self.start + self.duration


class Marker:
    """A launch that no engine makes, to cut a trace by: a fill of one complex128 number.

    Work that is recorded begins with one, so that its name need not be known beforehand.
    """

    def __init__(self, device: torch.device) -> None:
        self._number = torch.zeros(1, dtype=torch.complex128, device=device)

    def __call__(self) -> None:
        """Put it into the current stream."""
        self._number.fill_(1)


def record(work: Callable[[], None], device: torch.device, keep: Path | None = None) -> list[Launch]:
    """Everything that the device runs while `work` is done, in the order of starting.

    `keep` is a file for the trace, which trace viewers show. Raises RuntimeError if nothing was recorded.
    """
    with TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json"
        torch.cuda.synchronize(device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            work()
            torch.cuda.synchronize(device)
        profile.export_chrome_trace(str(path))
        launches = read_trace(path)
    if not launches:
        raise RuntimeError(
            "the profiler recorded no kernel: CUPTI is missing or may not be used by this user on this machine; "
            "`turbo-pi bench --what latency` needs no profiler"
        )
    return launches


def read_trace(path: Path) -> list[Launch]:
    """The device's part of a trace in Chrome's format, in the order of starting."""
    events = json.loads(path.read_text())["traceEvents"]
    found = [
        Launch(event["name"], float(event["ts"]), float(event["dur"]), tuple(event.get("args", {}).get("grid", ())))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in KINDS
    ]
    return sorted(found, key=lambda launch: launch.start)


def cut(launches: Sequence[Launch], marks: int) -> list[list[Launch]]:
    """The pieces between one marker and the next. The first launch is a marker; there must be `marks` of them.

    Raises RuntimeError if there are not: then launches were lost, and a sum of the rest would be wrong.
    """
    places = [index for index, launch in enumerate(launches) if launch.name == launches[0].name]
    if len(places) != marks:
        raise RuntimeError(
            f"the trace has {len(places)} markers named {launches[0].name!r}, expected {marks}: the profiler lost "
            "launches; ask for fewer ticks with --stage-calls"
        )
    return [list(launches[a + 1 : b]) for a, b in zip(places, [*places[1:], len(launches)], strict=True)]


def divided(launches: Sequence[Launch], like: Sequence[Sequence[Launch]]) -> list[list[Launch]]:
    """A whole tick's launches, divided as those of its stages are: same names, same order.

    Raises RuntimeError if the tick is not its stages in a row.
    """
    names = [launch.name for launch in launches]
    expected = [launch.name for stage in like for launch in stage]
    if names != expected:
        place = next((i for i, (a, b) in enumerate(zip(names, expected, strict=False)) if a != b), -1)
        raise RuntimeError(
            f"the tick's graph ran {len(names)} kernels, its stages one by one {len(expected)}; the first that differs "
            f"is number {place}: {names[place : place + 1]} and {expected[place : place + 1]}"
        )
    parts, start = [], 0
    for stage in like:
        parts.append(list(launches[start : start + len(stage)]))
        start += len(stage)
    return parts


def own_parts(launches: Sequence[Launch]) -> tuple[list[float], float]:
    """By how many microseconds each launch moved the end of the work, and the gaps between launches together."""
    own, gaps = [], 0.0
    reached = launches[0].start if launches else 0.0
    for launch in launches:
        gaps += max(0.0, launch.start - reached)
        own.append(max(0.0, launch.end - max(reached, launch.start)))
        reached = max(reached, launch.end)
    return own, gaps


def summed(ticks: Sequence[Sequence[Launch]]) -> dict[str, Any]:
    """One stage over several ticks: times a tick, and a row a kernel's name, the largest own part first."""
    own_of: dict[str, float] = {}
    launches_of: dict[str, list[Launch]] = {}
    gaps = []
    for tick in ticks:
        own, gap = own_parts(tick)
        gaps.append(gap)
        for launch, part in zip(tick, own, strict=True):
            own_of[launch.name] = own_of.get(launch.name, 0.0) + part
            launches_of.setdefault(launch.name, []).append(launch)
    total = sum(own_of.values()) + sum(gaps)
    count = len(ticks)
    rows = [
        _row(name, launches_of[name], own, count, total)
        for name, own in sorted(own_of.items(), key=lambda item: -item[1])
    ]
    return {
        "launches": sum(len(tick) for tick in ticks) / count,
        "span_ms": median(_span(tick) for tick in ticks) / MICROSECONDS,
        "gaps_ms": sum(gaps) / count / MICROSECONDS,
        "kernels": rows,
    }


def label(name: str) -> str:
    """A kernel's name without return type, torch's namespaces and parameters, cut to what a table holds."""
    for noise in _NOISE:
        name = name.replace(noise, "")
    if "<" in name or not name.startswith("Mem"):
        name = name.partition("(")[0]
    return name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 1] + "…"


def _row(name: str, launches: Sequence[Launch], own: float, ticks: int, total: float) -> dict[str, Any]:
    times = [launch.duration for launch in launches]
    grids = sorted({launch.grid for launch in launches})
    return {
        "kernel": name[:NAME_LENGTH],
        "label": label(name),
        "count": len(launches) / ticks,
        "total_ms": sum(times) / ticks / MICROSECONDS,
        "own_ms": own / ticks / MICROSECONDS,
        "share": own / total if total else 0.0,
        "median_us": median(times),
        "grids": {"x".join(map(str, grid)): _of_grid(launches, grid, ticks) for grid in grids if grid},
    }


def _of_grid(launches: Iterable[Launch], grid: tuple[int, ...], ticks: int) -> dict[str, float]:
    times = [launch.duration for launch in launches if launch.grid == grid]
    return {"count": len(times) / ticks, "median_us": median(times)}


def _span(tick: Sequence[Launch]) -> float:
    return max(launch.end for launch in tick) - tick[0].start if tick else 0.0
