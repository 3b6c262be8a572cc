"""Playing chunks action by action: when to infer, which action to do, and what when there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .chunks import ActionPlan, Chunk
from .config import RuntimeConfig
from .events import EventLog
from .inference import Inference, LatencyInTicks, SimulatedInference, held_action
from .steering import Follow

Observe = Callable[[], Mapping[str, Any]]


class StaleChunkError(RuntimeError):
    """The plan ran out for longer than `max_hold` ticks: nobody knows what the robot should do."""


class ChunkPolicy(Protocol):
    """What the controller asks of a policy; `turbopi.Policy` is one."""

    runtime: RuntimeConfig

    @property
    def events(self) -> EventLog:
        """Where to say what is odd."""

    @property
    def holding(self) -> bool:
        """Whether the deadline says to hold the chunk while it lasts."""

    def infer(self, observation: Mapping[str, Any], *, follow: Follow | None = None) -> Mapping[str, Any]:
        """A chunk: {"actions": (H,dims), …}."""

    def reset(self) -> None:
        """Forget the episode."""

    def report(self) -> dict[str, Any]:
        """Statistics of the episode."""


@dataclass(frozen=True)
class Act:
    """One control tick.

    Attributes:
        action: (dims,) float64.
        inferred_ms: what beginning an inference took here, which is all of it unless it runs in a thread; None where
            none was begun.
        held: whether no chunk reached this tick, so that the action is what `hold` says.
    """

    action: np.ndarray
    inferred_ms: float | None
    held: bool


class Controller:
    """One robot's control loop over a policy. Call `act` once a control tick; not for two threads at once.

    Args:
        policy: with `runtime.chunking`.
        inference: how inference takes time; None simulates `chunking.delay` ticks.

    Raises ValueError if the policy's runtime has no chunking.
    """

    def __init__(self, policy: ChunkPolicy, inference: Inference | None = None) -> None:
        if policy.runtime.chunking is None:
            raise ValueError("a controller plays chunks: give the runtime a chunking configuration")
        self.policy = policy
        self.config = policy.runtime.chunking
        self.inference: Inference = inference or SimulatedInference(self.config.delay)
        self.plan = ActionPlan(self.config)
        self.latency = LatencyInTicks()
        self.reset()

    def reset(self) -> None:
        """A new episode, for the policy, too."""
        self.inference.cancel()
        self.policy.reset()
        self.plan.clear()
        self.latency.reset()
        self.tick = 0
        self.held = 0
        self._held_in_a_row = 0
        self._last: np.ndarray | None = None
        self._began: int | None = None
        self._last_start: int | None = None

    def act(self, observe: Observe) -> Act:
        """The action of this control tick; `observe` is called only where an inference begins.

        Raises:
            InputError, ValueError: of the policy.
            StaleChunkError: no chunk for more than `max_hold` ticks.
        """
        if self._last is not None:
            self._take(wait=False)  # first, so that a chunk which is there does not keep the next from being begun
        inferred_ms = self._begin(observe) if self._due else None
        self._take(wait=self._last is None)
        action = self.plan.at(self.tick)
        held = action is None
        if action is None:
            action = self._hold()
        else:
            self._held_in_a_row = 0
        self._last = action.copy()  # the caller may write into what it is given
        self.tick += 1
        return Act(action, inferred_ms, held)

    def report(self) -> dict[str, Any]:
        """The policy's statistics, and the ticks that were held and an inference's latency in ticks."""
        return {**self.policy.report(), "held": self.held, "latency_ticks": self.latency.longest}

    @property
    def _due(self) -> bool:
        """Whether an inference is to begin at this tick."""
        if self.inference.busy:
            return False
        newest = self.plan.newest
        if newest is None or self.tick >= newest.end:
            return True
        if self.policy.holding:
            return self.tick + self._delay >= newest.end
        assert self._last_start is not None
        return self.tick - self._last_start >= self.config.replan

    @property
    def _delay(self) -> int:
        """Ticks that an inference is expected to take."""
        return max(self.config.delay, self.latency.longest)

    def _begin(self, observe: Observe) -> float:
        follow = None
        if self.policy.runtime.rtc is not None and self._last_start is not None:
            follow = Follow(self.tick - self._last_start, self._delay)
        observation = observe()
        self._began = self.tick
        first = self._last_start is None
        start = time.perf_counter()
        self.inference.begin(self.tick, lambda: self.policy.infer(observation, follow=follow), first=first)
        return 1e3 * (time.perf_counter() - start)

    def _take(self, *, wait: bool) -> None:
        reply = self.inference.take(self.tick, wait=wait)
        if reply is None:
            return
        began = self._began
        assert began is not None
        self.latency.add(self.tick - began)
        self._last_start = began
        self.plan.add(Chunk(began, np.asarray(reply["actions"])), self.tick)

    def _hold(self) -> np.ndarray:
        """No chunk reaches this tick: say so, and do what was declared for it."""
        self.held += 1
        self._held_in_a_row += 1
        if self._last is None:
            raise StaleChunkError("there is no chunk yet, and nothing to hold")
        most = self.config.max_hold
        if most is not None and self._held_in_a_row > most:
            raise StaleChunkError(
                f"no chunk for {self._held_in_a_row} control ticks, max_hold is {most}: inference is slower than the "
                "chunks are long; infer earlier (replan), raise the horizon, or make it faster"
            )
        if self._held_in_a_row == 1:
            self.policy.events.add(self.tick, "stale", "the chunk has ended and the next is not there yet; holding")
        return held_action(self._last, self.config.hold)
