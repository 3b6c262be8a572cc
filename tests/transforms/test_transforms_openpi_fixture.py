"""Every array of openpi's recorded pre- and post-processing, reproduced bit for bit (traps 34 to 41)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transforms_support import LetterTokenizer, letter_config

from turbopi.transforms import (
    LIBERO,
    DatasetStats,
    Normalizer,
    PolicyTransforms,
    absolute_actions,
    action_mask,
    build_transforms,
    resize_with_pad,
    state_bins,
)
from turbopi.transforms.aloha import actions_to_robot, state_to_model

MODES = {"pi0": "mean_std", "pi05": "quantile"}
PROMPT = "  pick_up the\nBlack bowl "


def transforms_for(kind: str, discrete: bool, stats: DatasetStats, tokenizer: LetterTokenizer) -> PolicyTransforms:
    return build_transforms(letter_config(kind), LIBERO, stats, tokenizer, state_in_prompt=discrete)


@pytest.fixture
def observation(recorded: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "observation/image": recorded["raw.image"],
        "observation/wrist_image": recorded["raw.wrist"],
        "observation/state": recorded["raw.state"],
        "prompt": PROMPT,
    }


@pytest.mark.parametrize(("kind", "discrete"), [("pi0", False), ("pi05", False), ("pi05", True)])
def test_inputs_are_openpis(recorded, recorded_prompts, recorded_stats, observation, letters, kind, discrete):
    arrays, _ = transforms_for(kind, discrete, recorded_stats, letters).inputs(observation)
    for index, slot in enumerate(("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")):
        pixels = recorded[f"{kind}.{slot}"].astype(np.float32) / 255.0 * 2.0 - 1.0
        np.testing.assert_array_equal(arrays.images[index], pixels.transpose(2, 0, 1))
        assert arrays.image_mask[index] == recorded[f"{kind}.mask.{slot}"]
    assert arrays.images.dtype == np.float32
    np.testing.assert_array_equal(arrays.tokens, recorded[f"{kind}.{discrete}.tokens"])
    np.testing.assert_array_equal(arrays.token_mask, recorded[f"{kind}.{discrete}.token_mask"])
    assert arrays.tokens.dtype == np.int64
    np.testing.assert_array_equal(arrays.state, recorded[f"{kind}.state_padded"].astype(np.float32))
    assert letters.texts == [text for text, _ in recorded_prompts[f"{kind}.discrete={discrete}"]]


@pytest.mark.parametrize("kind", MODES)
def test_frames_are_resized_as_openpi_does(recorded, kind):
    np.testing.assert_array_equal(resize_with_pad(recorded["raw.image"], 224), recorded[f"{kind}.base_0_rgb"])
    np.testing.assert_array_equal(resize_with_pad(recorded["raw.wrist"], 224), recorded[f"{kind}.left_wrist_0_rgb"])
    assert not recorded[f"{kind}.right_wrist_0_rgb"].any()


@pytest.mark.parametrize("kind", MODES)
def test_the_state_is_normalised_in_float64(recorded, recorded_stats, kind):
    normalizer = Normalizer(recorded_stats.state, MODES[kind], "openpi", "state")
    normalized = normalizer.normalize(recorded["raw.state"])
    assert normalized.dtype == np.float64
    np.testing.assert_array_equal(normalized, recorded[f"{kind}.state_normalized"])
    padded = np.pad(normalized, (0, 24))
    np.testing.assert_array_equal(padded, recorded[f"{kind}.state_padded"])
    np.testing.assert_array_equal(normalizer.unnormalize(padded), recorded[f"{kind}.unnorm_state"])


@pytest.mark.parametrize("kind", MODES)
def test_outputs_are_openpis(recorded, recorded_stats, observation, letters, kind):
    normalizer = Normalizer(recorded_stats.actions, MODES[kind], "openpi", "actions")
    real = normalizer.unnormalize(recorded[f"{kind}.model_actions"])
    np.testing.assert_array_equal(real, recorded[f"{kind}.unnorm_actions"])
    mask = action_mask(6, -1)
    absolute = absolute_actions(real, recorded[f"{kind}.unnorm_state"], mask)
    np.testing.assert_array_equal(absolute, recorded[f"{kind}.absolute_actions"])

    relative = KIND_ROBOTS[kind]
    for absolute_wanted, expected in ((False, "libero_actions"), (True, "absolute_actions")):
        transforms = build_transforms(
            letter_config(kind), relative, recorded_stats, letters, absolute=absolute_wanted, state_in_prompt=False
        )
        _, context = transforms.inputs(observation)
        actions = transforms.outputs(recorded[f"{kind}.model_actions"], context)["actions"]
        np.testing.assert_array_equal(actions, recorded[f"{kind}.{expected}"][:, :7])
        np.testing.assert_array_equal(context.state, recorded[f"{kind}.unnorm_state"])


KIND_ROBOTS = {
    "pi0": LIBERO,
    "pi05": replace(
        LIBERO, defaults={"pi05": replace(LIBERO.defaults["pi05"], absolute_mask=LIBERO.defaults["pi0"].absolute_mask)}
    ),
}


def test_bins_are_openpis(recorded):
    np.testing.assert_array_equal(state_bins(recorded["bins.in"]), recorded["bins.out"])


def test_aloha_space_is_openpis(recorded):
    # Not bit for bit: numpy releases differ in the last digit of arcsin.
    exact = {"rtol": 1e-14, "atol": 0}
    np.testing.assert_allclose(state_to_model(recorded["aloha.state_in"]), recorded["aloha.state_out"], **exact)
    np.testing.assert_allclose(actions_to_robot(recorded["aloha.actions_in"]), recorded["aloha.actions_out"], **exact)


def test_every_recorded_array_is_used(recorded):
    """A new array in the fixture must get a test above."""
    known = {"bins.in", "bins.out", "aloha.state_in", "aloha.state_out", "aloha.actions_in", "aloha.actions_out"}
    known |= {"raw.image", "raw.wrist", "raw.state", "pi0.False.tokens", "pi0.False.token_mask"}
    known |= {f"pi05.{d}.{n}" for d in (True, False) for n in ("tokens", "token_mask")}
    known |= {f"stats.{v}.{n}" for v in ("state", "actions") for n in ("mean", "std", "q01", "q99")}
    for kind in MODES:
        for slot in ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"):
            known |= {f"{kind}.{slot}", f"{kind}.mask.{slot}"}
        known |= {f"{kind}.{n}" for n in ("state_normalized", "state_padded", "model_actions", "unnorm_actions")}
        known |= {f"{kind}.{n}" for n in ("unnorm_state", "libero_actions", "absolute_actions")}
    assert set(recorded) == known
