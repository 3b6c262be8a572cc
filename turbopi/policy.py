"""A policy: transforms around an engine. Observation dict in, robot actions out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoint import open_checkpoint
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.load import load_opened
from .config import InvalidTokens, ModelConfig, NumericsName
from .engine import (
    FLOATS,
    DescribedEngine,
    Engine,
    Precision,
    TickEngine,
    create_engine,
    precision_dtype,
)
from .engine.integrate import Steering
from .errors import InputError
from .model import ModelInput
from .model.inputs import check_noise
from .quant import CALIBRATION_FILE, Calibration, PrecisionPlan, Quantisation
from .runtime import Runtime, RuntimeConfig, Stamp
from .runtime.controller import Controller
from .runtime.events import EventLog
from .runtime.inference import Inference
from .runtime.steering import Follow, steering_of
from .transforms import (
    ModelArrays,
    PolicyTransforms,
    RequestContext,
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

    Args:
        transforms: on both sides of the model.
        engine: that runs its stages.
        runtime: what a tick computes.
        clock: monotonic seconds, against which the times of observations are held.

    Raises ValueError for a runtime that the engine, the model or the robot cannot honour.
    """

    def __init__(
        self,
        transforms: PolicyTransforms,
        engine: Engine,
        runtime: RuntimeConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.transforms = transforms
        self.engine = engine
        self.runtime = runtime
        self._clock = clock
        self._ticks = Runtime(engine, runtime, transforms.robot.state_dim, transforms.robot.action_dim)
        self._plain = runtime == RuntimeConfig(steps=runtime.steps, seed=runtime.seed)
        spelled = transforms.prompt.text.state_in_prompt
        reused = None if runtime.reuse is None else runtime.reuse.mode
        if reused == "state_only" and engine.config.kind == "pi05" and not spelled:
            raise ValueError("reuse mode 'state_only' needs a state in the model's input; this prompt spells none")
        self._finds_text = spelled and (runtime.reuse is not None or runtime.deadline is not None)
        self._noise = torch.Generator()
        self.reset()

    @property
    def metadata(self) -> dict[str, Any]:
        """What a server tells a client when it connects (SPEC 4.1); for ALOHA the reset pose."""
        return dict(self.transforms.robot.metadata)

    def reset(self) -> None:
        """Forget the episode: the noise starts again from the seed, and nothing computed so far is used again."""
        self._noise.manual_seed(self.runtime.seed)
        self._ticks.reset()
        self._previous: tuple[np.ndarray, RequestContext] | None = None

    def fork(self) -> Policy:
        """A policy of its own over the same engine and transforms, as after `reset`."""
        return Policy(self.transforms, self.engine, self.runtime, self._clock)

    @property
    def events(self) -> EventLog:
        """What the runtime had to say since the reset."""
        return self._ticks.events

    @property
    def remembers(self) -> bool:
        """Whether a tick may depend on more of the episode than the noise, so that a new one needs a `reset`."""
        runtime = self.runtime
        return any(part is not None for part in (runtime.reuse, runtime.rtc, runtime.deadline, runtime.stream))

    @property
    def holding(self) -> bool:
        """Whether the deadline says to hold the chunk while it lasts."""
        return self._ticks.deadline is not None and self._ticks.deadline.economy.hold

    def report(self) -> dict[str, Any]:
        """What the runtime did since the reset, as JSON values: reuse, ages, events."""
        return self._ticks.report()

    def controller(self, inference: Inference | None = None) -> Controller:
        """The control loop over this policy, action by action; see `Controller`."""
        return Controller(self, inference)

    def infer(
        self,
        observation: Mapping[str, Any],
        noise: np.ndarray | None = None,
        *,
        follow: Follow | None = None,
        stamp: Stamp | None = None,
    ) -> dict[str, Any]:
        """One control tick.

        Args:
            observation: in the robot's keys (SPEC 2.3).
            noise: (H,32) to start from; None draws the next of the policy's seeded stream.
            follow: of real-time chunking, how far the last chunk has been and will be executed; None: as configured.
            stamp: where the observation stands in its stream, for a runtime that watches it.

        Returns:
            "actions": (H, robot's dims); "policy_timing": milliseconds of the whole ("infer_ms"), of the transforms
            ("transforms_ms"), of the model ("model_ms"), and, where stages run one by one, of each that ran
            ("encode_images_ms", "prefill_ms", "denoise_ms"); and, where the runtime is more than steps and a seed,
            "runtime": what was computed and why.

        Raises:
            InputError: the observation or the noise cannot be used; the noise stream does not advance.
            NonFiniteActionsError, ValueError: the model computed NaN or infinite actions.
        """
        start = time.perf_counter()
        arrays, context = self.transforms.inputs(observation)
        inputs = _batch_of_one(arrays)
        inputs.check(self.engine.config, uint8_images=self.transforms.uint8_images)
        self._look(arrays, stamp)
        first_noise = self._next_noise() if noise is None else self._given_noise(noise)
        steering = self._steering(follow, context)
        prompt, dims = self.transforms.prompt, self.transforms.robot.state_dim
        text = prompt.text_tokens(context.prompt, dims) if self._finds_text else None
        stage_ms: dict[str, float] = {}
        begin = time.perf_counter()
        actions, tick = self._ticks.sample(inputs, first_noise, text, steering, stage_ms)
        model_ms = sum(stage_ms.values()) or 1e3 * (time.perf_counter() - begin)
        chunk = actions[0].numpy()
        result = self.transforms.outputs(chunk, context)
        self._previous = (chunk, context)
        infer_ms = 1e3 * (time.perf_counter() - start)
        self._ticks.finished(infer_ms)
        timing = {"infer_ms": infer_ms, "transforms_ms": infer_ms - model_ms, "model_ms": model_ms}
        stages = {f"{stage}_ms": value for stage, value in stage_ms.items()}
        told = {} if self._plain else {"runtime": tick.to_dict()}
        return {**result, "policy_timing": {**timing, **stages}, **told}

    def warm_up(self) -> None:
        """Let the engine prepare for every observation that this robot can send; without it, the first ticks do."""
        cameras = self.transforms.robot.cameras
        required = sum(camera.required for camera in cameras)
        images = torch.uint8 if self.transforms.uint8_images else torch.float32
        for count in range(required, len(cameras) + 1):
            self._ticks.warm_up(count, images)

    def describe(self) -> dict[str, Any]:
        """Every choice that makes these actions what they are, as JSON values, for receipts."""
        return {
            "engine": self.engine.name,
            "engine_details": self.engine.describe() if isinstance(self.engine, DescribedEngine) else {},
            "precision": self.engine.precision,
            "device": str(self.engine.device),
            "runtime": self.runtime.to_dict(),
            "model": self.engine.config.to_dict(),
            "transforms": self.transforms.describe(),
        }

    def _look(self, arrays: ModelArrays, stamp: Stamp | None) -> None:
        """Let the runtime watch the stream, where it does."""
        watch = self._ticks.watch
        if watch is None:
            return
        watch.check(self._ticks.tick, stamp, self._clock())
        shown = {f"camera {slot}": arrays.images[slot] for slot in np.flatnonzero(arrays.image_mask)}
        watch.look(self._ticks.tick, shown, arrays.state)

    def _steering(self, follow: Follow | None, context: RequestContext) -> Steering | None:
        """Towards what is left of the last chunk, seen from the state of now."""
        rtc = self.runtime.rtc
        if rtc is None:
            if follow is not None:
                raise ValueError("follow belongs to real-time chunking: give the runtime an rtc configuration")
            return None
        if self._previous is None:
            return None
        chunk, before = self._previous
        if before.prompt != context.prompt:
            return None  # a plan for another task is not to be continued
        follow = follow or Follow(rtc.executed, rtc.delay)
        left = self.transforms.reanchored(chunk, before, context)[follow.executed :, : self.transforms.robot.action_dim]
        return steering_of(rtc, torch.from_numpy(left)[None], follow.delay, self.engine.config)

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


def load_quantisation(
    directory: Path,
    precision: Precision,
    config: ModelConfig,
    plan: Path | PrecisionPlan | None,
    calibration: Path | Calibration | None,
) -> Quantisation | None:
    """What a checkpoint is quantised with, None for precisions without quantisation; arguments as of `load_policy`.

    Raises ValueError, CheckpointError or FileNotFoundError that say what does not fit or is missing.
    """
    if precision in FLOATS:
        if plan is not None or calibration is not None:
            raise ValueError(f"precision {precision!r} quantises nothing, so it takes neither a plan nor a calibration")
        return None
    if plan is None:
        chosen = PrecisionPlan(precision)  # type: ignore[arg-type]
    else:
        chosen = plan if isinstance(plan, PrecisionPlan) else PrecisionPlan.load(plan)
    if calibration is None and chosen.needs_calibration(config):
        calibration = directory / CALIBRATION_FILE
    if isinstance(calibration, str | Path):
        calibration = Calibration.load(calibration)
    return Quantisation(chosen, calibration)


def _choose_runtime(runtime: RuntimeConfig | None, steps: int | None, seed: int | None) -> RuntimeConfig:
    if runtime is None:
        return RuntimeConfig(RuntimeConfig.steps if steps is None else steps, seed or 0)
    if steps not in (None, runtime.steps):
        raise ValueError(f"steps is {steps}, but the runtime has {runtime.steps}; give the number in one place")
    if seed is None or seed == runtime.seed:
        return runtime
    if runtime.seed != RuntimeConfig.seed:
        raise ValueError(f"seed is {seed}, but the runtime has {runtime.seed}; give the number in one place")
    return replace(runtime, seed=seed)


def load_policy(
    path: str | Path,
    robot: str | Robot | None = None,
    engine: str = "eager",
    steps: int | None = None,
    precision: Precision | None = None,
    seed: int | None = None,
    *,
    device: str = "auto",
    numerics: NumericsName | None = None,
    invalid_tokens: InvalidTokens | None = None,
    asset_id: str | None = None,
    tokenizer: str | Path | None = None,
    state_in_prompt: bool | None = None,
    default_prompt: str | None = None,
    plan: Path | PrecisionPlan | None = None,
    calibration: Path | Calibration | None = None,
    runtime: RuntimeConfig | None = None,
) -> Policy:
    """A policy from a checkpoint directory of any format.

    Args:
        path: openpi, lerobot or JAX checkpoint directory.
        robot: "libero", "droid", "aloha", "lerobot" (a lerobot checkpoint's own features), or a `Robot`. None: what the
            checkpoint says.
        engine: "eager", "graphed", "compiled", "compiled-max", "turbo", "onnx" or "tensorrt"; "onnx:DIRECTORY" for what
            `turbo-pi export` wrote; "vision=A,prefill=B,denoise=C" for stages of several. Those with something to
            prepare do it here, for the robot's observations.
        steps: flow-matching evaluations per chunk. None: the runtime's, else 10.
        precision: "fp32", "bf16", or a quantised one: "fp8", "int8", "w8a16", "w4a16", "nvfp4", as far as the engine
            runs it. None: bf16 on a GPU, fp32 on a CPU.
        seed: of the noise stream. None: the runtime's, else 0.
        device: "auto", "cpu", "cuda", "cuda:1", …
        numerics: profile to use instead of the checkpoint's; see `ModelConfig`.
        invalid_tokens: treatment to use instead of the checkpoint's; see `ModelConfig`.
        asset_id: which of several norm stats to use. None: the only one, or the robot's.
        tokenizer: a `.model` or `.json` file. None: the checkpoint's, else the one in openpi's cache.
        state_in_prompt: whether the prompt spells the state. None: as the checkpoint says, else as is customary.
        default_prompt: task for observations without one.
        plan: of a quantised precision, which products are not in it; or its file. None: all alike.
        calibration: input ranges, or their file. None: `calibration.json` in the checkpoint, where the plan needs one.
        runtime: what a tick computes, with its own number of steps.

    Raises:
        FileNotFoundError: no checkpoint, no tokenizer, no plan or no calibration; says where it looked.
        CheckpointError: a checkpoint that is corrupt or contradicts itself.
        ValueError: an unknown name, or parts that do not fit each other.
    """
    runtime = _choose_runtime(runtime, steps, seed)
    target = choose_device(device)
    chosen: Precision = precision or ("fp32" if target == "cpu" else "bf16")
    dtype = precision_dtype(chosen)
    checkpoint = open_checkpoint(path)
    transforms = _transforms(checkpoint, robot, asset_id, tokenizer, state_in_prompt, default_prompt)
    quantisation = load_quantisation(checkpoint.path, chosen, checkpoint.config, plan, calibration)
    if quantisation is not None:
        quantisation.check_robot(transforms.robot.name)
    model = load_opened(
        checkpoint, target, dtype, config=checkpoint.config, numerics=numerics, invalid_tokens=invalid_tokens
    )
    runner = create_engine(engine, model, chosen, quantisation)
    uint8_images = isinstance(runner, TickEngine) and runner.accepts_uint8 and transforms.keeps_uint8
    policy = Policy(replace(transforms, config=model.config, uint8_images=uint8_images), runner, runtime)
    policy.warm_up()
    return policy
