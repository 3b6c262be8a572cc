"""Settings check themselves, and go to JSON and back."""

import json
from pathlib import Path
from typing import Any

import pytest

from turbopi.runtime import (
    ChunkingConfig,
    DeadlineConfig,
    PhaseGate,
    ReuseConfig,
    RtcConfig,
    RuntimeConfig,
    SimilarityGate,
    StreamConfig,
)

EVERYTHING = RuntimeConfig(
    steps=3,
    seed=4,
    prompt_cache=True,
    reuse=ReuseConfig(gate=SimilarityGate(0.985, state_threshold=0.9), phase=PhaseGate(0.99), max_age=7),
    chunking=ChunkingConfig(replan=4, delay=2, hold=(0.0, None), max_hold=3),
    rtc=RtcConfig("guided_vjp", horizon=5, schedule="EXP"),
    deadline=DeadlineConfig(50, 40, order=("steps", "hold"), fewer_steps=(2, 1)),
    stream=StreamConfig(frozen_after=5),
)


@pytest.mark.parametrize(
    "config",
    [RuntimeConfig(), EVERYTHING, RuntimeConfig(2, times=(1.0, 0.4)), RuntimeConfig(stream=StreamConfig())],
)
def test_to_json_and_back(config: RuntimeConfig, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(config.to_dict()))
    assert RuntimeConfig.load(tmp_path / "r.json") == config


def test_defaults_are_not_written() -> None:
    assert RuntimeConfig().to_dict() == {"steps": 10, "seed": 0}
    assert RuntimeConfig(reuse=ReuseConfig(every=2)).to_dict() == {"steps": 10, "seed": 0, "reuse": {"every": 2}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stps": 3}, "unknown field stps; RuntimeConfig has steps, seed"),
        ({"reuse": {"evry": 3}}, "unknown field reuse.evry; ReuseConfig has mode, every"),
        ({"deadline": {"period_ms": 3}}, "missing field deadline.p99_ms"),
        ({"reuse": 3}, "reuse is 3, expected a map of ReuseConfig's fields"),
        ({"steps": "ten"}, "RuntimeConfig.steps must be an integer of at least 1, got 'ten'"),
        ({"times": ["a"], "steps": 1}, "times must be a list of finite numbers"),
    ],
)
def test_files_that_are_none(values: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"r.json: .*{message}"):
        RuntimeConfig.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no runtime configuration at"):
        RuntimeConfig.load(tmp_path / "none.json")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        RuntimeConfig.load(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimilarityGate(0.0), "threshold must be a number above 0, at most 1, got 0"),
        (lambda: SimilarityGate(1.01), "threshold must be a number above 0, at most 1, got 1.01"),
        (lambda: SimilarityGate(float("nan")), "threshold must be a number"),
        (lambda: SimilarityGate(0.9, "pixels"), "signal must be one of 'tokens', 'images', 'state'"),  # type: ignore[arg-type]
        (lambda: SimilarityGate(0.9, "state", 0.9), "leave state_threshold out"),
        (lambda: ReuseConfig(), "either every .a fixed frequency. or gate"),
        (lambda: ReuseConfig(every=2, gate=SimilarityGate(0.9)), "and not both"),
        (lambda: ReuseConfig(every=0), "every must be an integer of at least 1"),
        (lambda: ReuseConfig(every=2, max_age=0), "max_age must be"),
        (lambda: ReuseConfig(every=2, layers=3), "layers belongs to mode 'layer_wise'"),
        (lambda: ReuseConfig("layer_wise", every=2), "layers belongs to mode 'layer_wise'"),
        (lambda: ReuseConfig("vision_only", every=2, synchronised=False), "needs mode 'full' and every"),
        (lambda: ReuseConfig(gate=SimilarityGate(0.9), synchronised=False), "needs mode 'full' and every"),
        (lambda: ReuseConfig("sometimes", every=2), "mode must be one of 'full'"),  # type: ignore[arg-type]
        (lambda: PhaseGate(window=1), "window must be"),
        (lambda: PhaseGate(curvature=0), "curvature must be"),
        (lambda: ChunkingConfig(replan=0), "replan must be"),
        (lambda: ChunkingConfig(blend="mix"), "blend must be one of"),  # type: ignore[arg-type]
        (lambda: ChunkingConfig(newest=0), "newest must be"),
        (lambda: ChunkingConfig(delay=-1), "delay must be a non-negative"),
        (lambda: ChunkingConfig(max_hold=-1), "max_hold must be a non-negative"),
        (lambda: RtcConfig(horizon=2, delay=3), "RtcConfig.horizon 2 is shorter than delay 3"),
        (lambda: RtcConfig(limit=0), "limit must be"),
        (lambda: RtcConfig(executed=0), "executed must be"),
        (lambda: DeadlineConfig(50, 60), "p99_ms must be a number above 0, at most 50"),
        (lambda: DeadlineConfig(50, 40, order=()), "order must name some of"),
        (lambda: DeadlineConfig(50, 40, order=("steps", "steps")), "order must name some of"),
        (lambda: DeadlineConfig(50, 40, fewer_steps=(3, 5)), "fewer_steps must fall"),
        (lambda: DeadlineConfig(50, 40, reuse_every=1), "reuse_every must be"),
        (lambda: StreamConfig(frozen_after=1), "frozen_after must be"),
        (lambda: RuntimeConfig(times=(1.0, 0.5)), "times has 2 values, steps is 10"),
        (lambda: RuntimeConfig(deadline=DeadlineConfig(50, 40, order=("hold",))), "give chunking, too"),
        (lambda: RuntimeConfig(3, deadline=DeadlineConfig(50, 40, order=("steps",))), "must be fewer than steps 3"),
        (
            lambda: RuntimeConfig(chunking=ChunkingConfig(blend="ensemble"), rtc=RtcConfig()),
            "does not go with blend 'ensemble'",
        ),
        (
            lambda: RuntimeConfig(chunking=ChunkingConfig(delay=4), rtc=RtcConfig(horizon=3)),
            "rtc.horizon 3 is shorter than chunking.delay 4",
        ),
        (
            lambda: RuntimeConfig(
                reuse=ReuseConfig("vision_only", every=2), deadline=DeadlineConfig(50, 40, order=("reuse",))
            ),
            "does not go with another mode of reuse",
        ),
        (
            lambda: RuntimeConfig(reuse=ReuseConfig(every=2), deadline=DeadlineConfig(50, 40, order=("reuse",))),
            "reuse_every 2 would save nothing",
        ),
        (
            lambda: RuntimeConfig(
                reuse=ReuseConfig(gate=SimilarityGate(0.9)), deadline=DeadlineConfig(50, 40, order=("reuse",))
            ),
            "reuse_every 2 would save nothing",
        ),
        (lambda: ReuseConfig(every=2, synchronised=False, phase=PhaseGate()), "phase does not go with synchronised"),
    ],
)
def test_contradictions(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chunking": {"hold": [float("nan")]}}, "hold must be a list of finite numbers or null"),
        ({"chunking": {"hold": [True, 1.0]}}, "hold must be a list of finite numbers or null"),
        ({"chunking": {"hold": 3}}, "hold must be a list of finite numbers or null, got 3"),
        ({"times": 3}, "times must be a list of finite numbers, got 3"),
        ({"prompt_cache": "false"}, "prompt_cache must be true or false, got 'false'"),
        ({"reuse": {"every": 2, "synchronised": "false"}}, "synchronised must be true or false"),
        ({"deadline": {"period_ms": 50, "p99_ms": 40, "fewer_steps": 5}}, "fewer_steps must be a list of integers"),
        (
            {"deadline": {"period_ms": 50, "p99_ms": 40, "fewer_steps": [5, 2.5]}},
            "fewer_steps must be a list of integers",
        ),
        ({"deadline": {"period_ms": 50, "p99_ms": 40, "order": 3}}, "order must name some of"),
        ({"deadline": {"period_ms": 50, "p99_ms": 40, "order": [["steps"]]}}, "order must name some of"),
    ],
)
def test_what_a_file_may_hold_instead_of_numbers(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RuntimeConfig.from_dict(values)
