"""Degrading and recovering with fake times; broken streams with fake clocks."""

import logging
from typing import Any

import numpy as np
import pytest

from turbopi import InputError
from turbopi.runtime import DeadlineConfig, Stamp, StreamConfig
from turbopi.runtime.deadline import Deadline, economies
from turbopi.runtime.events import EventLog
from turbopi.runtime.stream import StreamWatch

CONFIG = DeadlineConfig(50, 40, fewer_steps=(5, 3), window=50, recover=20)


def test_the_declared_order() -> None:
    assert [e.name for e in economies(CONFIG)] == [
        "everything",
        "5 steps",
        "3 steps",
        "prefix at every second tick",
        "the chunk is held while it lasts",
    ]
    last = economies(CONFIG)[-1]
    assert (last.steps, last.reuse_every, last.hold) == (3, 2, True)
    other = economies(DeadlineConfig(50, 40, order=("reuse", "steps"), fewer_steps=(5,), reuse_every=4))
    assert [e.name for e in other] == ["everything", "prefix at every 4th tick", "5 steps"]


def watched(config: DeadlineConfig = CONFIG) -> tuple[Deadline, EventLog]:
    events = EventLog()
    return Deadline(config, events), events


def test_a_single_slow_tick_is_within_the_percentile_only_of_a_long_window() -> None:
    deadline, events = watched(DeadlineConfig(50, 40, fewer_steps=(5,), window=100))
    for tick in range(300):
        deadline.observe(tick, 60.0 if tick % 150 == 0 else 10.0)
    assert deadline.level == 0
    assert not events.counts


def test_degrades_step_by_step_says_so_and_recovers(caplog: pytest.LogCaptureFixture) -> None:
    deadline, events = watched()
    with caplog.at_level(logging.INFO, "turbopi.runtime"):
        for tick in range(4):
            deadline.observe(tick, 45.0)
            assert deadline.level == tick + 1
        deadline.observe(4, 45.0)
        assert deadline.level == 4  # nothing is left to give up
        for tick in range(5, 5 + 4 * 20):
            deadline.observe(tick, 10.0)
    assert deadline.level == 0
    assert (events.counts["degraded"], events.counts["recovered"]) == (4, 4)
    assert "1 of the last 1 ticks took more than 40 ms; everything → 5 steps" in caplog.text
    assert "5 steps → everything" in caplog.text


def test_within_the_budget_but_not_within_the_margin_it_stays() -> None:
    deadline, _ = watched()
    deadline.observe(0, 45.0)
    for tick in range(1, 100):
        deadline.observe(tick, 39.0)
    assert deadline.level == 1


def watch(**options: Any) -> tuple[StreamWatch, EventLog]:
    events = EventLog()
    return StreamWatch(StreamConfig(**options), events), events


def test_frames_in_order_are_nobodys_business() -> None:
    stream, events = watch()
    for tick in range(20):
        stream.check(tick, Stamp(tick, 100 + 0.05 * tick), 7 + 0.05 * tick)
    assert not events.counts


def test_numbers_out_of_order_are_refused_and_duplicates_and_holes_reported() -> None:
    stream, events = watch()
    for tick, number in enumerate((1, 2, 2, 5)):
        stream.check(tick, Stamp(number), tick)
    assert events.counts == {"duplicate": 1, "missing": 1}
    assert "observations 3 to 4 are missing" in events.latest[-1].message
    with pytest.raises(InputError, match="observation 4 came after observation 5: out of order"):
        stream.check(4, Stamp(4), 4)
    stream.reset()
    stream.check(0, Stamp(1), 9)


def test_clocks() -> None:
    stream, events = watch(max_gap_s=1.0)
    stream.check(0, Stamp(time_s=100.0), 0.0)
    stream.check(1, Stamp(time_s=100.1), 0.1)
    stream.check(2, Stamp(time_s=3700.1), 0.2)
    assert events.counts == {"clock": 1}
    stream.check(3, Stamp(time_s=3705.1), 5.2)
    assert events.counts == {"clock": 1, "gap": 1}
    with pytest.raises(InputError, match=r"taken 3600\.000 s before the one before it: out of order, or"):
        stream.check(4, Stamp(time_s=105.1), 5.3)
    with pytest.raises(InputError, match="the observation's time is nan"):
        stream.check(5, Stamp(time_s=float("nan")), 5.4)


def frame(value: int) -> np.ndarray:
    return np.full((3, 4, 4), value, np.uint8)


def test_a_frozen_camera_is_reported_once_while_others_move() -> None:
    stream, events = watch(frozen_after=4)
    for tick in range(12):
        stream.look(tick, {"base": frame(tick), "wrist": frame(7)}, np.zeros(3))
    assert events.counts == {"frozen": 1}
    assert "wrist has shown the same frame for 5 ticks while the robot moved" in events.latest[0].message


def test_a_scene_at_rest_is_not_frozen() -> None:
    stream, events = watch(frozen_after=4)
    for tick in range(12):
        stream.look(tick, {"base": frame(1), "wrist": frame(7)}, np.zeros(3))
    assert not events.counts


def test_a_moving_state_is_enough_to_find_frozen_cameras() -> None:
    stream, events = watch(frozen_after=4)
    for tick in range(12):
        stream.look(tick, {"base": frame(1), "wrist": frame(7)}, np.full(3, float(tick)))
    assert events.counts == {"frozen": 2}


def test_a_camera_that_stopped_while_the_robot_rested_is_found_when_it_moves() -> None:
    stream, events = watch(frozen_after=4)
    for tick in range(40):
        stream.look(tick, {"base": frame(max(0, tick - 30)), "wrist": frame(7)}, np.full(3, max(0.0, tick - 30.0)))
    assert events.counts == {"frozen": 1}
    assert "wrist has shown" in events.latest[0].message
    assert events.latest[0].tick == 34


def test_a_refused_stamp_leaves_no_trace() -> None:
    stream, events = watch()
    stream.check(0, Stamp(1, 1.0), 0.0)
    with pytest.raises(InputError, match="time is nan"):
        stream.check(1, Stamp(900, float("nan")), 0.05)
    stream.check(1, Stamp(2, 1.05), 0.05)
    assert not events.counts


def test_stamps_without_a_time_do_not_move_the_clock() -> None:
    stream, events = watch(max_gap_s=10.0)
    stream.check(0, Stamp(0, 1.0), 0.0)
    for tick in range(1, 100):
        stream.check(tick, Stamp(tick), 0.2 * tick)
    stream.check(100, Stamp(100, 21.0), 20.0)
    assert events.counts == {"gap": 1}


def test_cameras_that_go_and_come_back() -> None:
    stream, events = watch()
    for tick, names in enumerate((["a", "b"], ["a"], ["a", "b"])):
        stream.look(tick, {name: frame(tick) for name in names}, np.zeros(1))
    assert [event.message for event in events.latest] == ["b is gone", "b is back"]
