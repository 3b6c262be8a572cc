"""Stand-ins and sample data that the transform tests share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from turbopi.config import ModelConfig, preset
from turbopi.transforms import DatasetStats, NormStats

DATA = Path(__file__).parents[1] / "data"


class LetterTokenizer:
    """The tokenizer that the openpi fixture was made with: one token per character, 1000 + its code point."""

    vocab_size = 2000

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return [1000 + ord(letter) for letter in text]


def letter_config(name: str, **changes: Any) -> ModelConfig:
    """A preset with room for the letter tokenizer, that leaves the prompt's form to the robot."""
    return replace(preset(name), **{"vocab_size": 2000, "state_in_prompt": None, **changes})


def make_stats(state: int, actions: int, seed: int = 0) -> DatasetStats:
    rng = np.random.default_rng(seed)

    def one(dims: int) -> NormStats:
        low = rng.normal(size=dims)
        return NormStats(rng.normal(size=dims), rng.uniform(0.1, 2, dims), low, low + rng.uniform(0.2, 3, dims))

    return DatasetStats(state=one(state), actions=one(actions))


def make_frame(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def make_observation(robot: str) -> dict[str, Any]:
    """A good observation."""
    rng = np.random.default_rng(5)
    if robot == "libero":
        return {
            "observation/image": make_frame(1),
            "observation/wrist_image": make_frame(2),
            "observation/state": rng.normal(size=8),
            "prompt": "pick up the black bowl",
        }
    if robot == "droid":
        return {
            "observation/exterior_image_1_left": make_frame(1),
            "observation/wrist_image_left": make_frame(2),
            "observation/joint_position": rng.normal(size=7),
            "observation/gripper_position": rng.normal(size=1),
            "prompt": "put the marker in the cup",
        }
    if robot == "aloha":
        cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
        return {
            "images": {name: make_frame(i).transpose(2, 0, 1) for i, name in enumerate(cameras)},
            "state": rng.uniform(0.1, 0.9, 14),
            "prompt": "uncap the pen",
        }
    return {
        "observation.images.image": make_frame(1),
        "observation.images.image2": make_frame(2),
        "observation.state": rng.normal(size=8).astype(np.float32),
        "task": "pick up the black bowl",
    }
