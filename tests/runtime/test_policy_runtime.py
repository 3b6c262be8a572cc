"""A policy with a runtime: everything from observation to robot actions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from runtime_support import frames, policy

from turbopi import InputError, Policy
from turbopi.runtime import (
    ChunkingConfig,
    DeadlineConfig,
    PhaseGate,
    ReuseConfig,
    RtcConfig,
    RuntimeConfig,
    SimilarityGate,
    Stamp,
    StreamConfig,
)
from turbopi.runtime.steering import Follow


def test_a_plain_policy_says_nothing_of_its_runtime(checkpoint: Path, data: Path) -> None:
    reply = policy(checkpoint, steps=2).infer(frames(data)[0])
    assert set(reply) == {"actions", "policy_timing"}


def test_a_fast_tick(checkpoint: Path, data: Path) -> None:
    loaded = policy(checkpoint, RuntimeConfig(steps=2, reuse=ReuseConfig(every=3)))
    replies = [loaded.infer(frame) for frame in frames(data)]
    assert [reply["runtime"]["prefix"] for reply in replies] == ["full", "fast", "fast", "full"]
    assert "prefill_ms" not in replies[1]["policy_timing"]
    assert loaded.describe()["runtime"] == {"steps": 2, "seed": 0, "reuse": {"every": 3}}
    assert loaded.report()["reuse_rate"] == 0.5


@pytest.mark.parametrize("mode", ["vision_only", "state_only", "text_fixed"])
def test_modes_split_the_prompt_at_the_state(checkpoint: Path, data: Path, mode: str) -> None:
    loaded = policy(checkpoint, RuntimeConfig(steps=2, reuse=ReuseConfig(mode=mode, every=4)))  # type: ignore[arg-type]
    kinds = [loaded.infer(frame)["runtime"]["prefix"] for frame in frames(data)]
    assert kinds == ["full", "part", "part", "part"]


def test_the_text_of_a_prompt_ends_before_the_state(checkpoint: Path, data: Path) -> None:
    prompt = policy(checkpoint).transforms.prompt
    count = prompt.text_tokens("pick up the bowl", 8)
    spelled = [prompt("pick up the bowl", np.full(8, value))[0][:count] for value in (-3.0, -0.3, 0.7)]
    assert all(np.array_equal(spelled[0], other) for other in spelled)
    assert 5 < count < prompt("pick up the bowl", np.zeros(8))[1].sum() - 8


def test_reset_and_fork_start_anew(checkpoint: Path, data: Path) -> None:
    loaded = policy(checkpoint, RuntimeConfig(steps=2, reuse=ReuseConfig(every=9)))
    first = loaded.infer(frames(data)[0])["actions"]
    loaded.infer(frames(data)[1])
    assert loaded.fork().infer(frames(data)[1])["runtime"]["prefix"] == "full"
    loaded.reset()
    again = loaded.infer(frames(data)[0])
    assert again["runtime"]["prefix"] == "full"
    assert np.array_equal(again["actions"], first)


def test_given_times(checkpoint: Path, data: Path) -> None:
    frame = frames(data)[0]
    uneven = policy(checkpoint, RuntimeConfig(2, times=(1.0, 0.3))).infer(frame)["actions"]
    even = policy(checkpoint, RuntimeConfig(2)).infer(frame)["actions"]
    halves = policy(checkpoint, RuntimeConfig(2, times=(1.0, 0.5))).infer(frame)["actions"]
    assert np.allclose(halves, even, atol=1e-6)
    assert np.abs(uneven - even).max() > 1e-4


def chunks(loaded: Policy, data: Path, follow: Follow | None) -> tuple[np.ndarray, np.ndarray]:
    first, second = frames(data)[:2]
    before = loaded.infer(first)["actions"]
    return before, loaded.infer(second, follow=follow)["actions"]


@pytest.mark.parametrize("method", ["guided", "guided_vjp", "conditioned"])
def test_real_time_chunking_continues_the_last_chunk(checkpoint: Path, data: Path, method: str) -> None:
    rtc = RuntimeConfig(10, rtc=RtcConfig(method, executed=4))  # type: ignore[arg-type]
    before, free = chunks(policy(checkpoint, RuntimeConfig(10)), data, None)
    again, bound = chunks(policy(checkpoint, rtc), data, Follow(4, 3))
    assert np.array_equal(before, again)
    apart, near = (np.abs(c[:3] - before[4:7]).mean() for c in (free, bound))
    assert near < 0.3 * apart
    if method == "conditioned":
        assert near < 1e-6


def test_real_time_chunking_after_a_reset_is_free(checkpoint: Path, data: Path) -> None:
    loaded = policy(checkpoint, RuntimeConfig(2, rtc=RtcConfig()))
    first = loaded.infer(frames(data)[0])["actions"]
    loaded.reset()
    assert np.array_equal(loaded.infer(frames(data)[0])["actions"], first)


def test_a_plan_for_another_task_is_not_continued(checkpoint: Path, data: Path) -> None:
    rtc, plain = (policy(checkpoint, RuntimeConfig(2, rtc=rtc)) for rtc in (RtcConfig(), None))
    first, second = ({**frames(data)[0], "prompt": task} for task in ("open it", "close it"))
    for loaded in (rtc, plain):
        loaded.infer(first)
    assert np.array_equal(rtc.infer(second)["actions"], plain.infer(second)["actions"])


def test_states_are_compared_in_the_robots_dimensions(checkpoint: Path, data: Path) -> None:
    """LIBERO has 8 of the model's 32: its opposite ends are as unlike as can be, not half alike."""
    loaded = policy(checkpoint, RuntimeConfig(1, reuse=ReuseConfig(gate=SimilarityGate(0.3, "state"))))
    observation = frames(data)[0]
    told = []
    for end in (-1.0, -0.5, 1.0):
        normalised = np.zeros(loaded.engine.config.state_dim)
        normalised[:8] = end
        observation["observation/state"] = loaded.transforms.state.unnormalize(normalised)[:8]
        told.append(loaded.infer(observation)["runtime"]["prefix"])
    assert told == ["full", "fast", "full"]


def test_relative_actions_are_seen_from_the_new_state(pi0_checkpoint: Path, data: Path) -> None:
    """What was to be done stays the same motion: made absolute with the old state, relative to the new one."""
    transforms = policy(pi0_checkpoint).transforms
    assert transforms.absolute_mask is not None
    (_, then), (_, now) = (transforms.inputs(frame) for frame in frames(data)[:2])
    chunk = np.random.default_rng(0).uniform(-1, 1, (10, 32)).astype(np.float32)
    moved = transforms.reanchored(chunk, then, now)
    before, after = transforms.outputs(chunk, then)["actions"], transforms.outputs(moved, now)["actions"]
    assert np.allclose(before, after, atol=1e-5)
    assert not np.allclose(chunk[:, :6], moved[:, :6], atol=1e-3)


def test_follow_needs_rtc(checkpoint: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="follow belongs to real-time chunking"):
        policy(checkpoint).infer(frames(data)[0], follow=Follow(1, 1))
    with pytest.raises(ValueError, match="executed and delay count actions"):
        Follow(-1, 0)


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        (RuntimeConfig(rtc=RtcConfig(executed=10)), "rtc.executed 10 leaves nothing of a chunk of 10 actions"),
        (RuntimeConfig(rtc=RtcConfig(executed=5, delay=6)), "a delay of 6 exceed the model's horizon of 10"),
        (RuntimeConfig(rtc=RtcConfig(horizon=11)), "rtc.horizon 11 is beyond the model's horizon"),
        (RuntimeConfig(chunking=ChunkingConfig(replan=11)), "chunking.replan 11 is beyond the model's horizon"),
        (RuntimeConfig(chunking=ChunkingConfig(delay=10)), "chunking.delay 10 leaves nothing of a chunk of 10"),
        (
            RuntimeConfig(chunking=ChunkingConfig(replan=10), rtc=RtcConfig()),
            "chunking.replan 10 leaves nothing of a chunk of 10",
        ),
        (
            RuntimeConfig(chunking=ChunkingConfig(hold=(0.0,) * 6)),
            "chunking.hold has 6 numbers, the robot's actions have 7",
        ),
        (
            RuntimeConfig(reuse=ReuseConfig(every=2, phase=PhaseGate(gripper=7))),
            "PhaseGate.gripper is 7, the robot's actions have 7 dimensions",
        ),
    ],
)
def test_settings_against_the_model(checkpoint: Path, runtime: RuntimeConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy(checkpoint, runtime)


def test_settings_against_the_prompt_and_each_other(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="this prompt spells none"):
        policy(checkpoint, RuntimeConfig(reuse=ReuseConfig("state_only", every=2)), state_in_prompt=False)
    with pytest.raises(ValueError, match="steps is 3, but the runtime has 5; give the number in one place"):
        policy(checkpoint, RuntimeConfig(5), steps=3)
    with pytest.raises(ValueError, match="seed is 3, but the runtime has 5; give the number in one place"):
        policy(checkpoint, RuntimeConfig(5, seed=5), seed=3)


def test_a_runtime_keeps_its_steps_and_seed(checkpoint: Path) -> None:
    assert policy(checkpoint, RuntimeConfig(1, seed=7)).runtime == RuntimeConfig(1, seed=7)
    assert policy(checkpoint, RuntimeConfig(1), seed=7).runtime == RuntimeConfig(1, seed=7)
    assert policy(checkpoint).runtime == RuntimeConfig(10, seed=0)


def test_the_deadline_takes_steps_and_then_prefixes_away(checkpoint: Path, data: Path) -> None:
    config = DeadlineConfig(1e-3, 1e-4, order=("steps", "reuse"), fewer_steps=(1,), window=10)
    loaded = policy(checkpoint, RuntimeConfig(2, deadline=config))
    told = [loaded.infer(frame)["runtime"] for frame in frames(data)]
    assert [(t["steps"], t["prefix"]) for t in told] == [(2, "full"), (1, "full"), (1, "fast"), (1, "full")]
    assert loaded.report()["level"] == "prefix at every second tick"
    assert loaded.events.counts["degraded"] == 2


def test_a_watched_stream(checkpoint: Path, data: Path) -> None:
    now = [0.0]
    plain = policy(checkpoint, RuntimeConfig(1, stream=StreamConfig(frozen_after=2)))
    loaded = Policy(plain.transforms, plain.engine, plain.runtime, lambda: now[0])
    observation = dict(frames(data)[0])
    for tick in range(4):
        now[0] += 0.05
        observation["observation/state"] = observation["observation/state"] + 0.01
        loaded.infer(observation, stamp=Stamp(tick, now[0]))
    assert loaded.events.counts == {"frozen": 2}
    expected = loaded._noise.get_state()
    with pytest.raises(InputError, match="out of order"):
        loaded.infer(observation, stamp=Stamp(1, now[0]))
    assert torch.equal(loaded._noise.get_state(), expected)


def test_a_policys_controller(checkpoint: Path, data: Path) -> None:
    runtime = RuntimeConfig(2, chunking=ChunkingConfig(replan=4, delay=2), rtc=RtcConfig())
    controller = policy(checkpoint, runtime).controller()
    acts = [controller.act(lambda: frames(data)[0]) for _ in range(9)]
    assert [act.inferred_ms is not None for act in acts] == [k in (0, 4, 8) for k in range(9)]
    assert acts[0].action.shape == (7,)
    assert controller.report()["latency_ticks"] == 2
