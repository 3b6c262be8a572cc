import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import turbopi
from turbopi import CheckpointError, InputError, Policy
from turbopi.checkpoint import convert, init_checkpoint
from turbopi.engine import create_engine, precision_dtype
from turbopi.policy import choose_device

Observation = dict[str, Any]


def load_policy(path: Path, **options: Any) -> Policy:
    return turbopi.load_policy(path, **{"device": "cpu", **options})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    init_checkpoint(root / "libero", "pi05-tiny", weights="hash", robot="libero")
    init_checkpoint(root / "pi0", "pi0-tiny", weights="hash", robot="libero")
    init_checkpoint(root / "droid", "pi05-tiny", weights="hash", robot="droid")
    init_checkpoint(root / "aloha", "pi0-tiny", weights="hash", robot="aloha")
    convert(root / "libero", root / "lerobot", "lerobot")
    return root


@pytest.fixture(scope="module")
def frames(data: Path) -> list[Observation]:
    z = np.load(data / "libero_frames.npz")
    return [
        {
            "observation/image": z["agentview"][i][::-1, ::-1],
            "observation/wrist_image": z["wrist"][i][::-1, ::-1],
            "observation/state": z["state"][i],
            "prompt": str(z["prompt"][i]),
        }
        for i in range(3)
    ]


def droid(frames: list[Observation]) -> Observation:
    return {
        "observation/exterior_image_1_left": frames[0]["observation/image"],
        "observation/wrist_image_left": frames[0]["observation/wrist_image"],
        "observation/joint_position": np.zeros(7),
        "observation/gripper_position": np.float64(0.5),
        "prompt": b"close the drawer",
    }


def aloha(frames: list[Observation]) -> Observation:
    image = np.moveaxis(frames[0]["observation/image"], -1, 0)
    return {"images": {"cam_high": image, "cam_left_wrist": image}, "state": np.zeros(14), "prompt": "fold"}


def test_infer_answers_like_openpi(checkpoints: Path, frames: list[Observation]) -> None:
    policy = load_policy(checkpoints / "libero")
    reply = policy.infer(frames[0])
    assert set(reply) == {"actions", "policy_timing"}
    assert reply["actions"].shape == (10, 7)
    assert np.isfinite(reply["actions"]).all()
    timing = reply["policy_timing"]
    stages = [timing[f"{name}_ms"] for name in ("transforms", "encode_images", "prefill", "denoise")]
    assert all(value > 0 for value in stages)
    assert sum(stages) == pytest.approx(timing["infer_ms"], rel=1e-6)


def test_actions_are_the_models(checkpoints: Path, frames: list[Observation]) -> None:
    """The policy adds nothing: transforms and `sample_actions`, put together by hand, give its actions."""
    policy = load_policy(checkpoints / "pi0", steps=4)
    model = turbopi.load_model(checkpoints / "pi0")
    noise = np.random.default_rng(0).standard_normal((10, 32)).astype(np.float32)
    arrays, context = policy.transforms.inputs(frames[0])
    inputs = turbopi.ModelInput(**{k: torch.from_numpy(v)[None] for k, v in vars(arrays).items()})
    actions = model.sample_actions(inputs, torch.from_numpy(noise)[None], steps=4)
    expected = policy.transforms.outputs(actions[0].numpy(), context)["actions"]
    assert np.array_equal(policy.infer(frames[0], noise)["actions"], expected)


def test_noise_is_a_seeded_stream_per_fork(checkpoints: Path, frames: list[Observation]) -> None:
    policy = load_policy(checkpoints / "libero")
    first, second = (policy.infer(frames[0])["actions"] for _ in range(2))
    assert not np.array_equal(first, second)
    fork = policy.fork()
    assert np.array_equal(fork.infer(frames[0])["actions"], first)
    policy.reset()
    assert np.array_equal(policy.infer(frames[0])["actions"], first)
    assert np.array_equal(policy.infer(frames[0])["actions"], second)
    other = load_policy(checkpoints / "libero", seed=1)
    assert not np.array_equal(other.infer(frames[0])["actions"], first)


def test_a_refused_request_does_not_advance_the_noise(checkpoints: Path, frames: list[Observation]) -> None:
    policy = load_policy(checkpoints / "libero")
    expected = policy.fork().infer(frames[0])["actions"]
    with pytest.raises(InputError):
        policy.infer({**frames[0], "observation/state": np.full(8, np.nan)})
    with pytest.raises(InputError):
        policy.infer(frames[0], noise=np.zeros((3, 32)))
    assert np.array_equal(policy.infer(frames[0])["actions"], expected)


@pytest.mark.parametrize(("name", "observe", "dims"), [("droid", droid, 8), ("aloha", aloha, 14)])
def test_other_robots(
    checkpoints: Path, frames: list[Observation], name: str, observe: Callable[..., Observation], dims: int
) -> None:
    policy = load_policy(checkpoints / name)
    assert policy.transforms.robot.name == name
    assert policy.infer(observe(frames))["actions"].shape == (10, dims)
    assert bool(policy.metadata) == (name == "aloha")


def test_a_lerobot_checkpoint_takes_its_own_features_or_a_robots(checkpoints: Path, frames: list[Observation]) -> None:
    own = load_policy(checkpoints / "lerobot", robot="lerobot")
    assert own.transforms.robot.name == "lerobot"
    keys = [camera.key for camera in own.transforms.robot.cameras]
    observation = {
        keys[0]: frames[0]["observation/image"],
        keys[1]: frames[0]["observation/wrist_image"],
        "observation.state": frames[0]["observation/state"],
        "task": frames[0]["prompt"],
    }
    named = load_policy(checkpoints / "lerobot")
    assert named.transforms.robot.name == "libero"
    assert np.array_equal(own.infer(observation)["actions"], named.infer(frames[0])["actions"])


def test_conversion_keeps_the_actions(checkpoints: Path, frames: list[Observation], tmp_path: Path) -> None:
    """π0 on LIBERO adds the state to its actions: a fact of the robot that lerobot's own description cannot hold."""
    convert(checkpoints / "pi0", tmp_path / "lerobot", "lerobot")
    convert(tmp_path / "lerobot", tmp_path / "jax", "jax")
    expected = load_policy(checkpoints / "pi0").infer(frames[0])["actions"]
    for name in ("lerobot", "jax"):
        assert np.array_equal(load_policy(tmp_path / name).infer(frames[0])["actions"], expected), name


def test_precision_and_numerics_reach_the_engine(checkpoints: Path, frames: list[Observation]) -> None:
    policy = load_policy(checkpoints / "libero", precision="bf16", numerics="lerobot", invalid_tokens="masked")
    described = policy.describe()
    assert (described["engine"], described["precision"], described["device"]) == ("eager", "bf16", "cpu")
    assert described["model"]["numerics"] == "lerobot"
    assert described["model"]["invalid_tokens"] == "masked"
    assert described["runtime"] == {"steps": 10, "seed": 0}
    exact = load_policy(checkpoints / "libero").infer(frames[0])["actions"]
    bf16 = policy.infer(frames[0])["actions"]
    assert 1e-5 < np.abs(bf16 - exact).max() < 0.2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"robot": "spot"}, ValueError, "unknown robot 'spot'; known: libero, droid, aloha"),
        ({"robot": "lerobot"}, ValueError, "robot 'lerobot' describes lerobot checkpoints"),
        ({"engine": "warp"}, ValueError, "unknown engine 'warp'; known: .*eager"),
        ({"precision": "fp4"}, ValueError, "unknown precision 'fp4'; known: fp32, bf16"),
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1"),
        ({"seed": -1}, ValueError, "seed must be a non-negative integer"),
        ({"numerics": "fast"}, ValueError, "numerics must be one of"),
        ({"numerics": "jax", "precision": "bf16"}, ValueError, "float32 only"),
        ({"device": "warp9"}, ValueError, "no device name"),
        ({"tokenizer": "/nowhere.model"}, FileNotFoundError, "/nowhere.model"),
        ({"asset_id": "mars"}, CheckpointError, "mars"),
    ],
)
def test_options_that_cannot_be_honoured(
    checkpoints: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_policy(checkpoints / "libero", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_said(checkpoints: Path) -> None:
    with pytest.raises(ValueError, match="torch sees 0 CUDA devices"):
        load_policy(checkpoints / "libero", device="cuda")
    assert choose_device("auto") == "cpu"


def test_a_checkpoint_of_an_unknown_robot_asks_for_one(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "libero", tmp_path / "ck")
    assets = tmp_path / "ck" / "assets"
    found = next(assets.rglob("norm_stats.json"))
    (assets / "mine").mkdir()
    found.rename(assets / "mine" / "norm_stats.json")
    with pytest.raises(ValueError, match=r"does not say which robot it is for \(mine\); give robot="):
        load_policy(tmp_path / "ck")
    assert isinstance(load_policy(tmp_path / "ck", robot="libero"), Policy)
    assert isinstance(load_policy(tmp_path / "ck", robot=turbopi.transforms.get_robot("libero")), Policy)
    shutil.rmtree(assets)
    with pytest.raises(CheckpointError, match="no normalisation statistics"):
        load_policy(tmp_path / "ck", robot="libero")


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (np.zeros((10, 31), np.float32), "expected .10, 32. float32"),
        (np.zeros((10, 32), np.int64), "int64, expected"),
        (np.full((10, 32), np.nan), "NaN"),
    ],
)
def test_bad_noise(checkpoints: Path, frames: list[Observation], noise: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_policy(checkpoints / "libero").infer(frames[0], noise)


def test_engine_names() -> None:
    with pytest.raises(ValueError, match="unknown engine"):
        create_engine("none", None, "fp32")  # type: ignore[arg-type]
    assert precision_dtype("bf16") == torch.bfloat16
