"""Robots: keys, slots, joint spaces and their inverses, and robots read from a lerobot config."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transforms_support import DATA, make_frame, make_observation

from turbopi.errors import InputError
from turbopi.transforms import (
    ALOHA,
    DROID,
    LIBERO,
    ROBOTS,
    absolute_actions,
    action_mask,
    get_robot,
    relative_actions,
    robot_from_lerobot,
)

LEROBOT_CONFIG = json.loads((DATA / "io" / "ckpt_lerobot_pi05_tiny" / "config.json").read_text())


def test_the_robots():
    assert list(ROBOTS) == ["libero", "droid", "aloha"]
    assert get_robot("droid") is DROID
    with pytest.raises(ValueError, match="unknown robot 'ur5'; known: libero, droid, aloha"):
        get_robot("ur5")
    dims = {name: (robot.state_dim, robot.action_dim) for name, robot in ROBOTS.items()}
    assert dims == {"libero": (8, 7), "droid": (8, 8), "aloha": (14, 14)}


def test_what_the_published_models_assume():
    table = {
        (name, kind): (d.horizon, d.asset_id, d.state_in_prompt, d.absolute_mask)
        for name, robot in ROBOTS.items()
        for kind, d in robot.defaults.items()
    }
    six = (True,) * 6 + (False,)
    libero = "physical-intelligence/libero"
    assert table == {
        ("libero", "pi0"): (50, libero, False, six),
        ("libero", "pi05"): (10, libero, False, None),
        ("droid", "pi0"): (10, "droid", False, None),
        ("droid", "pi05"): (15, "droid", True, None),
        ("aloha", "pi0"): (50, "trossen", False, six + six),
        ("aloha", "pi05"): (50, "trossen", True, six + six),
    }
    assert ALOHA.metadata == {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}
    assert LIBERO.metadata == {}


@given(hnp.arrays(np.float64, (3, 14), elements=st.floats(0, 1)))
@settings(max_examples=100, deadline=None)
def test_alohas_state_comes_back(state):
    state = state * 2 - 1
    state[:, [6, 13]] = (state[:, [6, 13]] + 1) / 2  # an opening is within 0..1
    there = ALOHA.space.state_to_model(state)
    np.testing.assert_allclose(ALOHA.space.state_to_robot(there), state, atol=1e-7)
    np.testing.assert_array_equal(there[:, 1], -state[:, 1])
    np.testing.assert_array_equal(there[:, 7], state[:, 7])


@given(hnp.arrays(np.float64, (5, 14), elements=st.floats(-10, 10)))
@settings(max_examples=100, deadline=None)
def test_alohas_actions_come_back(actions):
    space = ALOHA.space
    np.testing.assert_allclose(space.actions_to_model(space.actions_to_robot(actions)), actions, atol=1e-12)
    np.testing.assert_allclose(space.actions_to_robot(space.actions_to_model(actions)), actions, atol=1e-12)


def test_an_aloha_state_may_be_whole_numbers():
    state = [0, -1, 1, 0, 0, 0, 1] * 2
    found = ALOHA.read_state({"state": state})
    np.testing.assert_array_equal(found, ALOHA.read_state({"state": np.array(state, np.float64)}))
    assert found[[6, 13]].min() > 0.5
    for dtype in (np.float32, np.float64):
        assert ALOHA.space.state_to_model(np.array(state, dtype)).dtype == np.float64  # as openpi's flips make it


def test_an_opening_beyond_the_crank_is_clipped():
    state = np.zeros(14)
    state[[6, 13]] = -0.01844 / (0.05800 - 0.01844), 5.0  # a finger at 0, and one far outside
    grippers = ALOHA.space.state_to_model(state)[[6, 13]]
    ends = (np.array([-np.pi / 2, np.pi / 2]) - 0.5476) / (1.6296 - 0.5476)
    np.testing.assert_allclose(grippers, ends)


@given(
    actions=hnp.arrays(np.float64, (4, 14), elements=st.floats(-100, 100)),
    state=hnp.arrays(np.float64, 14, elements=st.floats(-100, 100)),
    mask=st.lists(st.booleans(), max_size=14),
)
@settings(max_examples=100, deadline=None)
def test_relative_actions_come_back(actions, state, mask):
    before = actions.copy()
    relative = relative_actions(actions, state, mask)
    np.testing.assert_allclose(absolute_actions(relative, state, mask), actions, atol=1e-12)
    np.testing.assert_array_equal(actions, before)
    untouched = [i for i in range(14) if i >= len(mask) or not mask[i]]
    np.testing.assert_array_equal(relative[:, untouched], actions[:, untouched])


def test_masks():
    assert action_mask(2, -1, 1) == (True, True, False, True)
    with pytest.raises(ValueError, match=r"must not be 0, got \(6, 0\)"):
        action_mask(6, 0)
    batched = absolute_actions(np.zeros((2, 3, 4)), np.array([[1.0, 2, 3, 4], [5.0, 6, 7, 8]]), (True, False))
    assert batched[1].tolist() == [[5.0, 0, 0, 0]] * 3


def test_droids_gripper_may_be_a_bare_number():
    observation = make_observation("droid")
    whole = DROID.read_state(observation)
    for gripper in (float(whole[7]), np.float64(whole[7]), np.array(whole[7])):
        state = DROID.read_state(observation | {"observation/gripper_position": gripper})
        np.testing.assert_array_equal(state, whole)
    assert whole.dtype == np.float64
    half = {k: np.asarray(v, np.float32) for k, v in observation.items() if "position" in k}
    assert DROID.read_state(half).dtype == np.float32


@pytest.mark.parametrize(
    ("robot", "change", "said"),
    [
        ("libero", {"observation/state": None}, "the observation has no observation/state; it has observation/image, "),
        ("libero", {"observation/state": np.zeros(7)}, r"observation/state has shape \(7,\), expected \(8,\)"),
        ("libero", {"observation/state": np.zeros((1, 8))}, r"shape \(1, 8\), expected \(8,\); .*not batched"),
        ("libero", {"observation/state": np.full(8, np.nan)}, "observation/state has NaN or infinite values"),
        ("libero", {"observation/state": np.full(8, np.inf)}, "NaN or infinite values"),
        ("libero", {"observation/state": ["a"] * 8}, "dtype <U1, expected real numbers"),
        ("libero", {"observation/state": np.zeros(8, complex)}, "dtype complex128"),
        ("libero", {"observation/state": 1.0}, r"shape \(\), expected \(8,\)"),
        ("droid", {"observation/gripper_position": np.zeros(2)}, r"gripper_position has shape \(2,\), expected \(1,\)"),
        ("aloha", {"state": np.zeros(32)}, r"state has shape \(32,\), expected \(14,\)"),
    ],
)
def test_bad_states(robot, change, said):
    with pytest.raises(InputError, match=said):
        get_robot(robot).read_state(changed(make_observation(robot), change))


@pytest.mark.parametrize(
    ("robot", "change", "said"),
    [
        ("libero", {"observation/wrist_image": None}, "the observation has no observation/wrist_image; it has obs"),
        ("aloha", {"images": None}, "the observation has no images; it has prompt, state"),
        ("aloha", {"images": make_frame(0)}, "images is a ndarray, expected a map"),
        ("aloha", {"images": {"cam_left_wrist": 0}}, "has no images/cam_high; it has cam_left_wrist"),
        (
            "aloha",
            {"images": {"cam_high": 0, "cam_feet": 0}},
            "images has unknown cameras cam_feet; send only cam_high",
        ),
    ],
)
def test_missing_frames(robot, change, said):
    with pytest.raises(InputError, match=said):
        get_robot(robot).read_images(changed(make_observation(robot), change))


def changed(observation: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """None removes a key."""
    merged = observation | change
    return {key: value for key, value in merged.items() if value is not None}


def test_prompts():
    observation = make_observation("libero")
    assert LIBERO.read_prompt(observation, "wave") == "pick up the black bowl"
    assert LIBERO.read_prompt({"prompt": b"wave"}, None) == "wave"
    assert LIBERO.read_prompt({}, "wave") == "wave"
    with pytest.raises(InputError, match="the observation has no prompt and the policy no default prompt"):
        LIBERO.read_prompt({}, None)


def test_a_robot_from_a_lerobot_checkpoint():
    robot = robot_from_lerobot(LEROBOT_CONFIG)
    assert [(c.key, c.slot) for c in robot.cameras] == [
        ("observation.images.image", "image"),
        ("observation.images.image2", "image2"),
    ]
    assert (robot.state_dim, robot.action_dim) == (8, 7)
    defaults = robot.default("pi05")
    assert (defaults.horizon, defaults.state_in_prompt, defaults.absolute_mask) == (10, True, None)
    with pytest.raises(ValueError, match="robot 'lerobot' is described for pi05 only, not for 'pi0'"):
        robot.default("pi0")
    assert robot.read_prompt({"prompt": "a"}, None) == "a"
    assert robot.read_prompt({"prompt": "a", "task": "b"}, None) == "b"
    with pytest.raises(InputError, match="no task or prompt"):
        robot.read_prompt({}, None)
    with pytest.raises(
        InputError, match=r"no camera frame, expected one of observation.images.image, obs.*it has nothing"
    ):
        robot.read_images({})


def test_lerobots_empty_cameras_and_relative_actions():
    config = LEROBOT_CONFIG | {
        "empty_cameras": 2,
        "use_relative_actions": True,
        "action_feature_names": ["x", "y", "z", "Left_Gripper.pos"],
    }
    config["input_features"] = config["input_features"] | {"observation.images.empty_camera_0": {"type": "VISUAL"}}
    robot = robot_from_lerobot(config)
    assert [camera.slot for camera in robot.cameras] == ["image", "image2", "empty_camera_0", "empty_camera_1"]
    assert robot.default("pi05").absolute_mask == (True, True, True, False, True, True, True)
    unnamed = robot_from_lerobot(config | {"action_feature_names": None})
    assert unnamed.default("pi05").absolute_mask == (True,) * 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "act"}, "type 'act', expected 'pi0' or 'pi05'"),
        ({"input_features": None}, "has no input_features"),
        ({"empty_cameras": "1"}, "has empty_cameras '1', expected a number"),
        ({"empty_cameras": -1}, "has empty_cameras -1, expected a number"),
        ({"output_features": {}}, r"output_features\['action'\] with shape None"),
        ({"output_features": {"action": {"shape": [7, 2]}}}, r"shape \[7, 2\], expected one length"),
        ({"input_features": {"observation.state": {"shape": [8]}}}, "lists no VISUAL feature"),
        ({"input_features": {"observation.images.a": {"type": "VISUAL"}}}, r"\['observation.state'\] with shape None"),
        ({"chunk_size": None}, "chunk_size None"),
    ],
)
def test_lerobot_configs_that_do_not_describe_a_robot(change, said):
    with pytest.raises(ValueError, match=said):
        robot_from_lerobot(LEROBOT_CONFIG | change)
