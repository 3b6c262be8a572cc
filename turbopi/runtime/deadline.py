"""Keeping ticks within a budget by computing less, in the declared order, and more again when there is room."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .config import DeadlineConfig
from .events import EventLog

ALLOWED = 0.01
"""Part of the ticks that may exceed a 99th percentile."""


@dataclass(frozen=True)
class Economy:
    """What is in force at a level: step count, or None for the configured one; reuse at every n-th tick; holding."""

    name: str
    steps: int | None = None
    reuse_every: int | None = None
    hold: bool = False


def economies(config: DeadlineConfig) -> tuple[Economy, ...]:
    """The levels from "everything" on; each keeps what the one before gave up."""
    levels = [Economy("everything")]
    for measure in config.order:
        last = levels[-1]
        if measure == "steps":
            for steps in config.fewer_steps:
                levels.append(Economy(f"{steps} steps", steps, last.reuse_every, last.hold))
        elif measure == "reuse":
            name = (
                f"prefix at every {config.reuse_every}th tick"
                if config.reuse_every > 3
                else (f"prefix at every {'second' if config.reuse_every == 2 else 'third'} tick")
            )
            levels.append(Economy(name, last.steps, config.reuse_every, last.hold))
        else:
            levels.append(Economy("the chunk is held while it lasts", last.steps, last.reuse_every, True))
    return tuple(levels)


class Deadline:
    """Watches how long ticks take. The budget is broken when more than 1 % of the last `window` ticks exceed it."""

    def __init__(self, config: DeadlineConfig, events: EventLog) -> None:
        self.config = config
        self.levels = economies(config)
        self._events = events
        self.reset()

    def reset(self) -> None:
        """Everything again, nothing observed."""
        self.level = 0
        self._over: deque[bool] = deque(maxlen=self.config.window)
        self._broken = 0
        self._calm = 0

    @property
    def economy(self) -> Economy:
        """What is in force."""
        return self.levels[self.level]

    def observe(self, tick: int, ms: float) -> None:
        """A tick took `ms` milliseconds: degrade, recover, or neither."""
        config = self.config
        if len(self._over) == config.window:
            self._broken -= self._over[0]
        self._over.append(ms > config.p99_ms)
        self._broken += self._over[-1]
        self._calm = self._calm + 1 if ms <= config.margin * config.p99_ms else 0
        if self._broken > ALLOWED * config.window and self.level + 1 < len(self.levels):
            self._move(
                tick, 1, f"{self._broken} of the last {len(self._over)} ticks took more than {config.p99_ms:g} ms"
            )
        elif self._calm >= config.recover and self.level > 0:
            self._move(tick, -1, f"{self._calm} ticks within {config.margin:.0%} of {config.p99_ms:g} ms")

    def _move(self, tick: int, by: int, why: str) -> None:
        before = self.economy.name
        self.level += by
        self._over.clear()
        self._broken = self._calm = 0
        kind = "degraded" if by > 0 else "recovered"
        self._events.add(tick, kind, f"deadline: {why}; {before} → {self.economy.name}", warn=by > 0)
