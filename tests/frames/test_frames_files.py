from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from turbopi import InputError, Policy, load_policy
from turbopi.checkpoint import init_checkpoint
from turbopi.frames import model_inputs, read_frames, read_observation
from turbopi.transforms import ALOHA, DROID, LIBERO


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    root = tmp_path_factory.mktemp("frames") / "ck"
    return load_policy(init_checkpoint(root, "pi05-tiny", weights="hash", robot="libero"), device="cpu")


def libero(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return {
        "observation/image": picture,
        "observation/wrist_image": picture[::-1],
        "observation/state": rng.standard_normal(8),
        "prompt": f"task {seed}",
    }


def test_raw_libero_frames_are_turned_as_the_policy_wants_them(data: Path) -> None:
    frames = read_frames(data / "libero_frames.npz", LIBERO)
    raw = np.load(data / "libero_frames.npz")
    assert len(frames) == len(raw["state"])
    assert np.array_equal(frames[3]["observation/image"], raw["agentview"][3][::-1, ::-1])
    assert np.array_equal(frames[3]["observation/wrist_image"], raw["wrist"][3][::-1, ::-1])
    assert np.array_equal(frames[3]["observation/state"], raw["state"][3])
    assert frames[3]["prompt"] == str(raw["prompt"][3])


def test_a_single_raw_libero_frame_is_turned_like_one_of_many(data: Path, tmp_path: Path) -> None:
    raw = np.load(data / "libero_frames.npz")
    one = {key: raw[key][3] for key in ("agentview", "wrist", "state", "prompt")}
    np.savez(tmp_path / "one.npz", **one)
    (frame,) = read_frames(tmp_path / "one.npz", LIBERO)
    expected = read_frames(data / "libero_frames.npz", LIBERO)[3]
    for key in ("observation/image", "observation/wrist_image", "observation/state"):
        assert np.array_equal(frame[key], expected[key])
    np.savez(tmp_path / "grey.npz", **{**one, "wrist": one["wrist"][..., 0]})
    with pytest.raises(InputError, match=r"wrist has shape \(\d+, \d+\), expected \(H,W,3\)"):
        read_frames(tmp_path / "grey.npz", LIBERO)


def test_one_observation_many_and_a_directory(tmp_path: Path) -> None:
    for seed in range(3):
        np.savez(tmp_path / f"frame_{seed}.npz", **libero(seed))
    found = read_frames(tmp_path, LIBERO)
    assert [frame["prompt"] for frame in found] == ["task 0", "task 1", "task 2"]
    stacked = {key: np.stack([libero(seed)[key] for seed in range(3)]) for key in libero()}
    np.savez(tmp_path / "many", **stacked)
    many = read_frames(tmp_path / "many.npz", LIBERO)
    for one, other in zip(found, many, strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in libero())
    np.savez(tmp_path / "shared", **{**stacked, "prompt": "one for all"})
    assert [frame["prompt"] for frame in read_frames(tmp_path / "shared.npz", LIBERO)] == ["one for all"] * 3


def test_groups_of_cameras_become_a_map(tmp_path: Path) -> None:
    pictures = np.zeros((2, 3, 8, 8), np.uint8)
    np.savez(tmp_path / "a", **{"images/cam_high": pictures, "state": np.zeros((2, 14)), "prompt": "fold"})
    frames = read_frames(tmp_path / "a.npz", ALOHA)
    assert len(frames) == 2
    assert frames[1]["images"]["cam_high"].shape == (3, 8, 8)
    np.savez(tmp_path / "o", **{"images/cam_high": pictures[0], "state": np.zeros(14), "prompt": "fold"})
    assert read_observation(tmp_path / "o.npz", "images")["images"]["cam_high"].shape == (3, 8, 8)


def test_a_state_of_single_numbers_counts_frames_by_its_longest_part(tmp_path: Path) -> None:
    pictures = np.zeros((2, 8, 8, 3), np.uint8)
    values = {
        "observation/exterior_image_1_left": pictures,
        "observation/wrist_image_left": pictures,
        "observation/joint_position": np.zeros((2, 7)),
        "observation/gripper_position": np.zeros((2, 1)),
        "prompt": "x",
    }
    np.savez(tmp_path / "d", **values)
    assert len(read_frames(tmp_path / "d.npz", DROID)) == 2


def test_files_that_are_no_frames(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no observation at"):
        read_frames(tmp_path / "none.npz", LIBERO)
    with pytest.raises(FileNotFoundError, match=r"no \.npz files in .*turbo-pi serve --record"):
        read_frames(tmp_path, LIBERO)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(InputError, match=r"is not an \.npz file of plain arrays"):
        read_frames(tmp_path / "broken.npz", LIBERO)
    np.savez_compressed(tmp_path / "bits.npz", state=np.arange(4096) % 251)
    damaged = bytearray((tmp_path / "bits.npz").read_bytes())
    damaged[80:400] = bytes(value ^ 0x5A for value in damaged[80:400])
    (tmp_path / "bits.npz").write_bytes(damaged)
    with pytest.raises(InputError, match=r"bits\.npz is not an \.npz file of plain arrays"):
        read_frames(tmp_path / "bits.npz", LIBERO)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(InputError, match="holds a single array"):
        read_frames(tmp_path / "array.npy", LIBERO)
    np.savez(tmp_path / "bare", agentview=np.zeros((1, 8, 8, 3)), wrist=np.zeros((1, 8, 8, 3)))
    with pytest.raises(InputError, match="without state and prompt"):
        read_frames(tmp_path / "bare.npz", LIBERO)
    np.savez(
        tmp_path / "ragged", **{"observation/state": np.zeros((2, 8)), "observation/image": np.zeros((3, 8, 8, 3))}
    )
    with pytest.raises(InputError, match="arrays of different lengths"):
        read_frames(tmp_path / "ragged.npz", LIBERO)


def test_frames_of_another_robot_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "o", **libero())
    with pytest.raises(InputError, match=r"which robot 'aloha' sends.*are the frames of another robot"):
        read_frames(tmp_path / "o.npz", ALOHA)


def test_inputs_are_the_policys(policy: Policy) -> None:
    frames = [libero(seed) for seed in range(8)]
    batches = list(model_inputs(policy, frames))
    assert len(batches) == 8
    arrays, _ = policy.transforms.inputs(frames[5])
    assert torch.equal(batches[5][0].images[0], torch.from_numpy(arrays.images))
    assert torch.equal(batches[5][0].tokens[0], torch.from_numpy(arrays.tokens))
    assert batches[5][1].shape == (1, 10, 32)
    again = list(model_inputs(policy, frames))
    assert torch.equal(again[5][1], batches[5][1])


def test_too_few_frames(policy: Policy) -> None:
    with pytest.raises(InputError, match="3 frames are too few, at least 8 are needed"):
        model_inputs(policy, [libero()] * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation/state": np.zeros(7)}, r"frame 2 is none of robot 'libero'.*shape \(7,\), expected \(8,\)"),
        ({"observation/image": np.zeros((8, 8), np.uint8)}, r"frame 2 .*observation/image has shape \(8, 8\)"),
        ({"observation/state": np.full(8, np.nan)}, "frame 2 .*NaN"),
    ],
)
def test_frames_of_the_wrong_shape(policy: Policy, change: dict[str, Any], message: str) -> None:
    frames = [libero(seed) for seed in range(8)]
    frames[2] |= change
    with pytest.raises(InputError, match=message):
        list(model_inputs(policy, frames))
