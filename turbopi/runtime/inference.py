"""Inference that takes time: begun at one control tick, its chunk there at a later one.

`SimulatedInference` computes at once and hides the chunk for a number of ticks, so that a simulation that stands still
during inference can tell what latency costs. `ThreadedInference` really computes beside the control loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Infer = Callable[[], Mapping[str, Any]]


class Inference(Protocol):
    """One inference at a time."""

    @property
    def busy(self) -> bool:
        """Whether one has begun whose chunk has not been taken."""

    def begin(self, tick: int, infer: Infer, *, first: bool) -> None:
        """Start one at a control tick; the episode's `first` is waited for by everybody."""

    def take(self, tick: int, *, wait: bool) -> Mapping[str, Any] | None:
        """The reply if it is there by this tick; `wait` for it if there is nothing else to do."""

    def cancel(self) -> None:
        """Forget whatever has begun."""


class SimulatedInference:
    """The chunk comes `delay` ticks after it was asked for; the episode's first at once, as a robot waits for it."""

    def __init__(self, delay: int) -> None:
        self.delay = delay
        self._reply: Mapping[str, Any] | None = None
        self._due = 0

    @property
    def busy(self) -> bool:
        """See `Inference`."""
        return self._reply is not None

    def begin(self, tick: int, infer: Infer, *, first: bool) -> None:
        """See `Inference`; computes here and now."""
        self._reply, self._due = infer(), tick + (0 if first else self.delay)

    def take(self, tick: int, *, wait: bool) -> Mapping[str, Any] | None:
        """See `Inference`. Waiting does not make simulated time pass: a chunk that is not due is not there."""
        if self._reply is None or tick < self._due:
            return None
        reply, self._reply = self._reply, None
        return reply

    def cancel(self) -> None:
        """See `Inference`."""
        self._reply = None


class ThreadedInference:
    """Computes in a thread of its own while the control loop goes on. `close` it when done."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="turbo-pi inference")
        self._running: Future[Mapping[str, Any]] | None = None

    @property
    def busy(self) -> bool:
        """See `Inference`."""
        return self._running is not None

    def begin(self, tick: int, infer: Infer, *, first: bool) -> None:
        """See `Inference`."""
        self._running = self._thread.submit(infer)

    def take(self, tick: int, *, wait: bool) -> Mapping[str, Any] | None:
        """See `Inference`; raises what the inference raised."""
        running = self._running
        if running is None or not (wait or running.done()):
            return None
        self._running = None
        return running.result()

    def cancel(self) -> None:
        """See `Inference`; one that is under way is waited for, since the policy is not for two threads."""
        if self._running is not None:
            self._running.exception()
            self._running = None

    def close(self) -> None:
        """End the thread."""
        self.cancel()
        self._thread.shutdown()


@dataclass
class LatencyInTicks:
    """How many control ticks an inference takes: the longest seen since the reset, the first `warm_up` left out."""

    warm_up: int = 1
    seen: int = 0
    longest: int = 0

    def add(self, ticks: int) -> None:
        """One more inference."""
        self.seen += 1
        if self.seen > self.warm_up:
            self.longest = max(self.longest, ticks)

    def reset(self) -> None:
        """A new episode."""
        self.seen = self.longest = 0


def held_action(last: np.ndarray, hold: tuple[float | None, ...]) -> np.ndarray:
    """What is done without a plan: `hold`'s numbers, the last action's where there is None or nothing at all.

    Raises ValueError if `hold` is of another length than the robot's actions.
    """
    if not hold:
        return last.copy()
    if len(hold) != len(last):
        raise ValueError(f"chunking.hold has {len(hold)} numbers, the robot's actions have {len(last)}")
    return np.array([now if given is None else given for given, now in zip(hold, last, strict=True)])
