"""Watching a stream of observations: what a client, a camera or a clock can do to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .config import StreamConfig
from .events import EventLog


@dataclass(frozen=True)
class Stamp:
    """Where an observation stands in its stream: a running number, the seconds at which it was taken, or both."""

    number: int | None = None
    time_s: float | None = None


class StreamWatch:
    """Looks at every observation before it is used, and says what is odd.

    An observation that is older than one that was already acted on is refused: InputError. Duplicates, gaps, a clock
    that jumps and a camera that has stopped are reported as events and the observation is used.
    """

    def __init__(self, config: StreamConfig, events: EventLog) -> None:
        self.config = config
        self._events = events
        self.reset()

    def reset(self) -> None:
        """A new episode: whatever comes is first."""
        self._number: int | None = None
        self._time_s: float | None = None
        self._heard_s: float | None = None
        self._frames: dict[str, int] = {}
        self._still: dict[str, int] = {}
        self._state: bytes | None = None

    def check(self, tick: int, stamp: Stamp | None, now_s: float) -> None:
        """The observation's stamp, against the one before and against the host's clock `now_s` (monotonic seconds).

        Raises InputError for an observation that is older than the one before.
        """
        if stamp is None:
            return
        # Both are looked at before either is kept: an observation that is refused leaves no trace.
        if stamp.number is not None:
            self._check_number(stamp.number)
        if stamp.time_s is not None:
            self._check_time(stamp.time_s)
        if stamp.number is not None:
            self._keep_number(tick, stamp.number)
        if stamp.time_s is not None:
            self._keep_time(tick, stamp.time_s, now_s)

    def _check_number(self, number: int) -> None:
        last = self._number
        if last is not None and number < last:
            raise InputError(
                f"observation {number} came after observation {last}: out of order; send frames in the order in which "
                "they were taken, and drop late ones"
            )

    def _check_time(self, time_s: float) -> None:
        last = self._time_s
        if not np.isfinite(time_s):
            raise InputError(f"the observation's time is {time_s}, expected seconds")
        if last is not None and time_s < last:
            raise InputError(
                f"the observation was taken {last - time_s:.3f} s before the one before it: out of order, or the "
                "client's clock was set back; send monotonic times, and reset the policy after setting a clock"
            )

    def _keep_number(self, tick: int, number: int) -> None:
        last = self._number
        if number == last:
            self._events.add(tick, "duplicate", f"observation {number} came twice")
        elif last is not None and number > last + 1:
            self._events.add(tick, "missing", f"observations {last + 1} to {number - 1} are missing")
        self._number = number

    def _keep_time(self, tick: int, time_s: float, now_s: float) -> None:
        last, heard = self._time_s, self._heard_s
        if last is not None and heard is not None:
            passed, elapsed = time_s - last, now_s - heard
            if abs(passed - elapsed) > self.config.max_gap_s:
                self._events.add(
                    tick, "clock", f"the client's clock moved {passed:.3f} s while {elapsed:.3f} s passed here"
                )
            elif passed > self.config.max_gap_s:
                self._events.add(tick, "gap", f"{passed:.3f} s between two observations")
        self._time_s, self._heard_s = time_s, now_s

    def look(self, tick: int, frames: Mapping[str, np.ndarray], state: np.ndarray) -> None:
        """The frames by camera, and the state: has a camera stopped while something else moves?"""
        moved = self._state is not None and state.tobytes() != self._state
        self._state = state.tobytes()
        shown = {name: hash(np.ascontiguousarray(frame).tobytes()) for name, frame in frames.items()}
        changed = {name for name, value in shown.items() if name in self._frames and self._frames[name] != value}
        moving = moved or bool(changed)
        for name, value in shown.items():
            if self._frames.get(name) != value:
                self._still[name] = 0
            elif moving:  # where everything rests, no camera has anything new to show
                self._still[name] += 1
                if self._still[name] == self.config.frozen_after:
                    self._events.add(
                        tick,
                        "frozen",
                        f"{name} has shown the same frame for {self._still[name] + 1} ticks while the robot moved: is "
                        "the camera alive?",
                    )
        gone = [name for name in self._frames if name not in shown]
        for name in gone:
            self._still.pop(name, None)
            self._events.add(tick, "camera", f"{name} is gone")
        for name in shown:
            if self._frames and name not in self._frames:
                self._events.add(tick, "camera", f"{name} is back", warn=False)
        self._frames = shown
