"""When a prefix is like enough to be used again: similarity, age, events."""

import dataclasses
from typing import Any

import pytest
import torch
from runtime_support import Counting, eager, inputs, noise, play, runtime

from turbopi.runtime import PhaseGate, ReuseConfig, SimilarityGate


def blended(engine: Any, share: float) -> Any:
    """Observation 0 with a share of observation 1's frames in it."""
    x, other = inputs(engine.config, 0), inputs(engine.config, 1)
    x.images.copy_((1 - share) * x.images + share * other.images)
    return x


@pytest.mark.parametrize("signal", ["tokens", "images"])
def test_a_similarity_gate(signal: Any) -> None:
    engine = eager()
    gate = SimilarityGate(0.98, signal)
    ticks = runtime(engine, reuse=ReuseConfig(gate=gate, max_age=9))
    made = []
    for share in (0, 0.01, 0.01, 0.9, 0.9):
        made.append(ticks.sample(blended(engine, share), noise(engine.config), 6)[1].decision)
    assert [d.kind for d in made] == ["full", "fast", "fast", "full", "exact"]
    assert made[3].reason == "changed"


def test_threshold_one_recomputes_whatever_is_not_identical() -> None:
    engine = eager()
    ticks = runtime(engine, reuse=ReuseConfig(gate=SimilarityGate(1.0, "images")))
    kinds = [ticks.sample(blended(engine, s), noise(engine.config), 6)[1].decision.kind for s in (0, 0.1, 0.1, 0.2)]
    assert kinds == ["full", "full", "exact", "full"]


@pytest.mark.parametrize("signal", ["tokens", "images"])
@pytest.mark.parametrize("row", [0, 1])
def test_threshold_one_sees_a_single_pixel(signal: Any, row: int) -> None:
    """Its cosine rounds to 1; and of the frames only every fourth row is compared."""
    engine = eager()
    ticks = runtime(engine, reuse=ReuseConfig(gate=SimilarityGate(1.0, signal)))
    first = blended(engine, 0)
    changed = dataclasses.replace(first, images=first.images.clone())
    changed.images[0, 0, 0, row, 3] += 1e-4
    kinds = [ticks.sample(seen, noise(engine.config), 6)[1].decision.kind for seen in (first, changed)]
    assert kinds == ["full", "full"]


def test_maximum_age() -> None:
    ticks = runtime(eager(), reuse=ReuseConfig(gate=SimilarityGate(1e-6, "images"), max_age=3))
    assert play(ticks, list(range(8))) == ["full", "fast", "fast", "full", "fast", "fast", "full", "fast"]
    assert ticks.report()["reasons"]["too old"] == 2


def test_the_token_gate_runs_vision_and_reuses_its_answer() -> None:
    engine = eager()
    count, ticks = Counting(engine), runtime(engine, reuse=ReuseConfig(gate=SimilarityGate(0.999999)))
    play(ticks, [0])
    count.take()
    play(ticks, [1])
    assert count.take() == ["encode_images", "prefill", "denoise"]


def test_a_cross_modal_gate_asks_for_both() -> None:
    engine = eager()
    reuse = ReuseConfig(gate=SimilarityGate(0.5, "images", state_threshold=0.99))
    ticks = runtime(engine, reuse=reuse)
    play(ticks, [0])
    moved = blended(engine, 0.01)
    assert ticks.sample(moved, noise(engine.config), 6)[1].decision.kind == "fast"
    moved.state.add_(0.2)
    assert ticks.sample(moved, noise(engine.config), 6)[1].decision.reason == "the state changed"


def test_a_phase_gate_tightens_near_events() -> None:
    engine = eager()
    never = runtime(engine, reuse=ReuseConfig(every=5, phase=PhaseGate(gripper=6, window=10)))
    play(never, [0])
    never._last_chunk = torch.ones(10, 32).numpy()
    assert play(never, [1]) == ["fast"]
    bent = torch.ones(10, 32)
    bent[5:, 6] = -1
    never._last_chunk = bent.numpy()
    _, report = never.sample(inputs(engine.config, 2), noise(engine.config), 6)
    assert (report.decision.kind, report.decision.reason) == ("full", "event")
    curved = runtime(engine, reuse=ReuseConfig(every=5, phase=PhaseGate(curvature=0.1)))
    play(curved, [0])
    wave = torch.ones(10, 32)
    wave[::2, :6] = 0
    curved._last_chunk = wave.numpy()
    assert play(curved, [1]) == ["full"]
