"""What is told about a tick."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..engine import Engine
from .reuse import Decision


@dataclass(frozen=True)
class TickReport:
    """What became of one tick.

    Attributes:
        decision: what was computed of the prefix, and why.
        steps: evaluations.
        age: ticks since the oldest part that was used.
        decision_ms: host time of the decision, the comparison of frames included, stages not.
        stage_ms: of the stages that ran one by one.
    """

    decision: Decision
    steps: int
    age: int
    decision_ms: float
    stage_ms: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For a reply: what was computed, why, with how many steps, how old the oldest part was."""
        return {
            "prefix": self.decision.kind,
            "reason": self.decision.reason,
            "steps": self.steps,
            "age": self.age,
            "decision_ms": self.decision_ms,
        }


class StageClock:
    """Wall time of stages. Waits for the engine at the end of each where somebody wants to know."""

    def __init__(self, engine: Engine, stage_ms: dict[str, float] | None) -> None:
        self._engine = engine
        self._wanted = stage_ms is not None
        self.stage_ms: dict[str, float] = {} if stage_ms is None else stage_ms
        self.total_ms = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens within."""
        begin = time.perf_counter()
        yield
        if self._wanted:
            self._engine.synchronize()
        took = 1e3 * (time.perf_counter() - begin)
        self.total_ms += took
        if self._wanted:
            self.stage_ms[name] = self.stage_ms.get(name, 0.0) + took
