"""What the runtime has to say: events that are counted, kept for a while and logged."""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass

_log = logging.getLogger("turbopi.runtime")
KEPT = 200


@dataclass(frozen=True)
class Event:
    """Something that happened at a tick. `kind` is one word for counting, `message` says all of it."""

    tick: int
    kind: str
    message: str


class EventLog:
    """Counts every event and keeps the latest; memory does not grow."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.latest: deque[Event] = deque(maxlen=KEPT)

    def add(self, tick: int, kind: str, message: str, *, warn: bool = True) -> None:
        """Note an event, in the process's log too: as a warning, or for the record."""
        self.counts[kind] += 1
        self.latest.append(Event(tick, kind, message))
        _log.log(logging.WARNING if warn else logging.INFO, "tick %d: %s", tick, message)

    def clear(self) -> None:
        """Forget everything."""
        self.counts.clear()
        self.latest.clear()
