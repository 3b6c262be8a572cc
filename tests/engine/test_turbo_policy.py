"""A policy over an engine that runs whole ticks: images stay uint8 until the engine has them."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captured_support import Rerun

from turbopi import Policy, load_policy
from turbopi.checkpoint import init_checkpoint
from turbopi.checkpoint.load import load_model
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo.ops import twin_ops
from turbopi.errors import NonFiniteActionsError
from turbopi.policy import choose_device


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_checkpoint(tmp_path_factory.mktemp("turbo") / "ck", "pi05-tiny", weights="hash", robot="libero")


@pytest.fixture
def observation(data: Path) -> dict[str, Any]:
    z = np.load(data / "libero_frames.npz")
    return {
        "observation/image": z["agentview"][0][::-1, ::-1],
        "observation/wrist_image": z["wrist"][0][::-1, ::-1],
        "observation/state": z["state"][0],
        "prompt": str(z["prompt"][0]),
    }


def turbo_policy(checkpoint: Path, recorder: Rerun | None = None) -> tuple[Policy, Policy]:
    """The eager policy, and one over twins."""
    eager = load_policy(checkpoint, device="cpu", steps=3)
    engine = TurboEngine(load_model(checkpoint), "fp32", twin_ops(), recorder)
    return eager, Policy(dataclasses.replace(eager.transforms, uint8_images=True), engine, eager.runtime)


def test_actions_are_the_eager_policys(checkpoint: Path, observation: dict[str, Any]) -> None:
    eager, turbo = turbo_policy(checkpoint)
    arrays, _ = turbo.transforms.inputs(observation)
    assert arrays.images.dtype == np.uint8
    scaled, _ = eager.transforms.inputs(observation)
    assert np.array_equal(arrays.images.astype(np.float32) / np.float32(255) * 2 - 1, scaled.images)
    expected = eager.infer(observation)["actions"]
    assert np.abs(turbo.infer(observation)["actions"] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_timing_without_stages(checkpoint: Path, observation: dict[str, Any]) -> None:
    timing = turbo_policy(checkpoint)[1].infer(observation)["policy_timing"]
    assert list(timing) == ["infer_ms", "transforms_ms", "model_ms"]
    assert timing["infer_ms"] == pytest.approx(timing["transforms_ms"] + timing["model_ms"])


def test_warm_up_prepares_for_every_prompt(checkpoint: Path, observation: dict[str, Any]) -> None:
    recorder = Rerun()
    _, policy = turbo_policy(checkpoint, recorder)
    policy.warm_up()
    prepared = recorder.recorded
    for prompt in ("go", "pick up the black bowl and put it on the plate"):
        policy.fork().infer(observation | {"prompt": prompt})
    assert recorder.recorded == prepared
    details = policy.describe()["engine_details"]
    assert (details["ops"], details["denoise_loop"], details["graphs"]) == ("twins", {"1": "rows"}, prepared)


def test_not_a_number_never_reaches_the_robot(checkpoint: Path, observation: dict[str, Any]) -> None:
    model = load_model(checkpoint)
    with torch.no_grad():
        model.action_out_proj.bias[0] = math.inf
    eager, _ = turbo_policy(checkpoint)
    policy = Policy(eager.transforms, TurboEngine(model, "fp32", twin_ops(), None), eager.runtime)
    with pytest.raises(NonFiniteActionsError):
        policy.infer(observation)


def test_frames_that_are_resized_as_floats_cannot_stay_uint8(checkpoint: Path) -> None:
    transforms = load_policy(checkpoint, device="cpu").transforms
    with pytest.raises(ValueError, match="images cannot be left as uint8"):
        dataclasses.replace(transforms, resize="lerobot", uint8_images=True)


@pytest.mark.gpu
def test_a_loaded_policy_is_warm(checkpoint: Path, observation: dict[str, Any]) -> None:
    assert choose_device("auto") == "cuda"
    policy = load_policy(checkpoint, engine="turbo", precision="fp32", steps=3)
    assert policy.transforms.uint8_images
    prepared = policy.describe()["engine_details"]["graphs"]
    expected = load_policy(checkpoint, device="cpu", steps=3).infer(observation)["actions"]
    assert np.abs(policy.infer(observation)["actions"] - expected).max() <= 1e-4
    assert policy.describe()["engine_details"]["graphs"] == prepared
