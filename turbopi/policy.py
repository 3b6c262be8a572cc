"""A policy: transforms around an engine. Observation dict in, robot actions out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoint import open_checkpoint
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.load import load_opened
from .config import InvalidTokens, NumericsName, RuntimeConfig
from .engine import Engine, Precision, TickEngine, create_engine, precision_dtype, sample_actions
from .errors import InputError
from .model import ModelInput
from .model.inputs import check_noise
from .transforms import (
    ModelArrays,
    PolicyTransforms,
    Robot,
    build_transforms,
    find_tokenizer,
    get_robot,
    load_tokenizer,
    robot_from_lerobot,
)


class Policy:
    """One control loop's view of a model: its transforms, its noise stream, and an engine that it may share.

    Not for use from two threads at once; give every client a `fork`.
    """

    def __init__(self, transforms: PolicyTransforms, engine: Engine, runtime: RuntimeConfig) -> None:
        self.transforms = transforms
        self.engine = engine
        self.runtime = runtime
        self._noise = torch.Generator()
        self.reset()

    @property
    def metadata(self) -> dict[str, Any]:
        """What a server tells a client when it connects (SPEC 4.1); for ALOHA the reset pose."""
        return dict(self.transforms.robot.metadata)

    def reset(self) -> None:
        """Forget the episode: the noise starts again from the seed."""
        self._noise.manual_seed(self.runtime.seed)

    def fork(self) -> Policy:
        """A policy of its own over the same engine and transforms, as after `reset`."""
        return Policy(self.transforms, self.engine, self.runtime)

    def infer(self, observation: Mapping[str, Any], noise: np.ndarray | None = None) -> dict[str, Any]:
        """One control tick.

        Args:
            observation: in the robot's keys (SPEC 2.3).
            noise: (H,32) to start from; None draws the next of the policy's seeded stream.

        Returns:
            "actions": (H, robot's dims); "policy_timing": milliseconds of the whole ("infer_ms"), of the transforms
            ("transforms_ms"), of the model ("model_ms"), and, where the engine runs its stages one by one, of each of
            them ("encode_images_ms", "prefill_ms", "denoise_ms").

        Raises:
            InputError: the observation or the noise cannot be used; the noise stream does not advance.
            NonFiniteActionsError, ValueError: the model computed NaN or infinite actions.
        """
        start = time.perf_counter()
        arrays, context = self.transforms.inputs(observation)
        inputs = _batch_of_one(arrays)
        inputs.check(self.engine.config, uint8_images=self.transforms.uint8_images)
        first_noise = self._next_noise() if noise is None else self._given_noise(noise)
        stage_ms: dict[str, float] = {}
        begin = time.perf_counter()
        actions = sample_actions(self.engine, inputs, first_noise, self.runtime.steps, stage_ms)
        model_ms = sum(stage_ms.values()) or 1e3 * (time.perf_counter() - begin)
        result = self.transforms.outputs(actions[0].numpy(), context)
        infer_ms = 1e3 * (time.perf_counter() - start)
        timing = {"infer_ms": infer_ms, "transforms_ms": infer_ms - model_ms, "model_ms": model_ms}
        stages = {f"{stage}_ms": value for stage, value in stage_ms.items()}
        return {**result, "policy_timing": {**timing, **stages}}

    def warm_up(self) -> None:
        """Let the engine prepare for every observation that this robot can send; without it, the first ticks do."""
        if not isinstance(self.engine, TickEngine):
            return
        cameras = self.transforms.robot.cameras
        required = sum(camera.required for camera in cameras)
        images = torch.uint8 if self.transforms.uint8_images else torch.float32
        for count in range(required, len(cameras) + 1):
            self.engine.warm_up(count, self.runtime.steps, images=images)

    def describe(self) -> dict[str, Any]:
        """Every choice that makes these actions what they are, as JSON values, for receipts."""
        return {
            "engine": self.engine.name,
            "engine_details": self.engine.describe() if isinstance(self.engine, TickEngine) else {},
            "precision": self.engine.precision,
            "device": str(self.engine.device),
            "runtime": {f.name: getattr(self.runtime, f.name) for f in fields(self.runtime)},
            "model": self.engine.config.to_dict(),
            "transforms": self.transforms.describe(),
        }

    @property
    def _noise_shape(self) -> tuple[int, int]:
        return self.engine.config.horizon, self.engine.config.action_dim

    def _next_noise(self) -> torch.Tensor:
        # Drawn on the CPU, so that every device starts from the same noise.
        return torch.randn((1, *self._noise_shape), generator=self._noise)

    def _given_noise(self, noise: np.ndarray) -> torch.Tensor:
        noise = np.asarray(noise)
        if noise.dtype.kind != "f" or noise.shape != self._noise_shape:
            raise InputError(f"noise is {noise.shape} {noise.dtype}, expected {self._noise_shape} float32")
        tensor = torch.from_numpy(noise.astype(np.float32))[None]
        check_noise(tensor, 1, self.engine.config)
        return tensor


def _batch_of_one(arrays: ModelArrays) -> ModelInput:
    return ModelInput(
        **{f.name: torch.from_numpy(np.asarray(getattr(arrays, f.name)))[None] for f in fields(ModelInput)}
    )


def choose_device(device: str) -> str:
    """Resolve a name: "auto" is the GPU where there is one, else the CPU; any other name stands for itself."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _choose_robot(checkpoint: Checkpoint, robot: str | Robot | None) -> Robot:
    if isinstance(robot, Robot):
        return robot
    if robot is None:
        robot = checkpoint.robot or ("lerobot" if checkpoint.format == "lerobot" else None)
    if robot is None:
        found = ", ".join(checkpoint.asset_ids) or "no norm stats"
        raise ValueError(
            f"{checkpoint.path} does not say which robot it is for ({found}); give robot=, such as 'libero'"
        )
    if robot != "lerobot":
        return get_robot(robot)
    features = checkpoint.declared if checkpoint.format == "lerobot" else checkpoint.lerobot_config
    if features is None:
        raise ValueError(f"robot 'lerobot' describes lerobot checkpoints; {checkpoint.path} is {checkpoint.format}")
    return robot_from_lerobot(features)


def _transforms(
    checkpoint: Checkpoint,
    robot: str | Robot | None,
    asset_id: str | None,
    tokenizer: str | Path | None,
    state_in_prompt: bool | None,
    default_prompt: str | None,
) -> PolicyTransforms:
    """What stands on both sides of a checkpoint's model; arguments as those of `load_policy`."""
    described = _choose_robot(checkpoint, robot)
    stats = checkpoint.norm_stats(asset_id or (described.name if len(checkpoint.asset_ids) > 1 else None))
    modes = checkpoint.norm_modes
    # lerobot states whether actions are relative to the state; openpi's models follow the robot's custom.
    relative = (
        None if checkpoint.lerobot_config is None else bool(checkpoint.lerobot_config.get("use_relative_actions"))
    )
    return build_transforms(
        checkpoint.config,
        described,
        stats,
        load_tokenizer(find_tokenizer(None if tokenizer is None else Path(tokenizer), checkpoint.path)),
        convention=checkpoint.convention,
        mode=modes["state"],
        action_mode=modes["actions"],
        state_in_prompt=state_in_prompt,
        absolute=relative,
        default_prompt=default_prompt,
    )


def load_policy(
    path: str | Path,
    robot: str | Robot | None = None,
    engine: str = "eager",
    steps: int = 10,
    precision: Precision | None = None,
    seed: int = 0,
    *,
    device: str = "auto",
    numerics: NumericsName | None = None,
    invalid_tokens: InvalidTokens | None = None,
    asset_id: str | None = None,
    tokenizer: str | Path | None = None,
    state_in_prompt: bool | None = None,
    default_prompt: str | None = None,
) -> Policy:
    """A policy from a checkpoint directory of any format.

    Args:
        path: openpi, lerobot or JAX checkpoint directory.
        robot: "libero", "droid", "aloha", "lerobot" (a lerobot checkpoint's own features), or a `Robot`. None: what the
            checkpoint says.
        engine: "eager", "graphed", "compiled", "compiled-max", or "turbo"; the last prepares itself here for the
            robot's observations.
        steps: flow-matching evaluations per chunk.
        precision: "fp32" or "bf16". None: bf16 on a GPU, fp32 on a CPU.
        seed: of the noise stream.
        device: "auto", "cpu", "cuda", "cuda:1", …
        numerics: profile to use instead of the checkpoint's; see `ModelConfig`.
        invalid_tokens: treatment to use instead of the checkpoint's; see `ModelConfig`.
        asset_id: which of several norm stats to use. None: the only one, or the robot's.
        tokenizer: a `.model` or `.json` file. None: the checkpoint's, else the one in openpi's cache.
        state_in_prompt: whether the prompt spells the state. None: as the checkpoint says, else as is customary.
        default_prompt: task for observations without one.

    Raises:
        FileNotFoundError: no checkpoint or no tokenizer; says where it looked.
        CheckpointError: a checkpoint that is corrupt or contradicts itself.
        ValueError: an unknown name, or parts that do not fit each other.
    """
    runtime = RuntimeConfig(steps=steps, seed=seed)
    target = choose_device(device)
    chosen: Precision = precision or ("fp32" if target == "cpu" else "bf16")
    dtype = precision_dtype(chosen)
    checkpoint = open_checkpoint(path)
    transforms = _transforms(checkpoint, robot, asset_id, tokenizer, state_in_prompt, default_prompt)
    model = load_opened(
        checkpoint, target, dtype, config=checkpoint.config, numerics=numerics, invalid_tokens=invalid_tokens
    )
    runner = create_engine(engine, model, chosen)
    uint8_images = isinstance(runner, TickEngine) and runner.accepts_uint8 and transforms.keeps_uint8
    policy = Policy(replace(transforms, config=model.config, uint8_images=uint8_images), runner, runtime)
    policy.warm_up()
    return policy
