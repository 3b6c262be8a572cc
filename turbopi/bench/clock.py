"""Clocks: the host's around a call, and the device's own between points of its queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

LEAD_CYCLES = 2_000_000
"""About a millisecond of idling put before what is timed, so that the host is ahead and its delays do not count."""


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one, whose queue events are put into."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def clock_name(device: torch.device) -> str:
    """What times stages on this device, for receipts."""
    return "device events" if device.type == "cuda" else "wall"


def wall_ms(work: Callable[[], object]) -> float:
    """Milliseconds of the host's clock that the work takes; it must wait for the device itself."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


class StageClock:
    """Times between marks: of the device's queue on a GPU, of the host elsewhere.

    On a GPU a stage lasts from the end of the one before it to the end of its own last command. The queue is given a
    head start, so that the host's work is not counted as long as it is shorter than what the device has to do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def start(self) -> None:
        """Wait until the device is idle, then the first mark."""
        self._events.clear()
        self._times.clear()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda._sleep(LEAD_CYCLES)
        self.mark()

    def mark(self) -> None:
        """The end of what was asked for so far."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def stop(self) -> list[float]:
        """Wait, and give the milliseconds between one mark and the next."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) for a, b in zip(self._events, self._events[1:], strict=False)]
        return [1e3 * (b - a) for a, b in zip(self._times, self._times[1:], strict=False)]
