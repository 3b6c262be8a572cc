"""Between a robot and the model: images, prompts, normalisation, and one small file per robot (SPEC 2)."""

from .actions import absolute_actions, action_mask, relative_actions
from .aloha import ALOHA
from .droid import DROID
from .images import image_to_model, parse_image, resize_with_pad, resize_with_pad_float, to_model
from .lerobot_features import robot_from_lerobot
from .libero import LIBERO
from .normalize import Convention, DatasetStats, Normalizer, NormMode, NormStats, stats_from_lerobot
from .pipeline import ModelArrays, PolicyTransforms, RequestContext, build_transforms
from .prompt import PromptFormat, PromptTokenizer, clean_task, state_bins
from .robot import Camera, KindDefaults, Robot, RobotSpace, StatePart
from .stats_file import load_norm_stats, save_norm_stats
from .tokenizer import (
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
    openpi_data_home,
    shipped_tokenizer,
)

ROBOTS: dict[str, Robot] = {robot.name: robot for robot in (LIBERO, DROID, ALOHA)}


def get_robot(name: str) -> Robot:
    """The robot of that name; raises ValueError that lists the known ones."""
    if name not in ROBOTS:
        raise ValueError(f"unknown robot {name!r}; known: {', '.join(ROBOTS)}")
    return ROBOTS[name]


__all__ = [
    "ALOHA",
    "DROID",
    "LIBERO",
    "ROBOTS",
    "Camera",
    "Convention",
    "DatasetStats",
    "JsonTokenizer",
    "KindDefaults",
    "ModelArrays",
    "NormMode",
    "NormStats",
    "Normalizer",
    "PolicyTransforms",
    "PromptFormat",
    "PromptTokenizer",
    "RequestContext",
    "Robot",
    "RobotSpace",
    "SentencePieceTokenizer",
    "StatePart",
    "Tokenizer",
    "absolute_actions",
    "action_mask",
    "build_transforms",
    "clean_task",
    "find_tokenizer",
    "get_robot",
    "image_to_model",
    "load_norm_stats",
    "load_tokenizer",
    "openpi_data_home",
    "parse_image",
    "relative_actions",
    "resize_with_pad",
    "resize_with_pad_float",
    "robot_from_lerobot",
    "save_norm_stats",
    "shipped_tokenizer",
    "state_bins",
    "stats_from_lerobot",
    "to_model",
]
