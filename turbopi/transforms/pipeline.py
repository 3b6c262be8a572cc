"""The whole way in and out of the model: an observation to arrays, and actions to the robot (SPEC 2.1).

In: prompt, robot state and images → normalise the state → resize images → tokens → pad the state.
Out: un-normalise → add the state (where actions are relative) → cut to the robot's dims → the robot's joint space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..errors import InputError
from .actions import absolute_actions, relative_actions
from .images import ResizeName, fit_image, to_model
from .normalize import CONVENTIONS, Convention, DatasetStats, Normalizer, NormMode
from .prompt import PromptFormat, PromptTokenizer
from .robot import Robot
from .tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class ModelArrays:
    """One observation as the model takes it.

    Attributes:
        images: (cameras, 3, S, S) float32 in [-1, 1]; a missing camera is -1. Or uint8, and 0.
        image_mask: (cameras,) bool.
        tokens: (T,) int64.
        token_mask: (T,) bool.
        state: (state_dim,) float32, normalised, padded with 0.
    """

    images: np.ndarray
    image_mask: np.ndarray
    tokens: np.ndarray
    token_mask: np.ndarray
    state: np.ndarray


@dataclass(frozen=True, eq=False)
class RequestContext:
    """What the way back needs to know of the request.

    Attributes:
        state: un-normalised, in the model's joint space: what relative actions are relative to. openpi keeps only the
            normalised, padded state and un-normalises it again, (state_dim of the model,) float64; lerobot keeps
            the state that was sent, (robot's state_dim,). They differ in the last digit.
        prompt: the task that was used.
    """

    state: np.ndarray
    prompt: str


@dataclass(frozen=True, eq=False)
class PolicyTransforms:
    """The transforms of one policy. Stateless: safe to share between clients. Made by `build_transforms`.

    With `uint8_images` frames stay uint8, for an engine that scales them itself.
    """

    config: ModelConfig
    robot: Robot
    state: Normalizer
    actions: Normalizer
    prompt: PromptTokenizer
    resize: ResizeName
    absolute_mask: tuple[bool, ...] | None
    default_prompt: str | None
    uint8_images: bool = False

    def __post_init__(self) -> None:
        if self.uint8_images and not self.keeps_uint8:
            raise ValueError(f"resize {self.resize!r} makes floats of frames, so images cannot be left as uint8")

    @property
    def keeps_uint8(self) -> bool:
        """Whether frames are still uint8 when they have the model's size; lerobot resizes floats."""
        return self.resize == "openpi"

    def inputs(self, observation: Mapping[str, Any]) -> tuple[ModelArrays, RequestContext]:
        """An observation, in the robot's keys, to the model's arrays.

        Raises:
            InputError: names the key that is missing or wrong, what was expected, and what to do.
        """
        if not isinstance(observation, Mapping):
            raise InputError(f"the observation is a {type(observation).__name__}, expected a map of keys to values")
        task = self.robot.read_prompt(observation, self.default_prompt)
        raw = self.robot.read_state(observation)
        with np.errstate(over="ignore"):
            normalized = self.state.normalize(raw)
            state = np.zeros(self.config.state_dim, normalized.dtype)
            state[: normalized.size] = normalized
            model_state = state.astype(np.float32)
        if not np.isfinite(model_state).all():
            raise InputError(f"the state {raw.tolist()} is too large to normalise; check its units")
        images, image_mask = self._images(observation)
        tokens, token_mask = self.prompt(task, normalized)
        reference = self.state.unnormalize(state) if self.state.convention == "openpi" else raw
        arrays = ModelArrays(images, image_mask, tokens, token_mask, model_state)
        return arrays, RequestContext(state=reference, prompt=task)

    def _images(self, observation: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        size = self.config.vision.image_size
        frames = self.robot.read_images(observation)
        shape = (self.config.cameras, 3, size, size)
        images = np.zeros(shape, np.uint8) if self.uint8_images else np.full(shape, -1.0, np.float32)
        mask = np.zeros(self.config.cameras, bool)
        present = [c for c in self.robot.cameras if c.key in frames]
        for slot, camera in enumerate(present if self.robot.missing_last else self.robot.cameras):
            if camera.key in frames:
                name = self.robot.image_name(camera)
                frame = fit_image(frames[camera.key], name, size, resize=self.resize, layout=self.robot.image_layout)
                images[slot] = frame.transpose(2, 0, 1) if self.uint8_images else to_model(frame)
                mask[slot] = True
        return images, mask

    def outputs(self, actions: np.ndarray, context: RequestContext) -> dict[str, np.ndarray]:
        """The model's actions to the robot's.

        Args:
            actions: (H, action_dim) as the model gives them, normalised.
            context: of the request that they answer.

        Returns:
            {"actions": (H, robot.action_dim)}, float64 in openpi's convention, otherwise the model's dtype.

        Raises:
            ValueError: the array is not of that shape, or has NaN or infinite values, which no robot should be sent.
        """
        actions = np.asarray(actions)
        if actions.ndim != 2 or actions.shape[1] != self.config.action_dim:
            raise ValueError(f"model actions have shape {actions.shape}, expected (horizon, {self.config.action_dim})")
        if not np.isfinite(actions).all():
            raise ValueError("the model's actions have NaN or infinite values; check its weights and precision")
        real = self.actions.unnormalize(actions)
        if self.absolute_mask is not None:
            real = absolute_actions(real, context.state.astype(real.dtype), self.absolute_mask)
        return {"actions": self.robot.space.actions_to_robot(real[:, : self.robot.action_dim])}

    def reanchored(self, actions: np.ndarray, then: RequestContext, now: RequestContext) -> np.ndarray:
        """Normalised actions that answered one request, as another request would state the same motion.

        (H, action_dim) float32 -> the same. Only relative actions change, which are made absolute with the state of
        `then` and relative to that of `now`.
        """
        if self.absolute_mask is None:
            return actions
        real = self.actions.unnormalize(actions)
        moved = absolute_actions(real, then.state.astype(real.dtype), self.absolute_mask)
        back = relative_actions(moved, now.state.astype(real.dtype), self.absolute_mask)
        return self.actions.normalize(back).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        """Every choice made, as plain JSON values, for receipts and the doctor."""
        slots = [
            {"slot": camera.slot, "key": self.robot.image_name(camera), "required": camera.required}
            for camera in self.robot.cameras
        ]
        empty = self.config.cameras - len(slots)
        return {
            "robot": self.robot.name,
            "model_kind": self.config.kind,
            "state_normalization": self.state.mode,
            "action_normalization": self.actions.mode,
            "convention": self.state.convention,
            "prompt_format": self.prompt.text.name,
            "prompt_convention": self.prompt.text.convention,
            "state_in_prompt": self.prompt.text.state_in_prompt,
            "prompt_keys": list(self.robot.prompt_keys),
            "default_prompt": self.default_prompt,
            "max_tokens": self.config.max_tokens,
            "tokenizer_vocab": self.prompt.tokenizer.vocab_size,
            "camera_slots": slots + [{"slot": None, "key": None, "required": False}] * empty,
            "missing_cameras": "after the present ones" if self.robot.missing_last else "in their slot",
            "image_size": self.config.vision.image_size,
            "resize": {"openpi": "PIL bilinear, antialiased", "lerobot": "torch bilinear"}[self.resize],
            "state": {part.key: part.size for part in self.robot.state},
            "action_dim": self.robot.action_dim,
            "absolute_mask": None if self.absolute_mask is None else list(self.absolute_mask),
        }


def build_transforms(
    config: ModelConfig,
    robot: Robot,
    stats: DatasetStats,
    tokenizer: Tokenizer,
    *,
    convention: Convention = "openpi",
    mode: NormMode | None = None,
    action_mode: NormMode | None = None,
    prompt_convention: Convention | None = None,
    resize: ResizeName | None = None,
    state_in_prompt: bool | None = None,
    absolute: bool | None = None,
    default_prompt: str | None = None,
) -> PolicyTransforms:
    """Compose a policy's transforms and check that its parts belong together.

    Args:
        config: of the model.
        robot: the robot's description.
        stats: of the data that the model was trained on.
        tokenizer: of the model.
        convention: whose normalisation, and, unless said otherwise, whose prompt and resize.
        mode: of the normalisation. None: "mean_std" for π0, "quantile" for π0.5, as both ports do.
        action_mode: of the actions, where it differs. None: `mode`.
        prompt_convention: whose prompt. None: `convention`.
        resize: whose resize. None: `convention`.
        state_in_prompt: None: as the config says, else as the port and the robot do.
        absolute: whether actions are relative to the state and made absolute. None: as the robot's published models.
        default_prompt: task for observations that have none.

    Raises:
        ValueError: parts that do not fit; names them.
    """
    for name, value in (("convention", convention), ("prompt_convention", prompt_convention), ("resize", resize)):
        if value not in (None, *CONVENTIONS):
            raise ValueError(f"{name} must be one of {', '.join(CONVENTIONS)}, got {value!r}")
    prompt_convention = prompt_convention or convention
    defaults = robot.default(config.kind)
    mask = defaults.absolute_mask if absolute in (None, True) else None
    if absolute and mask is None:
        raise ValueError(
            f"absolute actions were asked for, but robot {robot.name!r} has no absolute_mask for {config.kind}; "
            "give its KindDefaults one"
        )
    _check_sizes(config, robot, stats, mask)
    mode = mode or ("quantile" if config.kind == "pi05" else "mean_std")
    text = PromptFormat(
        config.kind, prompt_convention, _state_in_prompt(config, robot, prompt_convention, state_in_prompt)
    )
    return PolicyTransforms(
        config=config,
        robot=robot,
        state=Normalizer(stats.state, mode, convention, "state"),
        actions=Normalizer(stats.actions, action_mode or mode, convention, "actions"),
        prompt=PromptTokenizer(tokenizer, text, config.max_tokens, config.vocab_size),
        resize=resize or convention,
        absolute_mask=mask,
        default_prompt=default_prompt,
    )


def _state_in_prompt(config: ModelConfig, robot: Robot, convention: Convention, wanted: bool | None) -> bool:
    if wanted is not None:
        return wanted
    if config.state_in_prompt is not None:
        return config.state_in_prompt
    if convention == "lerobot":
        return config.kind == "pi05"
    return robot.default(config.kind).state_in_prompt


def _check_sizes(config: ModelConfig, robot: Robot, stats: DatasetStats, mask: tuple[bool, ...] | None) -> None:
    if len(robot.cameras) > config.cameras:
        raise ValueError(f"robot {robot.name!r} has {len(robot.cameras)} cameras, the model {config.cameras} slots")
    for what, dim, slots in (
        ("state", robot.state_dim, config.state_dim),
        ("action", robot.action_dim, config.action_dim),
    ):
        if dim > slots:
            raise ValueError(f"robot {robot.name!r} has a {what} of {dim} numbers, the model takes at most {slots}")
    for vector, values, dim in (("state", stats.state, robot.state_dim), ("actions", stats.actions, robot.action_dim)):
        if values.dims < dim:
            raise ValueError(
                f"norm stats of the {vector} have {values.dims} numbers, robot {robot.name!r} needs {dim}; "
                "they belong to another robot or were computed on part of the data"
            )
    if mask is not None and any(mask[robot.state_dim :]):
        raise ValueError(
            f"absolute_mask of robot {robot.name!r} reaches beyond its state of {robot.state_dim} numbers; "
            "only dimensions that the state has can be relative to it"
        )
