"""Chunks played action by action: plans, delays, what happens when they run out."""

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from turbopi.runtime import ChunkingConfig, RtcConfig, RuntimeConfig
from turbopi.runtime.chunks import ActionPlan, Chunk
from turbopi.runtime.controller import Controller, StaleChunkError
from turbopi.runtime.events import EventLog
from turbopi.runtime.inference import LatencyInTicks, ThreadedInference, held_action
from turbopi.runtime.steering import Follow

HORIZON = 10


class Counts:
    """A policy whose k-th chunk says (k, 0), (k, 1), …: who made an action, and which of the chunk it is."""

    def __init__(self, holding: bool = False, wait: threading.Event | None = None, **options: Any) -> None:
        self.runtime = RuntimeConfig(chunking=ChunkingConfig(**options.pop("chunking", {})), **options)
        self.events = EventLog()
        self.holding = holding
        self.wait = wait
        self.follows: list[Follow | None] = []

    def infer(self, observation: Mapping[str, Any], *, follow: Follow | None = None) -> Mapping[str, Any]:
        if self.wait is not None and self.follows:
            self.wait.wait(5)
        number = float(len(self.follows))
        self.follows.append(follow)
        return {"actions": np.array([(number, float(index)) for index in range(HORIZON)])}

    def reset(self) -> None:
        self.follows = []

    def report(self) -> dict[str, Any]:
        return {}


def played(policy: Counts, ticks: int) -> list[tuple[int, int]]:
    controller = Controller(policy)
    acts = [controller.act(dict) for _ in range(ticks)]
    return [(int(act.action[0]), int(act.action[1])) for act in acts]


@pytest.mark.parametrize("replan", [1, 3, 10])
def test_replan(replan: int) -> None:
    assert played(Counts(chunking={"replan": replan}), 12) == [(k // replan, k % replan) for k in range(12)]


@pytest.mark.parametrize("delay", [1, 3, 5])
def test_a_chunk_that_comes_late_is_entered_late(delay: int) -> None:
    """Replan 5: the second inference begins at tick 5; until its chunk is there the first goes on."""
    expected = [(0, k) for k in range(5 + delay)] + [(1, k) for k in range(delay, 5 + delay)]
    assert played(Counts(chunking={"delay": delay}), 10 + delay) == expected


def test_a_delay_longer_than_the_rest_of_the_chunk_is_held_and_said() -> None:
    policy = Counts(chunking={"delay": 7})
    controller = Controller(policy)
    acts = [controller.act(dict) for _ in range(13)]
    assert [act.held for act in acts] == [False] * 10 + [True] * 2 + [False]
    assert [tuple(act.action) for act in acts[9:]] == [(0, 9), (0, 9), (0, 9), (1, 7)]
    assert policy.events.counts["stale"] == 1
    assert controller.report()["held"] == 2


@pytest.mark.parametrize(
    ("replan", "delay", "held", "begun"), [(5, 5, 0, range(0, 21, 5)), (5, 6, 3, (0, 5, 11, 17)), (1, 1, 0, range(21))]
)
def test_the_next_inference_begins_when_the_last_ones_chunk_is_there(
    replan: int, delay: int, held: int, begun: Any
) -> None:
    controller = Controller(Counts(chunking={"replan": replan, "delay": delay}))
    acts = [controller.act(dict) for _ in range(21)]
    assert [tick for tick, act in enumerate(acts) if act.inferred_ms is not None] == list(begun)
    assert controller.held == held


def test_what_a_caller_does_to_an_action_is_not_held() -> None:
    controller = Controller(Counts(chunking={"replan": 10, "delay": 3}))
    seen = []
    for _ in range(13):
        action = controller.act(dict).action
        seen.append(action.tolist())
        action *= -1
    assert seen[9:] == [[0, 9]] * 4
    assert controller.held == 3


def test_holding_may_be_forbidden() -> None:
    controller = Controller(Counts(chunking={"delay": 7, "max_hold": 1}))
    assert [controller.act(dict).held for _ in range(11)] == [False] * 10 + [True]
    with pytest.raises(StaleChunkError, match="no chunk for 2 control ticks, max_hold is 1: inference is slower"):
        controller.act(dict)


def test_what_is_held() -> None:
    last = np.array([0.5, -0.2, 1.0])
    assert held_action(last, ()).tolist() == last.tolist()
    assert held_action(last, (0.0, 0.0, None)).tolist() == [0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"chunking\.hold has 2 numbers, the robot's actions have 3"):
        held_action(last, (0.0, None))


def test_overlap_merges_with_the_plan() -> None:
    config = ChunkingConfig(blend="overlap", newest=0.75)
    plan = ActionPlan(config)
    plan.add(Chunk(0, np.zeros((4, 1))), 0)
    plan.add(Chunk(2, np.ones((4, 1))), 2)
    plan.add(Chunk(3, np.full((4, 1), 2.0)), 3)
    assert [float(plan.at(t)[0]) for t in range(3, 7)] == [0.75 * 2 + 0.25 * 0.75, 1.75, 1.75, 2.0]  # type: ignore[index]
    assert plan.at(7) is None


def test_ensemble_averages_what_reaches_the_tick() -> None:
    plan = ActionPlan(ChunkingConfig(replan=1, blend="ensemble", decay=0.5))
    for start in range(3):
        plan.add(Chunk(start, np.full((4, 1), float(start))), start)
    weights = np.exp(-0.5 * np.arange(3))
    assert plan.at(2) == pytest.approx(float((weights * np.arange(3)).sum() / weights.sum()))
    assert plan.at(5) == pytest.approx(2.0)
    plan.add(Chunk(9, np.zeros((4, 1))), 9)
    assert len(plan._chunks) == 1


def test_chunks_do_not_overtake() -> None:
    plan = ActionPlan(ChunkingConfig())
    plan.add(Chunk(5, np.zeros((4, 1))), 5)
    with pytest.raises(ValueError, match="inferences overtook"):
        plan.add(Chunk(4, np.zeros((4, 1))), 6)


def test_the_policy_is_told_how_far_the_last_chunk_is_executed() -> None:
    policy = Counts(chunking={"replan": 4, "delay": 2}, rtc=RtcConfig())
    played(policy, 16)
    assert policy.follows == [None, Follow(4, 2), Follow(4, 2), Follow(4, 2)]


def test_the_deadline_may_hold_the_chunk_to_its_end() -> None:
    policy = Counts(holding=True, chunking={"replan": 2, "delay": 1})
    assert played(policy, 12) == [(0, k) for k in range(10)] + [(1, 1), (1, 2)]


def test_reset_begins_again() -> None:
    policy = Counts(chunking={"delay": 3})
    controller = Controller(policy)
    for _ in range(7):
        controller.act(dict)
    controller.reset()
    assert controller.act(dict).action.tolist() == [0, 0]
    assert len(policy.follows) == 1


def test_observations_are_drawn_only_for_inferences() -> None:
    drawn = []
    controller = Controller(Counts(chunking={"replan": 5}))
    acts = [controller.act(lambda: drawn.append(1) or {}) for _ in range(11)]  # type: ignore[func-returns-value]
    assert len(drawn) == 3
    assert [act.inferred_ms is not None for act in acts] == [k % 5 == 0 for k in range(11)]


def test_a_thread_infers_while_the_loop_goes_on() -> None:
    wait = threading.Event()
    policy = Counts(wait=wait, chunking={"replan": 5})
    inference = ThreadedInference()
    controller = Controller(policy, inference)
    acts = [tuple(controller.act(dict).action) for _ in range(8)]
    assert acts == [(0, k) for k in range(8)]
    wait.set()
    while not inference._running.done():  # type: ignore[union-attr]
        time.sleep(0.001)
    assert tuple(controller.act(dict).action) == (1, 3)
    assert controller.latency.longest == 3
    inference.close()


def test_a_thread_that_is_quick_enough_infers_at_every_tick() -> None:
    inference = ThreadedInference()
    controller = Controller(Counts(chunking={"replan": 1}), inference)
    begun = []
    for _ in range(6):
        begun.append(controller.act(dict).inferred_ms is not None)
        while inference.busy and not inference._running.done():  # type: ignore[union-attr]
            time.sleep(0.001)
    assert begun == [True] * 6
    inference.close()


def test_a_threads_error_reaches_the_loop() -> None:
    class Breaks(Counts):
        def infer(self, observation: Mapping[str, Any], *, follow: Follow | None = None) -> Mapping[str, Any]:
            raise ValueError("the camera fell off")

    inference = ThreadedInference()
    controller = Controller(Breaks(), inference)
    with pytest.raises(ValueError, match="the camera fell off"):
        controller.act(dict)
    inference.close()


def test_latency_leaves_the_warm_up_out() -> None:
    latency = LatencyInTicks(warm_up=1)
    for ticks in (30, 2, 4, 3):
        latency.add(ticks)
    assert latency.longest == 4


def test_a_controller_needs_chunking() -> None:
    policy = Counts()
    policy.runtime = RuntimeConfig()
    with pytest.raises(ValueError, match="give the runtime a chunking configuration"):
        Controller(policy)
