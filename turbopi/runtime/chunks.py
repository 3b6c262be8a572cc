"""The plan: which action to do at a control tick, from all the chunks that say something about it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from .config import ChunkingConfig


@dataclass(frozen=True, eq=False)
class Chunk:
    """Robot actions (H,dims), the first of them for control tick `start`."""

    start: int
    actions: np.ndarray

    @property
    def end(self) -> int:
        """The tick behind its last action."""
        return self.start + len(self.actions)


class ActionPlan:
    """Chunks that overlap, blended as configured. Only what lies ahead is kept."""

    def __init__(self, config: ChunkingConfig) -> None:
        self.config = config
        self.clear()

    def clear(self) -> None:
        """No plan."""
        self._chunks: deque[Chunk] = deque()

    @property
    def newest(self) -> Chunk | None:
        """The chunk that came last."""
        return self._chunks[-1] if self._chunks else None

    def add(self, chunk: Chunk, now: int) -> None:
        """A chunk has come at tick `now`. Its actions for ticks before that are never done."""
        last = self.newest
        if last is not None and chunk.start < last.start:
            raise ValueError(f"a chunk of tick {chunk.start} came after one of tick {last.start}: inferences overtook")
        if self.config.blend == "overlap" and last is not None:
            chunk = self._merged(last, chunk)
        if self.config.blend != "ensemble":
            self._chunks.clear()
        self._chunks.append(chunk)
        while self._chunks[0].end <= now:
            self._chunks.popleft()
            if not self._chunks:
                break

    def _merged(self, old: Chunk, new: Chunk) -> Chunk:
        """Where both say something, a weighted mean of the plan and the new chunk."""
        actions = new.actions.copy()
        common = min(old.end, new.end) - new.start
        if common > 0:
            first = new.start - old.start
            share = self.config.newest
            actions[:common] = share * actions[:common] + (1 - share) * old.actions[first : first + common]
        return Chunk(new.start, actions)

    def at(self, tick: int) -> np.ndarray | None:
        """The action for a tick, (dims,) float64; None where no chunk reaches."""
        said = [c.actions[tick - c.start] for c in self._chunks if c.start <= tick < c.end]
        if not said:
            return None
        if len(said) == 1:
            return np.array(said[0], dtype=np.float64)
        weights = np.exp(-self.config.decay * np.arange(len(said)))
        return np.average(np.array(said, dtype=np.float64), axis=0, weights=weights)
