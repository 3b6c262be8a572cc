"""The scripts behind docs/runtime.md's numbers run, and see what they are there to see."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import runtime_decision
import runtime_soak

from turbopi.runtime import ReuseConfig, Runtime, RuntimeConfig


def test_a_short_soak_meets_everything_and_records_nothing() -> None:
    options = runtime_soak.Options(ticks=150, samples=10)
    engine = runtime_soak.engine_of(options)
    looped = Runtime(engine, RuntimeConfig(1, reuse=ReuseConfig(every=3)))
    for cameras in range(1, engine.config.cameras + 1):
        looped.warm_up(cameras, torch.uint8)
    results = runtime_soak.soak(looped, options, torch.uint8)
    assert set(results["kinds"]) == {"full", "fast", "exact"}
    assert sum(results["kinds"].values()) == 150
    assert results["grown_since_a_tenth"]["graphs"] == 0
    assert len(results["samples"]) == 10


def test_a_decision_is_timed_alone_and_with_its_frames() -> None:
    config = runtime_soak.preset("pi05-tiny")
    engine = runtime_soak.engine_of(runtime_soak.Options())
    asked = [runtime_decision.observation(config, seed) for seed in range(3)]
    found = runtime_decision.measure(engine, RuntimeConfig(1, reuse=ReuseConfig(every=2)), asked, 50)
    assert 0 < found["decide"]["median_ms"] < found["with_frames"]["median_ms"]
    assert found["decide"]["count"] == 50
