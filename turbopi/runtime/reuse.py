"""Whether a tick computes its prefix, part of it, or nothing; a decision from host values alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .config import ReuseConfig, Signal
from .snapshot import STATE, TEXT, PrefixInput, Snapshot

Kind = Literal["full", "part", "fast", "exact"]
Similar = Callable[[Signal], float]
AGES = 64
"""Ages above are counted together."""


@dataclass(frozen=True)
class Decision:
    """What a tick computes of its prefix.

    Attributes:
        kind: "full" all of it; "part" some parts; "fast" nothing; "exact" nothing, and nothing would change.
        reused: the parts that are taken from the snapshot.
        reason: in a few words.
    """

    kind: Kind
    reused: frozenset[str]
    reason: str


def _full(reason: str) -> Decision:
    return Decision("full", frozenset(), reason)


def reused_parts(config: ReuseConfig, seen: PrefixInput) -> frozenset[str]:
    """Which parts a fast tick of a mode takes from the snapshot."""
    parts = frozenset(seen.parts)
    if config.mode == "full":
        return parts
    if config.mode in ("vision_only", "layer_wise"):
        return parts - {TEXT, STATE}
    return parts & {STATE if config.mode == "state_only" else TEXT}


def decide(
    config: ReuseConfig | None,
    seen: PrefixInput,
    held: Snapshot | None,
    tick: int,
    similar: Similar,
    eventful: Callable[[], bool],
) -> Decision:
    """What to compute of the prefix at a tick.

    Args:
        config: None reuses only what is identical.
        seen: this tick's prefix.
        held: the snapshot, None at the beginning.
        tick: its number.
        similar: this tick's similarity to the snapshot; asked only where the gate needs it.
        eventful: whether the last chunk is at a delicate place; asked only where there is a phase gate.
    """
    if held is None:
        return _full("first")
    if held.synchronised and seen.identical(held.seen):
        return Decision("exact", frozenset(seen.parts), "identical")
    if config is None:
        return _full("changed")
    if not seen.same_prompt(held.seen):
        return _full("another prompt or other cameras")
    if not config.synchronised:
        return staggered(config, seen, held, tick)
    refusal = _refusal(config, tick - held.tick, similar, eventful)
    if refusal:
        return _full(refusal)
    reused = reused_parts(config, seen)
    return Decision("fast" if len(reused) == len(seen.parts) else "part", reused, "reused")


def _refusal(config: ReuseConfig, age: int, similar: Similar, eventful: Callable[[], bool]) -> str | None:
    """Why the snapshot is not used again; None if it is."""
    event = config.phase is not None and eventful()
    if config.gate is None:
        if config.every is not None and age >= config.every:
            return "due"
        return "event" if event else None
    if age >= config.max_age:
        return "too old"
    threshold = config.gate.threshold
    if event and config.phase is not None:
        threshold = max(threshold, config.phase.threshold)
    if similar(config.gate.signal) < threshold:
        return "event" if event else "changed"
    wanted = config.gate.state_threshold
    if wanted is not None and similar("state") < wanted:
        return "the state changed"
    return None


def staggered(config: ReuseConfig, seen: PrefixInput, held: Snapshot, tick: int) -> Decision:
    """Each camera, and the prompt with the state, recomputed at ticks of its own, `every` apart."""
    assert config.every is not None
    units: list[tuple[str, ...]] = [(part,) for part in seen.parts if part not in (TEXT, STATE)]
    prompt = tuple(part for part in seen.parts if part in (TEXT, STATE))
    units += [prompt] if prompt else []
    due: set[str] = set()
    for index, unit in enumerate(units):
        if tick % config.every == index * config.every // len(units):
            due.update(unit)
    reused = frozenset(seen.parts) - due
    if not reused:
        return _full("due")
    return Decision("part" if due else "fast", reused, "staggered")


class ReuseStatistics:
    """How often, and how old; bounded."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.ages: Counter[int] = Counter()

    def add(self, decision: Decision, age: int) -> None:
        """One tick, and the age in ticks of the oldest part that it used."""
        self.kinds[decision.kind] += 1
        self.reasons[decision.reason] += 1
        self.ages[min(age, AGES)] += 1

    def to_dict(self) -> dict[str, Any]:
        """Counts by kind, reason and age, and the part of ticks that reused something; JSON values."""
        ticks = sum(self.kinds.values())
        return {
            "ticks": ticks,
            "kinds": dict(self.kinds),
            "reasons": dict(self.reasons),
            "ages": {str(age): count for age, count in sorted(self.ages.items())},
            "reuse_rate": 1.0 - self.kinds["full"] / ticks if ticks else None,
        }
