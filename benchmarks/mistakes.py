"""Known mistakes, to be put into a policy one at a time; `planted_mistakes.py` measures what they cost.

A mistake is made in one of four places: around the engine's stages, in the transforms, in the simulation's camera, or
on the actions that the model returns. The reference model itself has no switch for any of them.

A tick is one control step: 1/20 s, one action carried out.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from turbopi.config import ModelConfig
from turbopi.engine import Engine
from turbopi.model import PrefixCache, expert, pi0
from turbopi.model.flow import time_schedule
from turbopi.policy import Policy
from turbopi.sim.sources import CheckpointSource, LocalPolicy, OpenPolicy
from turbopi.sim.workers import SceneSource
from turbopi.transforms import ModelArrays, PolicyTransforms, RequestContext

CAMERA_KEYS = ("observation/image", "observation/wrist_image")
STATE_KEY = "observation/state"
FROZEN_TICKS = (2, 5, 10)
NOISE_SIZES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
REFERENCE_ENGINES = ("eager", "graphed")
"""Engines that run the reference's own code, each call or, captured, the first."""


class EngineAround:
    """An engine that does what another does; mistakes override a stage."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.name, self.precision, self.config, self.device = inner.name, inner.precision, inner.config, inner.device

    def encode_images(self, images: Tensor, image_mask: Tensor) -> Tensor:
        """Stage 1; see `Engine`."""
        return self.inner.encode_images(images, image_mask)

    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Stage 2; see `Engine`."""
        return self.inner.prefill(image_tokens, image_mask, tokens, token_mask)

    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Stage 3; see `Engine`."""
        return self.inner.denoise(cache, state, noise, steps)

    def synchronize(self) -> None:
        """See `Engine`."""
        self.inner.synchronize()


def changed(cache: PrefixCache, **values: Any) -> PrefixCache:
    """The cache with other values, as a plain one: an engine would take its own from where it holds them, unchanged."""
    kept = {f.name: getattr(cache, f.name) for f in dataclasses.fields(PrefixCache)}
    return PrefixCache(**{**kept, **values})


class PaddingSeen(EngineAround):
    """The suffix attends to padding and to the missing camera; positions stay right."""

    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """The cache, with nothing marked invalid. Raises ValueError where there is no padding to see."""
        cache = super().prefill(image_tokens, image_mask, tokens, token_mask)
        if cache.valid is None:
            raise ValueError("this cache has no padding for the suffix to see; load with invalid_tokens='masked'")
        return changed(cache, valid=None)


class PositionsShifted(EngineAround):
    """The decoder's positions are one too high: the suffix starts one behind the prefix's end."""

    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """The cache of a prefix that claims one token more than it has."""
        cache = super().prefill(image_tokens, image_mask, tokens, token_mask)
        return changed(cache, lengths=cache.lengths + 1)


class _ReferenceAround(EngineAround):
    """For mistakes inside the reference's own loop, on an engine that runs it and has not run yet."""

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner)
        if inner.name not in REFERENCE_ENGINES:
            raise ValueError(f"this mistake is made inside the reference; engine {inner.name!r} does not run it")


class ChunkCausal(_ReferenceAround):
    """Within the chunk an action sees only itself and those before it."""

    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Stage 3 under a causal mask. Raises ValueError where the reference builds no mask at all."""
        if cache.valid is None:
            raise ValueError("without padding the reference needs no mask; load with invalid_tokens='masked'")
        with mock.patch.object(expert, "suffix_visibility", causal_visibility):
            return super().denoise(cache, state, noise, steps)


_right_visibility = expert.suffix_visibility


def causal_visibility(config: ModelConfig, prefix_visible: Tensor) -> Tensor:
    """`suffix_visibility` with a causal mask over the suffix: (B,P) bool -> (B,N,P+N) bool."""
    visible, n = _right_visibility(config, prefix_visible), config.suffix_tokens
    return torch.cat((visible[:, :, :-n], visible[:, :, -n:].tril()), dim=-1)


class LastStepMissing(_ReferenceAround):
    """The Euler loop ends one step early, at t = 1/steps."""

    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Stage 3 with the last time left out."""
        with mock.patch.object(pi0, "time_schedule", lambda *args: time_schedule(*args)[:-1]):
            return super().denoise(cache, state, noise, steps)


class ActionNoise(EngineAround):
    """White noise on the robot's dimensions of the chunk: exactly `size` times as long as the chunk is.

    It is drawn anew for every chunk, from a seed that the chunk's starting noise makes, so that episodes stay pairs.
    """

    def __init__(self, inner: Engine, size: float, dims: int) -> None:
        super().__init__(inner)
        self.size, self.dims = size, dims

    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Stage 3, and the noise."""
        actions = super().denoise(cache, state, noise, steps).clone()
        seed = hashlib.sha256(noise.cpu().numpy().tobytes()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
        used = actions[:, :, : self.dims]
        error = torch.randn(used.shape, generator=generator).to(actions)
        wanted, drawn = (torch.linalg.vector_norm(t, dim=(1, 2), keepdim=True) for t in (self.size * used, error))
        actions[:, :, : self.dims] += error * (wanted / drawn)
        return actions


class MissingCameraPresent(PolicyTransforms):
    """The black picture that stands for the missing camera is marked as a camera's."""

    def inputs(self, observation: Mapping[str, Any]) -> tuple[ModelArrays, RequestContext]:
        """See `PolicyTransforms.inputs`."""
        arrays, context = super().inputs(observation)
        return dataclasses.replace(arrays, image_mask=np.ones_like(arrays.image_mask)), context


class PicturesUpsideDown(PolicyTransforms):
    """LIBERO's pictures as the simulator draws them, not rotated by 180°."""

    def inputs(self, observation: Mapping[str, Any]) -> tuple[ModelArrays, RequestContext]:
        """See `PolicyTransforms.inputs`."""
        return super().inputs({**observation, **{key: observation[key][::-1, ::-1] for key in CAMERA_KEYS}})


def with_engine(policy: Policy, around: Callable[[Engine], Engine]) -> Policy:
    """The policy with something around its engine, which then runs stage by stage and takes pictures as floats."""
    transforms = dataclasses.replace(policy.transforms, uint8_images=False)
    return Policy(transforms, around(policy.engine), policy.runtime)


def with_transforms(policy: Policy, kind: type[PolicyTransforms]) -> Policy:
    """The policy with transforms of another class, otherwise the same."""
    values = {f.name: getattr(policy.transforms, f.name) for f in dataclasses.fields(PolicyTransforms)}
    return Policy(kind(**values), policy.engine, policy.runtime)


def with_cameras_swapped(policy: Policy) -> Policy:
    """Each camera's picture in the other's slot."""
    robot = policy.transforms.robot
    swapped = dataclasses.replace(robot, cameras=tuple(reversed(robot.cameras)))
    return Policy(dataclasses.replace(policy.transforms, robot=swapped), policy.engine, policy.runtime)


def with_mean_std(policy: Policy) -> Policy:
    """State and actions normalised by mean and standard deviation, as π0 does, instead of by quantiles."""
    old = policy.transforms
    state, actions = (dataclasses.replace(n, mode="mean_std") for n in (old.state, old.actions))
    return Policy(dataclasses.replace(old, state=state, actions=actions), policy.engine, policy.runtime)


def with_noise(policy: Policy, size: float) -> Policy:
    """The policy with white noise of a relative size on its normalised actions."""
    dims = policy.transforms.robot.action_dim
    return with_engine(policy, partial(ActionNoise, size=size, dims=dims))


def unchanged(policy: Policy) -> Policy:
    """The policy itself: the mistake, if any, is made elsewhere."""
    return policy


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        name: for files and options.
        title: for tables.
        where: "none", "model", "transforms", "camera" or "noise".
        apply: makes a broken policy of a good one.
        invalid_tokens: treatment of padding under which it is made.
        frozen_ticks: how old the pictures are that the policy sees.
        in_reference: made inside the reference's loop, so that only `REFERENCE_ENGINES` can make it.
        in_velocity: whether the first evaluation of the flow field shows it.
    """

    name: str
    title: str
    where: str
    apply: Callable[[Policy], Policy] = unchanged
    invalid_tokens: str = "masked"
    frozen_ticks: int = 0
    in_reference: bool = False
    in_velocity: bool = True


UNBROKEN, CONTROL = "unbroken", "padding-dropped"

_ALL = [
    Mistake(UNBROKEN, "none (padding masked)", "none"),
    Mistake(CONTROL, "none (padding dropped, as shipped)", "none", invalid_tokens="dropped"),
    Mistake("padding-seen", "suffix attends to padding", "model", partial(with_engine, around=PaddingSeen)),
    Mistake("camera-present", "masked camera treated as present", "transforms",
            partial(with_transforms, kind=MissingCameraPresent)),
    Mistake("causal-chunk", "causal mask in the chunk", "model", partial(with_engine, around=ChunkCausal),
            in_reference=True),
    Mistake("last-step", "last Euler step missing", "model", partial(with_engine, around=LastStepMissing),
            in_reference=True, in_velocity=False),
    Mistake("positions", "decoder positions off by one", "model", partial(with_engine, around=PositionsShifted)),
    Mistake("cameras-swapped", "cameras swapped", "transforms", with_cameras_swapped),
    Mistake("not-rotated", "images not rotated", "transforms", partial(with_transforms, kind=PicturesUpsideDown)),
    Mistake("mean-std", "normalisation by mean/std instead of quantiles", "transforms", with_mean_std),
    *(Mistake(f"frozen-{n}", f"image frozen for {n} ticks", "camera", frozen_ticks=n) for n in FROZEN_TICKS),
    *(Mistake(f"noise-{size:g}", f"white noise, {size:g} of the actions' size", "noise", partial(with_noise, size=size),
              in_velocity=False) for size in NOISE_SIZES),
]  # fmt: skip
MISTAKES: dict[str, Mistake] = {mistake.name: mistake for mistake in _ALL}


@dataclass(frozen=True)
class MistakenSource:
    """A checkpoint's policy with one mistake in it.

    Attributes:
        path: the checkpoint's directory.
        mistake: name of the mistake.
        options: of `turbopi.load_policy`; the mistake decides `invalid_tokens`, and the engine where it must be the
            reference's.
    """

    path: Path
    mistake: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def checkpoint(self) -> CheckpointSource:
        """The good policy, loaded as the mistake needs it."""
        mistake = MISTAKES[self.mistake]
        forced = {"invalid_tokens": mistake.invalid_tokens}
        if mistake.in_reference and self.options.get("engine") not in REFERENCE_ENGINES:
            forced["engine"] = REFERENCE_ENGINES[0]
        return CheckpointSource(self.path, {**self.options, **forced})

    def describe(self) -> dict[str, Any]:
        """The checkpoint, its options, and the mistake."""
        return {**self.checkpoint.describe(), "mistake": self.mistake}

    def open(self) -> OpenPolicy:
        """Load the policy and break it. Raises what `CheckpointSource.load` does."""
        return LocalPolicy(MISTAKES[self.mistake].apply(self.checkpoint.load()))


@dataclass(frozen=True)
class FrozenScenes:
    """Simulations whose pictures stand still.

    Attributes:
        scenes: the simulations.
        ticks: how old the pictures are when the policy looks.
        replan: ticks between looks.
    """

    scenes: SceneSource
    ticks: int
    replan: int

    def prepare(self, suite: str, tasks: tuple[int, ...], trials: int) -> dict[str, Any]:
        """As the simulations do; adds how old the pictures are."""
        return {**self.scenes.prepare(suite, tasks, trials), "frozen_ticks": self.ticks}

    def open(self, suite: str, task: int) -> FrozenEnv:
        """A simulation of one task."""
        return FrozenEnv(self.scenes.open(suite, task), (self.ticks,), self.replan)


class FrozenEnv:
    """A simulation that remembers pictures, and shows old ones.

    Whenever the policy looks, at tick t, the pictures have stood still for `ages[0]` ticks: it sees those of tick
    max(0, t - ages[0]), with the state of tick t. Drawing at other ticks than those of the looks changes nothing that
    happens (`tests/sim`).

    Attributes:
        ages: at which ages a look's pictures are kept; the first is the one that is shown.
        seen: tick -> observation, of every tick that was drawn in this episode.
    """

    def __init__(self, env: Any, ages: tuple[int, ...], replan: int) -> None:
        self._env, self.ages, self.replan = env, ages, replan
        self.seen: dict[int, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self, *args: Any, **options: Any) -> None:
        """Start an episode and take the first picture."""
        self._env.reset(*args, **options)
        self.seen = {0: self._env.observe()}

    def step(self, action: np.ndarray) -> bool:
        """One tick; takes a picture if a look that comes later will need it."""
        success: bool = self._env.step(action)
        tick = self._env.steps
        if any((tick + age) % self.replan == 0 for age in self.ages):
            self.seen[tick] = self._env.observe()
        return success

    def observe(self) -> dict[str, Any]:
        """What the policy sees: old pictures, the present state."""
        return {**self.seen[max(0, self._env.steps - self.ages[0])], STATE_KEY: self._env.state}
