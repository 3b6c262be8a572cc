"""The composed way in and out: order, slots, dtypes, conventions, and what does not fit together."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transforms_support import DATA, LetterTokenizer, letter_config, make_frame, make_observation, make_stats

from turbopi.config import preset
from turbopi.errors import InputError
from turbopi.transforms import (
    ALOHA,
    DROID,
    LIBERO,
    ROBOTS,
    KindDefaults,
    NormStats,
    PolicyTransforms,
    build_transforms,
    get_robot,
    image_to_model,
    load_tokenizer,
    relative_actions,
    robot_from_lerobot,
    shipped_tokenizer,
)

TINY = ("pi0-tiny", "pi05-tiny")
LEROBOT = robot_from_lerobot(json.loads((DATA / "io" / "ckpt_lerobot_pi05_tiny" / "config.json").read_text()))


def build(name: str, robot: Any = LIBERO, **options: Any) -> PolicyTransforms:
    config = options.pop("config", None) or letter_config(name)
    stats = options.pop("stats", None) or make_stats(robot.state_dim, robot.action_dim)
    return build_transforms(config, robot, stats, options.pop("tokenizer", LetterTokenizer()), **options)


def text_of(arrays: Any) -> str:
    return "".join(chr(token - 1000) for token in arrays.tokens[arrays.token_mask][1:])


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("robot", ROBOTS)
def test_every_robot_through_every_kind(name, robot):
    config = preset(name)
    robot = get_robot(robot)
    config = replace(config, max_tokens=160)
    stats = make_stats(robot.state_dim, robot.action_dim)
    transforms = build_transforms(config, robot, stats, load_tokenizer(shipped_tokenizer()))
    arrays, context = transforms.inputs(make_observation(robot.name))
    assert (arrays.images.shape, arrays.images.dtype) == ((3, 3, 56, 56), np.float32)
    assert arrays.image_mask.tolist() == [True, True, robot is ALOHA]
    assert (arrays.images[~arrays.image_mask] == -1).all()
    assert (arrays.tokens.shape, arrays.tokens.dtype, arrays.token_mask.dtype) == ((160,), np.int64, bool)
    assert (arrays.state.shape, arrays.state.dtype) == ((32,), np.float32)
    assert (arrays.state[robot.state_dim :] == 0).all()
    actions = np.random.default_rng(0).normal(size=(10, 32)).astype(np.float32)
    answer = transforms.outputs(actions, context)
    assert list(answer) == ["actions"]
    assert answer["actions"].shape == (10, robot.action_dim)
    json.dumps(transforms.describe())


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("robot", [LIBERO, DROID, ALOHA, LEROBOT], ids=lambda r: r.name)
@pytest.mark.parametrize("convention", ["openpi", "lerobot"])
@given(
    wanted=hnp.arrays(np.float64, (4, 14), elements=st.floats(-2, 2)),
    state=hnp.arrays(np.float64, 14, elements=st.floats(0, 1)),
)
@settings(max_examples=5, deadline=None)
def test_the_inverse_of_the_way_out_brings_robot_actions_back(name, robot, convention, wanted, state):
    """What training does to a robot's actions, undone by `outputs`."""
    if name.removesuffix("-tiny") not in robot.defaults:
        return
    wanted = wanted[:, : robot.action_dim]
    transforms = build(name, robot, convention=convention)
    observation = make_observation(robot.name)
    for part in robot.state:
        observation[part.key], state = state[: part.size], state[part.size :]
    _, context = transforms.inputs(observation)
    trained = robot.space.actions_to_model(wanted)
    if transforms.absolute_mask is not None:
        trained = relative_actions(trained, context.state, transforms.absolute_mask)
    normalized = np.pad(transforms.actions.normalize(trained), ((0, 0), (0, 32 - robot.action_dim)))
    np.testing.assert_allclose(transforms.outputs(normalized, context)["actions"], wanted, atol=1e-6)


def test_aloha_adds_the_state_before_it_turns_the_joints():
    transforms = build("pi0-tiny", ALOHA)
    observation = make_observation("aloha")
    _, context = transforms.inputs(observation)
    stay = np.zeros((2, 32))
    stay[:, :14] = transforms.actions.normalize(np.zeros((2, 14)))
    actions = transforms.outputs(stay, context)["actions"]
    joints = [i for i in range(14) if i not in (6, 13)]
    np.testing.assert_allclose(actions[:, joints], np.tile(observation["state"][joints], (2, 1)), atol=1e-9)
    np.testing.assert_allclose(actions[:, 6], (0.5476 + 0.6213) / (1.4910 + 0.6213), atol=1e-9)


def test_aloha_slots_follow_the_cameras_that_are_there():
    transforms = build("pi0-tiny", ALOHA)
    observation = make_observation("aloha")
    frames = {k: v for k, v in observation["images"].items() if k in ("cam_high", "cam_right_wrist")}
    arrays, _ = transforms.inputs(observation | {"images": frames})
    assert arrays.image_mask.tolist() == [True, False, True]
    expected = image_to_model(frames["cam_right_wrist"], "x", 56)
    np.testing.assert_array_equal(arrays.images[2], expected)
    assert (arrays.images[1] == -1).all()
    with pytest.raises(InputError, match=r"images/cam_high has shape \(40, 60, 3\), expected \(3, height, width\)"):
        transforms.inputs(observation | {"images": {"cam_high": make_frame(0)}})


def test_lerobot_puts_missing_cameras_last():
    robot = replace(LEROBOT, cameras=(*LEROBOT.cameras, replace(LEROBOT.cameras[0], key="third", slot="third")))
    transforms = build("pi05-tiny", robot, convention="lerobot")
    observation = make_observation("lerobot")
    observation["third"] = make_frame(7)
    del observation["observation.images.image2"]
    arrays, _ = transforms.inputs(observation)
    assert arrays.image_mask.tolist() == [True, True, False]
    np.testing.assert_array_equal(arrays.images[1], image_to_model(observation["third"], "x", 56, resize="lerobot"))


@pytest.mark.parametrize("name", TINY)
def test_dtypes_follow_the_ports(name):
    actions = np.zeros((2, 32), np.float32)
    for convention, sent, expected in (
        ("openpi", np.float64, np.float64),
        ("openpi", np.float32, np.float64),
        ("lerobot", np.float64, np.float32),
        ("lerobot", np.float32, np.float32),
    ):
        for absolute in (False, None):
            transforms = build(name, convention=convention, absolute=absolute)
            observation = make_observation("libero")
            observation["observation/state"] = observation["observation/state"].astype(sent)
            _, context = transforms.inputs(observation)
            assert transforms.outputs(actions, context)["actions"].dtype == expected


@pytest.mark.parametrize(
    ("name", "robot", "options", "start"),
    [
        ("pi05-tiny", LIBERO, {}, "pick up the black bowl\n"),
        ("pi05-tiny", DROID, {}, "Task: put the marker in the cup, State: "),
        ("pi05-tiny", DROID, {"state_in_prompt": False}, "put the marker in the cup\n"),
        ("pi05-tiny", ALOHA, {}, "Task: uncap the pen, State: "),
        ("pi05-tiny", LIBERO, {"convention": "lerobot"}, "Task: pick up the black bowl, State: "),
        ("pi05-tiny", LIBERO, {"convention": "lerobot", "prompt_convention": "openpi"}, "pick up the black bowl\n"),
        ("pi0-tiny", DROID, {}, "put the marker in the cup\n"),
        ("pi05-tiny", LIBERO, {"config": letter_config("pi05-tiny", state_in_prompt=True)}, "Task: pick up"),
        ("pi05-tiny", DROID, {"config": letter_config("pi05-tiny", state_in_prompt=False)}, "put the marker"),
    ],
)
def test_which_prompt_is_used(name, robot, options, start):
    transforms = build(name, robot, **options)
    arrays, _ = transforms.inputs(make_observation(robot.name))
    assert text_of(arrays).startswith(start)
    assert transforms.describe()["state_in_prompt"] == start.startswith("Task: ")


def test_the_prompt_spells_the_normalised_unpadded_state():
    transforms = build("pi05-tiny", DROID, config=letter_config("pi05-tiny", max_tokens=200))
    observation = make_observation("droid")
    arrays, _ = transforms.inputs(observation)
    state = np.concatenate([observation["observation/joint_position"], observation["observation/gripper_position"]])
    stats = make_stats(8, 8).state
    normalized = (state - stats.q01) / (stats.q99 - stats.q01 + 1e-6) * 2 - 1
    bins = " ".join(str(int(b)) for b in np.digitize(normalized, np.linspace(-1, 1, 257)[:-1]) - 1)
    assert text_of(arrays) == f"Task: put the marker in the cup, State: {bins};\nAction: "


def test_the_default_prompt():
    observation = make_observation("libero")
    del observation["prompt"]
    arrays, context = build("pi0-tiny", default_prompt="wave").inputs(observation)
    assert text_of(arrays) == "wave\n"
    assert context.prompt == "wave"
    with pytest.raises(InputError, match="no default prompt"):
        build("pi0-tiny").inputs(observation)


def test_bad_requests():
    transforms = build("pi0-tiny")
    with pytest.raises(InputError, match="the observation is a list, expected a map"):
        transforms.inputs([1, 2])
    observation = make_observation("libero")
    with pytest.raises(InputError, match=r"the state \[1e\+300, .* is too large to normalise"):
        transforms.inputs(observation | {"observation/state": np.full(8, 1e300)})
    with pytest.raises(InputError, match=r"observation/image has shape \(3, 4\), expected \(height, width, 3\)"):
        transforms.inputs(observation | {"observation/image": np.zeros((3, 4), np.uint8)})
    bad = np.full((40, 60, 3), np.nan)
    with pytest.raises(InputError, match="observation/wrist_image has NaN"):
        transforms.inputs(observation | {"observation/wrist_image": bad})


def test_bad_actions():
    transforms = build("pi0-tiny")
    _, context = transforms.inputs(make_observation("libero"))
    with pytest.raises(ValueError, match=r"shape \(10, 7\), expected \(horizon, 32\)"):
        transforms.outputs(np.zeros((10, 7)), context)
    with pytest.raises(ValueError, match="actions have NaN or infinite values"):
        transforms.outputs(np.full((10, 32), np.nan), context)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stats": make_stats(7, 7)}, "stats of the state have 7 numbers, robot 'libero' needs 8"),
        ({"stats": make_stats(8, 6)}, "stats of the actions have 6 numbers, robot 'libero' needs 7"),
        ({"convention": "jax"}, "convention must be one of openpi, lerobot, got 'jax'"),
        ({"resize": "cubic"}, "resize must be one of"),
        ({"prompt_convention": "x"}, "prompt_convention must be one of"),
        ({"config": letter_config("pi0-tiny", cameras=1)}, "robot 'libero' has 2 cameras, the model 1 slots"),
        ({"config": letter_config("pi0-tiny", state_dim=7)}, "a state of 8 numbers, the model takes at most 7"),
        ({"config": letter_config("pi0-tiny", action_dim=6)}, "an? action of 7 numbers, the model takes at most 6"),
        ({"config": letter_config("pi0-tiny", vocab_size=1024)}, "the tokenizer has 2000 tokens"),
        ({"state_in_prompt": True}, "π0 takes its state as a token"),
        ({"robot": DROID, "absolute": True}, "robot 'droid' has no absolute_mask for pi0"),
        (
            {"robot": replace(LIBERO, defaults={"pi0": KindDefaults(10, absolute_mask=(False,) * 8 + (True,))})},
            "reaches beyond its state of 8 numbers",
        ),
    ],
)
def test_parts_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build("pi0-tiny", **options)


def test_quantiles_are_demanded_where_they_are_used():
    stats = make_stats(8, 7)
    bare = replace(stats, actions=NormStats(stats.actions.mean, stats.actions.std))
    with pytest.raises(ValueError, match="norm stats of the actions have no q01, which mode 'quantile' needs"):
        build("pi05-tiny", stats=bare)
    mixed = build("pi05-tiny", stats=bare, action_mode="mean_std")
    assert mixed.describe()["state_normalization"] == "quantile"
    assert mixed.describe()["action_normalization"] == "mean_std"
    assert build("pi05-tiny", stats=bare, mode="mean_std").state.mode == "mean_std"


def test_describe_says_every_choice():
    assert build("pi05-tiny", DROID, default_prompt="wave", resize="lerobot").describe() == {
        "robot": "droid",
        "model_kind": "pi05",
        "state_normalization": "quantile",
        "action_normalization": "quantile",
        "convention": "openpi",
        "prompt_format": "openpi pi05, state in prompt",
        "prompt_convention": "openpi",
        "state_in_prompt": True,
        "prompt_keys": ["prompt"],
        "default_prompt": "wave",
        "max_tokens": 64,
        "tokenizer_vocab": 2000,
        "camera_slots": [
            {"slot": "base_0_rgb", "key": "observation/exterior_image_1_left", "required": True},
            {"slot": "left_wrist_0_rgb", "key": "observation/wrist_image_left", "required": True},
            {"slot": None, "key": None, "required": False},
        ],
        "missing_cameras": "in their slot",
        "image_size": 56,
        "resize": "torch bilinear",
        "state": {"observation/joint_position": 7, "observation/gripper_position": 1},
        "action_dim": 8,
        "absolute_mask": None,
    }
    assert build("pi0-tiny", ALOHA).describe()["absolute_mask"] == [True] * 6 + [False] + [True] * 6 + [False]
