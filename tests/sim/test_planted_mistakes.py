"""The mistakes of benchmarks/mistakes.py: each changes what it should, and nothing before it."""

from __future__ import annotations

import pickle
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_fakes import FakeEnv, FakeScenes, fake_config

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from action_audit import AGES, Observations, Recording, answers, errors, joined, record_task
from mistakes import (
    CONTROL,
    FROZEN_TICKS,
    MISTAKES,
    NOISE_SIZES,
    UNBROKEN,
    EngineAround,
    FrozenEnv,
    FrozenScenes,
    MistakenSource,
    with_engine,
)

from turbopi.checkpoint import init_checkpoint
from turbopi.engine.graphed import ReferenceFunctions, StageGraphs
from turbopi.policy import Policy
from turbopi.sim.episodes_file import read_config
from turbopi.sim.evaluate import evaluate
from turbopi.sim.rollout import EpisodeSpec, run_episode
from turbopi.transforms import ModelArrays

POLICY = {"engine": "eager", "precision": "fp32", "device": "cpu", "steps": 4}
MODEL = [m for m in MISTAKES.values() if m.where == "model"]
TRANSFORMS = {
    "camera-present": {"image_mask"},
    "cameras-swapped": {"images"},
    "not-rotated": {"images"},
    "mean-std": {"tokens", "token_mask", "state"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_checkpoint(tmp_path_factory.mktemp("mistakes") / "ck", "pi05-tiny", weights="hash", robot="libero")


@pytest.fixture(scope="module")
def seen() -> Observations:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (1, len(AGES), 2, 56, 56, 3), dtype=np.uint8)
    return Observations(pictures, rng.uniform(-0.3, 0.3, (1, 8)), ("put the bowl on the plate",), np.zeros((1, 3)))


def loaded(checkpoint: Path, name: str) -> Policy:
    """The good policy, as the mistake needs it."""
    return MistakenSource(checkpoint, name, POLICY).checkpoint.load()


def arrays(policy: Policy, seen: Observations) -> ModelArrays:
    return policy.transforms.inputs(seen.observation(0))[0]


def test_every_mistake_of_the_issue_is_there() -> None:
    assert {m.where for m in MISTAKES.values()} == {"none", "model", "transforms", "camera", "noise"}
    assert set(TRANSFORMS) == {m.name for m in MISTAKES.values() if m.where == "transforms"}
    assert [m.name for m in MODEL] == ["padding-seen", "causal-chunk", "last-step", "positions"]
    assert [m.frozen_ticks for m in MISTAKES.values() if m.where == "camera"] == [2, 5, 10]


@pytest.mark.parametrize("mistake", MODEL, ids=lambda m: m.name)
def test_a_models_mistake_is_made_in_the_suffix_alone(mistake: Any, checkpoint: Path, seen: Observations) -> None:
    good = loaded(checkpoint, mistake.name)
    bad = mistake.apply(good)
    right, wrong = (answers(policy, seen, good.transforms.actions) for policy in (good, bad))
    found = errors(wrong, right, mistake.in_velocity)
    assert found["relative_error"] > 1e-4
    if mistake.in_velocity:
        assert found["first_step_relative_error"] > 1e-4
    inputs = arrays(good, seen)
    caches = [
        policy.engine.prefill(
            policy.engine.encode_images(tensor(inputs.images), tensor(inputs.image_mask)),
            *(tensor(getattr(inputs, name)) for name in ("image_mask", "tokens", "token_mask")),
        )
        for policy in (good, bad)
    ]
    assert all(bool((a == b).all()) for a, b in zip(caches[0].keys, caches[1].keys, strict=True))
    again = answers(good, seen, good.transforms.actions)
    assert np.array_equal(again.actions, right.actions), "the mistake stayed in the reference"


class Captured(EngineAround):
    """The graphed engine, on a recorder that runs the work again instead."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.name = "graphed"
        self.graphs = StageGraphs(inner.model, ReferenceFunctions(inner.model), self)

    def record(self, work: Any) -> Any:
        work()
        return work

    def prefill(self, *inputs: torch.Tensor) -> Any:
        with torch.no_grad():
            return self.graphs.prefill(*inputs)

    def denoise(self, *inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.graphs.denoise(*inputs)


@pytest.mark.parametrize("mistake", MODEL, ids=lambda m: m.name)
def test_a_models_mistake_reaches_an_engine_that_keeps_its_caches(
    mistake: Any, checkpoint: Path, seen: Observations
) -> None:
    eager = loaded(checkpoint, mistake.name)
    captured = with_engine(eager, Captured)
    right, wrong = (answers(mistake.apply(p), seen, eager.transforms.actions) for p in (eager, captured))
    assert errors(wrong, right, mistake.in_velocity)["relative_error"] < 1e-6
    unbroken = answers(captured, seen, eager.transforms.actions)
    assert errors(wrong, unbroken, mistake.in_velocity)["relative_error"] > 1e-4


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values))[None]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_mistake_of_the_transforms_changes_its_arrays_alone(name: str, checkpoint: Path, seen: Observations) -> None:
    good = loaded(checkpoint, name)
    bad = MISTAKES[name].apply(good)
    before, after = arrays(good, seen), arrays(bad, seen)
    changed = {
        f.name for f in fields(ModelArrays) if not np.array_equal(getattr(before, f.name), getattr(after, f.name))
    }
    assert changed
    assert changed <= TRANSFORMS[name]
    right, wrong = (answers(policy, seen, good.transforms.actions) for policy in (good, bad))
    assert errors(wrong, right, True)["relative_error"] > 1e-4


def test_the_last_step_alone_is_missing(checkpoint: Path, seen: Observations) -> None:
    good = loaded(checkpoint, "last-step")
    right = answers(good, seen, good.transforms.actions)
    wrong = answers(MISTAKES["last-step"].apply(good), seen, good.transforms.actions)
    shift = np.linalg.norm(wrong.actions - right.actions)
    assert 0 < shift < 1.5 * np.linalg.norm(right.velocity) / POLICY["steps"]


def test_dropping_padding_is_no_mistake(checkpoint: Path, seen: Observations) -> None:
    good, control = loaded(checkpoint, UNBROKEN), loaded(checkpoint, CONTROL)
    right, other = (answers(policy, seen, good.transforms.actions) for policy in (good, control))
    assert errors(other, right, True)["relative_error"] < 1e-5


@pytest.mark.parametrize("size", NOISE_SIZES)
def test_noise_has_its_size(size: float, checkpoint: Path, seen: Observations) -> None:
    good = loaded(checkpoint, UNBROKEN)
    noisy = MISTAKES[f"noise-{size:g}"].apply(good)
    right, wrong, again = (answers(p, seen, good.transforms.actions) for p in (good, noisy, noisy))
    assert errors(wrong, right, False)["relative_error"] == pytest.approx(size, rel=1e-2)
    assert np.array_equal(wrong.actions, again.actions)


def test_mistakes_refuse_what_they_cannot_break(checkpoint: Path, seen: Observations) -> None:
    dropped = loaded(checkpoint, CONTROL)
    for name in ("padding-seen", "causal-chunk"):
        with pytest.raises(ValueError, match="invalid_tokens='masked'"):
            MISTAKES[name].apply(dropped).infer(seen.observation(0))
    other = EngineAround(dropped.engine)
    other.name = "compiled"
    with pytest.raises(ValueError, match="engine 'compiled' does not run it"):
        MISTAKES["last-step"].apply(Policy(dropped.transforms, other, dropped.runtime))


@pytest.mark.parametrize("name", MISTAKES)
def test_sources_are_sent_to_workers(name: str, checkpoint: Path) -> None:
    source = MistakenSource(checkpoint, name, POLICY)
    assert pickle.loads(pickle.dumps(source)) == source
    described = source.describe()
    assert described["mistake"] == name
    assert described["invalid_tokens"] == ("dropped" if name == CONTROL else "masked")
    compiled = MistakenSource(checkpoint, name, {**POLICY, "engine": "compiled"})
    assert compiled.describe()["engine"] == ("eager" if MISTAKES[name].in_reference else "compiled")


@pytest.mark.parametrize("ticks", FROZEN_TICKS)
def test_a_frozen_picture_is_so_many_ticks_old(ticks: int) -> None:
    env = FrozenEnv(FakeEnv("fake", 0, 0.0), (ticks,), replan=5)
    env.task.step_limit = 31
    looks: list[tuple[int, int, int]] = []

    class Policy:
        def reset(self) -> None:
            pass

        def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
            picture = int(observation["observation/image"][0, 0, 0]) // 20
            looks.append((env.steps, picture, int(observation["observation/state"][2])))
            return {"actions": np.zeros((10, 7))}

    for _ in range(2):
        looks.clear()
        run_episode(env, Policy(), EpisodeSpec("fake", 0, 0, 7), replan=5)
        # The fake's pictures tell the tick modulo 13 (20 · 13 > 255).
        assert [now for now, _, _ in looks] == [0, 5, 10, 15, 20, 25, 30]
        assert [picture for _, picture, _ in looks] == [20 * max(0, t - ticks) % 256 // 20 for t in range(0, 31, 5)]
        assert [state for _, _, state in looks] == [now for now, _, _ in looks]


def test_a_broken_policy_plays_in_workers(checkpoint: Path, tmp_path: Path) -> None:
    scenes = FrozenScenes(FakeScenes(), 2, 5)
    source = MistakenSource(checkpoint, "causal-chunk", POLICY)
    summary = evaluate(fake_config(tmp_path, source=source, scenes=scenes, tasks=(0,), trials=2, workers=1))
    assert summary["total"]["episodes"] == 2
    config = read_config(tmp_path)["config"]
    assert config["source"]["mistake"] == "causal-chunk"
    assert config["scenes"]["frozen_ticks"] == 2


def test_looks_are_recorded_with_their_past(checkpoint: Path, tmp_path: Path) -> None:
    class LongScenes(FakeScenes):
        def open(self, suite: str, task: int) -> FakeEnv:
            env = FakeEnv(suite, task, 0.0)
            env.task.step_limit = 41
            env.step = lambda action: bool(FakeEnv.step(env, 0 * action))
            return env

    source = MistakenSource(checkpoint, UNBROKEN, POLICY)
    recording = Recording(source, LongScenes(), "fake", (0, 1), seed=7, per_task=3)
    observations = joined([record_task(recording, task) for task in (0, 1)])
    observations.save(tmp_path / "looks.npz")
    again = Observations.load(tmp_path / "looks.npz")
    assert len(again) == 6
    assert again.prompts[3] == "do 1"
    assert again.places.tolist()[:3] == [[0, 0, 10], [0, 0, 25], [0, 0, 40]]
    assert np.array_equal(again.pictures, observations.pictures)
    for age in AGES:
        shown = again.observation(1, age)["observation/image"]
        assert shown[0, 0, 0] == 20 * (25 - age) % 256
    with pytest.raises(ValueError, match="too few to choose 30 from"):
        record_task(Recording(source, LongScenes(), "fake", (0,), seed=7, per_task=30), 0)
