"""The reference in CUDA graphs: the same kernels without the host between them. Any CUDA GPU, nothing to compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from ..model import Pi0, PrefixCache
from ..quant import Quantisation, quantisation_details, quantised
from .base import Precision, register_engine
from .capture import CudaGraphRecorder, Recorder, Work, require_cuda
from .packing import Packing, in_place, pack
from .recent import Recent
from .reuse import LentCache
from .stage_inputs import check_images, check_state_and_noise

CAPACITY = 32
"""Shapes kept at a time. A state that is spelled in the prompt changes its length by a handful of tokens."""
STEP_COUNTS = 4
"""Step counts kept for each of them."""


class StageFunctions(Protocol):
    """What is captured: the three stages on static shapes, without any look at a value."""

    def encode(self, images: Tensor) -> Tensor:
        """(n,3,S,S) float32 -> (n,tokens,width)."""

    def prefill(self, embs: Tensor, valid: Tensor | None) -> PrefixCache:
        """Packed (B,L,width), (B,L) bool or None -> cache."""

    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """As `Pi0.denoise`."""


class ReferenceFunctions:
    """The reference's own."""

    def __init__(self, model: Pi0) -> None:
        self.model = model

    def encode(self, images: Tensor) -> Tensor:
        """See `StageFunctions`."""
        return self.model._encode_camera(images, None)

    def prefill(self, embs: Tensor, valid: Tensor | None) -> PrefixCache:
        """See `StageFunctions`."""
        return self.model.vlm(embs, valid)

    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """See `StageFunctions`."""
        return self.model.denoise(cache, state, noise, steps)


@dataclass
class _Vision:
    """A captured `encode` and its static tensors."""

    images: Tensor
    tokens: Tensor
    replay: Work


@dataclass
class _Denoise:
    """A captured `denoise` over one `_Prefix`, and its static tensors."""

    state: Tensor
    noise: Tensor
    actions: Tensor
    replay: Work


@dataclass
class _Prefix:
    """The static tensors of one prefix shape and the graphs over them. Each writing of the cache is a generation."""

    order: Tensor
    embs: Tensor
    cache: PrefixCache
    denoise: Recent[int, _Denoise]
    packing: Packing | None = None
    replay: Work | None = None
    generation: int = 0


@dataclass(frozen=True)
class HeldCache(LentCache):
    """A PrefixCache that lies in an engine's static tensors, until the next prefill of its shape."""

    owner: _Prefix
    generation: int


class StageGraphs:
    """Captured stages, made when a shape is first seen and kept for the shapes used last.

    A graph belongs to (images at a time) for stage 1, (batch, prefix length, masked or not) for stage 2, and the same
    with the step count for stage 3. Which tokens are valid must be known on the host: masks that lie on the GPU cost a
    synchronisation, so leave them on the CPU.

    A PrefixCache is valid until the next `prefill` of its shape, which writes over it; `denoise` then refuses it
    instead of computing with another observation's keys. Clone its tensors to keep it longer. Image tokens and actions
    are the caller's own. Not for use from two threads at once.

    Args:
        model: whose weights are used as they are; they must not move while the engine lives.
        functions: what is captured.
        recorder: what captures.
        bucket: prefix lengths are rounded up to a multiple; 1 keeps them as they are.
    """

    def __init__(
        self, model: Pi0, functions: StageFunctions, recorder: Recorder, bucket: int = 1, capacity: int = CAPACITY
    ) -> None:
        self.model = model
        self.config = model.config
        self.device = next(model.parameters()).device
        self.functions = functions
        self.recorder = recorder
        self.bucket = bucket
        self._vision: Recent[int, _Vision] = Recent(capacity)
        self._prefix: Recent[tuple[int, int, bool], _Prefix] = Recent(capacity)

    def encode_images(self, images: Tensor, image_mask: Tensor) -> Tensor:
        """Stage 1; see `Engine`. Missing cameras are zeros under "dropped", as in the reference."""
        check_images(self.config, images, len(image_mask))
        present = image_mask.cpu().numpy()
        if self.config.invalid_tokens == "masked":
            present = np.ones_like(present)
        shape = (*present.shape, self.config.vision.tokens, self.config.vlm.width)
        tokens = torch.zeros(shape, dtype=self.model.projector.weight.dtype, device=self.device)
        for camera in range(self.config.cameras):
            samples = np.flatnonzero(present[:, camera])
            if len(samples) == 0:
                continue
            if len(samples) == len(present):
                tokens[:, camera] = self._encode(images[:, camera])
            else:
                chosen = torch.from_numpy(samples)
                encoded = self._encode(images[chosen.to(images.device), camera])
                tokens[chosen.to(self.device), camera] = encoded
        return tokens

    def _encode(self, images: Tensor) -> Tensor:
        vision = self._vision.get(len(images), lambda: self._capture_vision(images))
        vision.images.copy_(images)
        vision.replay()
        return vision.tokens

    def _capture_vision(self, images: Tensor) -> _Vision:
        static = torch.empty(images.shape, dtype=torch.float32, device=self.device)
        static.copy_(images)
        shape = (len(images), self.config.vision.tokens, self.config.vlm.width)
        tokens = torch.empty(shape, dtype=self.model.projector.weight.dtype, device=self.device)
        return _Vision(static, tokens, self.recorder.record(lambda: _store(self.functions.encode(static), tokens)))

    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Stage 2; see `Engine`. The cache is valid until the next prefill of its shape."""
        cells = np.repeat(image_mask.cpu().numpy(), image_tokens.shape[2], axis=1)
        packing = self._pack(np.concatenate((cells, token_mask.cpu().numpy()), axis=1))
        prompt = self.model.vlm.embed(tokens.to(self.device))
        embs = torch.cat((image_tokens.to(self.device).flatten(1, 2), prompt), dim=1)
        prefix = self._prefix_of(len(packing.order), packing.length, packing.valid is not None)
        if prefix.packing is None or not packing.same_as(prefix.packing):
            _upload(packing, prefix)
        torch.take_along_dim(embs, prefix.order[:, :, None], dim=1, out=prefix.embs)
        if prefix.replay is None:
            prefix.replay = self.recorder.record(self._prefill_work(prefix))
        prefix.replay()
        prefix.generation += 1
        held = prefix.cache
        return HeldCache(held.keys, held.values, held.lengths, held.valid, prefix, prefix.generation)

    def _pack(self, valid: np.ndarray) -> Packing:
        if self.config.invalid_tokens == "masked":
            return in_place(valid)
        return pack(valid, self.bucket, always_masked=self.bucket > 1)

    def _prefix_of(self, batch: int, length: int, masked: bool) -> _Prefix:
        return self._prefix.get((batch, length, masked), lambda: self._make_prefix(batch, length, masked))

    def _make_prefix(self, batch: int, length: int, masked: bool) -> _Prefix:
        vlm, model = self.config.vlm, self.model
        shape = (batch, vlm.kv_heads, length, vlm.head_dim)

        def layers() -> tuple[Tensor, ...]:
            return tuple(torch.empty(shape, dtype=model.vlm.dtype, device=self.device) for _ in range(vlm.depth))

        dtype = torch.promote_types(model.projector.weight.dtype, model.vlm.embed_tokens.weight.dtype)
        lengths = torch.empty(batch, dtype=torch.int64, device=self.device)
        valid = torch.empty(batch, length, dtype=torch.bool, device=self.device) if masked else None
        return _Prefix(
            order=torch.empty(batch, length, dtype=torch.int64, device=self.device),
            embs=torch.empty(batch, length, vlm.width, dtype=dtype, device=self.device),
            cache=PrefixCache(layers(), layers(), lengths, valid),
            denoise=Recent(STEP_COUNTS),
        )

    def _prefill_work(self, prefix: _Prefix) -> Work:
        # Not the whole `prefix`: it will hold the graph, which would hold it.
        embs, cache, prefill = prefix.embs, prefix.cache, self.functions.prefill
        return lambda: _store_cache(prefill(embs, cache.valid), cache)

    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Stage 3; see `Engine`. Takes its own caches as they lie, and copies in those from elsewhere.

        Raises RuntimeError if a later prefill has written over the cache.
        """
        check_state_and_noise(self.config, state, noise, len(cache.lengths))
        prefix = self._holding(cache)
        run = prefix.denoise.get(steps, lambda: self._capture_denoise(prefix.cache, steps))
        run.state.copy_(state)
        run.noise.copy_(noise)
        run.replay()
        return run.actions.clone()

    def _holding(self, cache: PrefixCache) -> _Prefix:
        """The static tensors that hold the cache's values."""
        if isinstance(cache, HeldCache):
            if cache.generation != cache.owner.generation:
                raise RuntimeError(
                    "a later prefill has written over this PrefixCache: run denoise before the next prefill, "
                    "or clone the cache's tensors to keep them"
                )
            return cache.owner
        batch, _, length, _ = cache.keys[0].shape
        prefix = self._prefix_of(batch, length, cache.valid is not None)
        _store_cache(cache, prefix.cache)
        if cache.valid is not None and prefix.cache.valid is not None:
            prefix.cache.valid.copy_(cache.valid)
        prefix.packing = None
        prefix.generation += 1
        return prefix

    def _capture_denoise(self, cache: PrefixCache, steps: int) -> _Denoise:
        batch, config, denoise = len(cache.lengths), self.config, self.functions.denoise
        state = torch.zeros(batch, config.state_dim, device=self.device)
        noise = torch.zeros(batch, config.horizon, config.action_dim, device=self.device)
        actions = torch.empty_like(noise)
        replay = self.recorder.record(lambda: _store(denoise(cache, state, noise, steps), actions))
        return _Denoise(state, noise, actions, replay)


def _store(value: Tensor, into: Tensor) -> None:
    into.copy_(value)


def _upload(packing: Packing, prefix: _Prefix) -> None:
    """Tell the device which slots are valid; a copy that waits, so only when it changes."""
    prefix.order.copy_(torch.from_numpy(packing.order))
    if packing.valid is not None and prefix.cache.valid is not None:
        prefix.cache.valid.copy_(torch.from_numpy(packing.valid))
    prefix.packing = packing


def _store_cache(cache: PrefixCache, into: PrefixCache) -> None:
    for source, target in zip((*cache.keys, *cache.values), (*into.keys, *into.values), strict=True):
        target.copy_(source)
    into.lengths.copy_(cache.lengths)


@register_engine("graphed", get_args(Precision))
class GraphedEngine:
    """`Pi0` as it is, in CUDA graphs: eager's answer to the bit on the same GPU, without its launches.

    See `StageGraphs` for what is captured when, and how long results are valid.
    """

    name = "graphed"

    def __init__(self, model: Pi0, precision: Precision, quantisation: Quantisation | None = None) -> None:
        self.device = require_cuda(next(model.parameters()).device, self.name)
        self.model = model if quantisation is None else quantised(model, quantisation)
        self._details = {} if quantisation is None else quantisation_details(self.model, quantisation)
        self.precision = precision
        self.config = model.config
        self._graphs = StageGraphs(self.model, ReferenceFunctions(self.model), CudaGraphRecorder(self.device))

    def describe(self) -> dict[str, Any]:
        """How the products are computed, where they are quantised."""
        return dict(self._details)

    @torch.no_grad()
    def encode_images(self, images: Tensor, image_mask: Tensor) -> Tensor:
        """Stage 1; see `Engine`."""
        return self._graphs.encode_images(images, image_mask)

    @torch.no_grad()
    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Stage 2; see `Engine`. The cache is valid until the next prefill of its shape."""
        return self._graphs.prefill(image_tokens, image_mask, tokens, token_mask)

    @torch.no_grad()
    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Stage 3; see `Engine`."""
        return self._graphs.denoise(cache, state, noise, steps)

    def holds(self, cache: PrefixCache) -> bool:
        """See `HoldingEngine`."""
        return isinstance(cache, HeldCache) and cache.generation == cache.owner.generation

    def synchronize(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize(self.device)
