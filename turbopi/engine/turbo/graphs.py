"""CUDA graphs by key: recorded when first asked for, replayed ever after."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from ..capture import Recorder, Work


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Float32 products of torch in full precision, whatever the process has chosen for its own."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class GraphSet:
    """Recorded work by key, or, without a recorder, the work itself, done at each call.

    Work may be done more than once while it is recorded: it must not depend on what it leaves behind.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._replays: dict[Hashable, Work] = {}

    @property
    def recorded(self) -> int:
        """How many pieces of work were recorded so far; in a control loop this stands still."""
        return len(self._replays)

    def ensure(self, key: Hashable, work: Callable[[], None]) -> None:
        """Record, unless that has been done."""
        if self._recorder is not None and key not in self._replays:
            with ieee_float32():
                self._replays[key] = self._recorder.record(work)

    def replay(self, key: Hashable) -> bool:
        """Do recorded work again, if there is any under the key; whether there was."""
        replay = self._replays.get(key)
        if replay is None:
            return False
        replay()
        return True

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do what `work` does."""
        if self._recorder is None:
            with ieee_float32(), torch.no_grad():
                work()
            return
        self.ensure(key, work)
        self._replays[key]()
