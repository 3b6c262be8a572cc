"""Which engine to take: the first of a declared order that can be made here and passes a gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .base import Engine

MARK = ">"
"""Between names in an order, as in "tensorrt>turbo>eager"."""


@dataclass(frozen=True)
class Verdict:
    """What a gate says of an engine.

    Attributes:
        passed: whether it may be taken.
        why: in words, with the figures.
    """

    passed: bool
    why: str


@dataclass(frozen=True)
class Tried:
    """An engine of the order, and what became of it."""

    name: str
    selected: bool
    why: str


@dataclass(frozen=True)
class Selection:
    """The engine that was taken, and all that were tried before it."""

    engine: Engine
    name: str
    tried: tuple[Tried, ...]

    def to_dict(self) -> dict[str, Any]:
        """For receipts."""
        tried = [{"name": t.name, "selected": t.selected, "why": t.why} for t in self.tried]
        return {"selected": self.name, "tried": tried}


def parse_priority(text: str) -> tuple[str, ...]:
    """Read "tensorrt>turbo>eager". Raises ValueError for an empty or repeated name."""
    names = tuple(name.strip() for name in text.split(MARK))
    if not all(names) or len(set(names)) != len(names):
        raise ValueError(f"{text!r} is no order of engines; write different names with {MARK!r} between them")
    return names


def select_engine(
    priority: Sequence[str], make: Callable[[str], Engine], gate: Callable[[str, Engine], Verdict]
) -> Selection:
    """The first engine that can be made and passes the gate.

    Args:
        priority: names, the one to be preferred first.
        make: an engine by name; what it raises of ImportError, ValueError, OSError and RuntimeError speaks against it.
        gate: an audit, which an engine must pass whatever its place in the order.

    Raises ValueError that tells what spoke against each, if none can be taken.
    """
    tried: list[Tried] = []
    for name in priority:
        try:
            engine = make(name)
            verdict = gate(name, engine)
        except (ImportError, ValueError, OSError, RuntimeError) as error:
            tried.append(Tried(name, False, f"cannot be used here: {error}"))
            continue
        tried.append(Tried(name, verdict.passed, verdict.why))
        if verdict.passed:
            return Selection(engine, name, tuple(tried))
    reasons = "; ".join(f"{attempt.name} {attempt.why}" for attempt in tried)
    raise ValueError(f"no engine of {MARK.join(priority)} can be taken: {reasons}; mend one, or add 'eager'")
