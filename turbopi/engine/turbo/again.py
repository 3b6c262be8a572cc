"""What the turbo engine does besides whole ticks: stage 3 again over a cache that is still there, and step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from ...config import ModelConfig
from ...errors import NonFiniteActionsError
from ...model import PrefixCache
from ..base import Precision
from ..integrate import EulerStep, Guidance, Steering, guidance_strength
from ..reuse import copied
from ..stage_inputs import check_state_and_noise
from .arena import Arena, Request
from .buckets import Bucket, bucket_for_rows, token_buckets
from .buffers import Buffers, RequestBuffers
from .cache import TurboCache, check_foreign, copy_in, hand_out
from .denoise import DenoiseLoop, note_finite
from .graphs import GraphSet

if TYPE_CHECKING:
    from .tick import Tick


@dataclass(frozen=True, eq=False)
class Placed:
    """The request that a batch size computed last: where, how long each prefix is, and which contents that left."""

    buffers: Buffers
    lengths: np.ndarray
    generation: int


@dataclass(frozen=True, eq=False)
class SteeringBuffers:
    """Static memory of guided steps: `x` (B,H,A) before each step, the old chunk (B,H,A), weights (H,1); float32."""

    x: Tensor
    previous: Tensor
    weights: Tensor


class Host(Protocol):
    """What `Again` needs of the engine that it belongs to."""

    config: ModelConfig
    device: torch.device
    precision: Precision
    _graphs: GraphSet
    _generations: dict[int, int]
    _placed: dict[int, Placed]
    _steering: dict[int, SteeringBuffers]

    def _arena(self, batch: int) -> Arena: ...
    def _loop(self, batch: int) -> DenoiseLoop: ...
    def _on_device(self) -> AbstractContextManager[object]: ...
    def _next_generation(self, batch: int) -> int: ...
    def _tick_of(self, request: Request, buffers: Buffers, steps: int) -> Tick: ...
    def _work(
        self, stage: str, request: Request, buffers: Buffers, steps: int
    ) -> tuple[object, Callable[[], None]]: ...
    def _integration(
        self, request: Request, buffers: Buffers, steps: tuple[EulerStep, ...], limit: float | None
    ) -> tuple[object, Callable[[], None]]: ...
    def _buffers_with(self, cache: PrefixCache) -> Buffers: ...
    def holds(self, cache: PrefixCache) -> bool: ...  # noqa: D102
    def _lent(self, cache: TurboCache) -> bool: ...
    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor: ...  # noqa: D102


class Again:
    """Part of `TurboEngine`; see `AgainEngine` and `IntegratingEngine`."""

    def holds(self: Host, cache: PrefixCache) -> bool:
        """See `HoldingEngine`."""
        if not isinstance(cache, TurboCache) or not cache.unchanged or not self._lent(cache):
            return False
        return cache.generation == self._generations.get(len(cache.lengths))

    def _lent(self: Host, cache: TurboCache) -> bool:
        """Whether the cache was handed out here, and not by another engine."""
        bucket = cache.buffers.bucket
        return cache.buffers is self._arena(bucket.batch).buffers(bucket)

    def last_cache(self: Host, batch: int = 1) -> TurboCache:
        """See `AgainEngine`."""
        placed = self._placed.get(batch)
        if placed is None or placed.generation != self._generations.get(batch):
            raise RuntimeError(f"the latest computation for a batch of {batch} was not a whole tick; run one first")
        return hand_out(self._arena(batch), placed.buffers, placed.lengths, placed.generation)

    @torch.no_grad()
    def sample_again(self: Host, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """See `AgainEngine`. Over its own latest cache nothing is copied but state and noise."""
        if not self.holds(cache):
            actions = self.denoise(cache, state, noise, steps).cpu()
            if not bool(torch.isfinite(actions).all()):
                raise NonFiniteActionsError(f"the engine 'turbo' in {self.precision} computed NaN or infinite actions")
            return actions
        assert isinstance(cache, TurboCache)
        check_state_and_noise(self.config, state, noise, len(cache.lengths))
        arena, buffers = self._arena(len(cache.lengths)), cache.buffers
        request = arena.request(buffers.bucket, torch.uint8)
        with self._on_device():
            for name, value in (("state", state), ("noise", noise)):
                host, device = getattr(request.host, name), getattr(request.device, name)
                host.copy_(value)
                device.copy_(host, non_blocking=True)
        tick = self._tick_of(request, buffers, steps)
        tick.launch_stage("denoise")
        return tick.read()

    @torch.no_grad()
    def warm_up_again(self: Host, cameras: int, steps: int, batch: int = 1) -> None:
        """See `AgainEngine`: captures stage 3 of every prompt bucket, and of those that kept caches are copied into."""
        arena = self._arena(batch)
        self._next_generation(batch)
        for bucket in _buckets_again(self.config, batch, cameras):
            buffers = arena.buffers(bucket)
            request = arena.request(buffers.bucket, torch.uint8)
            _blank(request.device, buffers.rows)
            with self._on_device():
                self._graphs.ensure(*self._work("denoise", request, buffers, steps))

    @torch.no_grad()
    def warm_up_stages(
        self: Host, cameras: int, images: torch.dtype, steps: tuple[EulerStep, ...], limit: float | None, batch: int = 1
    ) -> None:
        """See `SteppingEngine`: capture every stage by itself, the last one as `integrate`."""
        arena = self._arena(batch)
        self._next_generation(batch)
        for bucket in _buckets_again(self.config, batch, cameras):
            buffers = arena.buffers(bucket)
            request = arena.request(bucket, images)
            request.device.images.zero_()
            _blank(request.device, buffers.rows)
            with self._on_device():
                if bucket.cameras == cameras:
                    self._graphs.ensure(*self._work("prefill", request, buffers, 0))
                    if bucket.tokens == token_buckets(self.config)[0]:  # by itself, stage 1 always runs in this bucket
                        self._graphs.ensure(*self._work("encode_images", request, buffers, 0))
                if steps:
                    self._graphs.ensure(*self._integration(request, buffers, steps, limit))

    @torch.no_grad()
    def integrate(
        self: Host,
        cache: PrefixCache,
        state: Tensor,
        noise: Tensor,
        steps: tuple[EulerStep, ...],
        steering: Steering | None = None,
    ) -> Tensor:
        """See `IntegratingEngine`. Steering is guidance without the Jacobian; its values change no graph."""
        if steering is not None and (not isinstance(steering, Guidance) or steering.true_jacobian):
            raise ValueError(
                "the engine 'turbo' guides with the Jacobian taken as the identity; for the true Jacobian or a fixed "
                "prefix use the engine 'eager'"
            )
        check_state_and_noise(self.config, state, noise, len(cache.lengths))
        buffers = self._buffers_with(cache)
        request = self._arena(len(cache.lengths)).request(buffers.bucket, torch.float32)
        request.device.lengths.copy_(cache.lengths)
        request.device.state.copy_(state)
        request.device.noise.copy_(noise)
        key, work = self._integration(request, buffers, steps, None if steering is None else steering.limit)
        if steering is not None:
            static = self._steering[len(cache.lengths)]
            static.previous.copy_(steering.previous)
            static.weights.copy_(steering.weights[:, None])
        with self._on_device():
            self._graphs.run(key, work)
        return buffers.denoise.x_t.view(noise.shape).clone()

    def _buffers_with(self: Host, cache: PrefixCache) -> Buffers:
        """Where the cache lies, or was put."""
        if self.holds(cache):
            assert isinstance(cache, TurboCache)
            return cache.buffers
        if isinstance(cache, TurboCache):
            stale = cache.generation != self._generations.get(cache.buffers.bucket.batch)
            if cache.unchanged or (stale and self._lent(cache)):
                raise RuntimeError(
                    "something was computed over this PrefixCache since it was made: run denoise first, or clone its "
                    "tensors into a PrefixCache to keep them"
                )
            # What nobody has put anything else for lies in buckets that overlap with the one that it is copied to.
            cache = copied(cache)
        check_foreign(cache)
        batch = len(cache.lengths)
        buffers = self._arena(batch).buffers(bucket_for_rows(self.config, batch, int(cache.lengths.max())))
        self._next_generation(batch)
        copy_in(cache, buffers)
        return buffers

    def _integration(
        self: Host, request: Request, buffers: Buffers, steps: tuple[EulerStep, ...], limit: float | None
    ) -> tuple[object, Callable[[], None]]:
        """The key of the graph of these steps, guided or not, and what it launches."""
        batch = buffers.bucket.batch
        loop = self._loop(batch)
        for step in steps:
            loop.prepare(step)
        if batch not in self._steering:
            noise = request.device.noise
            weights = noise.new_zeros(noise.shape[1], 1)
            self._steering[batch] = SteeringBuffers(torch.zeros_like(noise), torch.zeros_like(noise), weights)
        work = partial(_integrate, loop, request.device, buffers, steps, self._steering[batch], limit)
        return ("integrate", buffers.bucket, steps, limit), work


def _integrate(
    loop: DenoiseLoop,
    request: RequestBuffers,
    buffers: Buffers,
    steps: tuple[EulerStep, ...],
    static: SteeringBuffers,
    limit: float | None,
) -> None:
    """Step after step, each a loop of its own from `static.x`; the request's noise stays, for work is done again."""
    begun = dataclasses.replace(request, noise=static.x)
    x_t = buffers.denoise.x_t.view_as(static.x)
    static.x.copy_(request.noise)
    for step in steps:
        loop.run(begun, buffers, step)
        if limit is not None:
            # v = (after - before) / delta, and the predicted actions are before - time · v.
            predicted = static.x - (step.time / step.delta) * (x_t - static.x)
            pull = (static.previous - predicted) * static.weights
            x_t.sub_(pull, alpha=step.delta * guidance_strength(step.time, limit))
        static.x.copy_(x_t)
    note_finite(buffers)


def _buckets_again(config: ModelConfig, batch: int, cameras: int) -> list[Bucket]:
    """Where prefixes of `cameras` cameras lie, the largest first: in their own buckets while they are the latest.

    A cache that comes back later no longer says how many of its rows were cameras', see `bucket_for_rows`.
    """
    own = {Bucket(batch, cameras, tokens) for tokens in token_buckets(config)}
    shortest = cameras * config.vision.tokens + 1
    kept = {bucket_for_rows(config, batch, rows) for rows in range(shortest, shortest + config.max_tokens)}
    return sorted(own | kept, key=lambda bucket: bucket.rows(config), reverse=True)


def _blank(request: RequestBuffers, rows: int) -> None:
    """Zeros of full length, to capture with: an attention over nothing would be a division by zero."""
    for tensor in (request.first, request.tokens, request.state, request.noise):
        tensor.zero_()
    request.lengths.fill_(rows)
