"""Stages as graphs over static tensors, one observation at a time; who computes the graphs is given from outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import InputError, NonFiniteActionsError
from ...export.graphs import (
    ACTIONS,
    IMAGE_TOKENS,
    IMAGES,
    NOISE,
    PREFIX_LENGTH,
    PROMPT_LENGTH,
    STATE,
    TOKENS,
    cache_names,
)
from ...model import ModelInput, PrefixCache
from ...model.inputs import check_noise
from ..base import Precision
from ..recent import Recent
from ..reuse import LentCache
from ..stage_inputs import check_images, check_state_and_noise
from .source import FoundGraph, GraphSource, bucket_for

STEP_COUNTS = 4
"""Step counts kept for each prefix shape."""


class BoundGraph(Protocol):
    """A graph that is ready to run.

    Attributes:
        inputs, outputs: its tensors by name. Write into inputs, `run`, read outputs.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def run(self) -> None:
        """Compute the outputs from the inputs."""


class GraphRunner(Protocol):
    """A runtime for graphs."""

    def open(self, found: FoundGraph, given: Mapping[str, Tensor]) -> BoundGraph:
        """A graph over static tensors on the runner's device; `given` inputs lie somewhere already."""

    def describe(self) -> dict[str, Any]:
        """For receipts."""


@dataclass(eq=False)
class _Slots:
    """The graphs over one prefix shape, and the static cache that passes between them, with its valid tokens."""

    views: int
    bucket: int
    prefill: BoundGraph
    denoise: Recent[int, BoundGraph] = field(default_factory=lambda: Recent(STEP_COUNTS))
    generation: int = 0
    length: int = 0


@dataclass(frozen=True)
class GraphCache(LentCache):
    """A PrefixCache that lies in the engine's static tensors until the next prefill of its shape."""

    owner: _Slots
    generation: int


class GraphEngine:
    """π0 and π0.5 as exported graphs. Equal to the reference within rounding.

    A request goes into the smallest bucket that holds its prompt; a bucket's graphs are opened by `warm_up` or when it
    is first seen. Samples of a batch run one after the other. A PrefixCache of one sample is valid until the next
    `prefill` of its bucket; `denoise` then refuses it. Not for use from two threads at once.

    Args:
        name: of the engine.
        graphs: where the graphs come from.
        runner: what computes them.
        precision: under which the engine runs.
        device: of inputs and results.

    Raises ValueError for a model whose invalid tokens are to be masked.
    """

    accepts_uint8 = False

    def __init__(
        self, name: str, graphs: GraphSource, runner: GraphRunner, precision: Precision, device: torch.device
    ) -> None:
        self.name = name
        if graphs.config.invalid_tokens != "dropped":
            raise ValueError(
                f"engine {name!r} drops invalid tokens, the model has invalid_tokens="
                f"{graphs.config.invalid_tokens!r}; load it with invalid_tokens='dropped', or use the engine 'eager'"
            )
        self.precision = precision
        self.config = graphs.config
        self.device = device
        self._graphs = graphs
        self._runner = runner
        self._vision: dict[int, BoundGraph] = {}
        self._slots: dict[tuple[int, int], _Slots] = {}

    # Graphs, opened once

    def _vision_for(self, views: int) -> BoundGraph:
        if views not in self._vision:
            self._vision[views] = self._runner.open(self._graphs.find("vision", views, self._graphs.buckets[0], 1), {})
        return self._vision[views]

    def _slots_for(self, views: int, bucket: int) -> _Slots:
        if (views, bucket) not in self._slots:
            prefill = self._runner.open(self._graphs.find("prefill", views, bucket, 1), {})
            self._slots[views, bucket] = _Slots(views, bucket, prefill)
        return self._slots[views, bucket]

    def _denoise_for(self, slots: _Slots, steps: int) -> BoundGraph:
        def make() -> BoundGraph:
            found = self._graphs.find("denoise", slots.views, slots.bucket, steps)
            return self._runner.open(found, slots.prefill.outputs)

        return slots.denoise.get(steps, make)

    def warm_up(self, cameras: int, steps: int, batch: int = 1, images: torch.dtype = torch.float32) -> None:
        """Open the graphs of every bucket for `cameras` valid cameras; see `TickEngine`."""
        self._vision_for(cameras).run()
        for bucket in self._graphs.buckets:
            slots = self._slots_for(cameras, bucket)
            slots.prefill.run()
            self._denoise_for(slots, steps).run()

    # Stages

    @torch.no_grad()
    def encode_images(self, images: Tensor, image_mask: Tensor) -> Tensor:
        """Stage 1; see `Engine`. Missing cameras are zeros."""
        _require_samples(images)
        check_images(self.config, images, len(image_mask))
        found = [self._encode(images[sample], image_mask[sample]) for sample in range(len(images))]
        shape = (len(found), self.config.cameras, *found[0].shape[1:])
        tokens = torch.zeros(shape, dtype=found[0].dtype, device=self.device)
        for sample, encoded in enumerate(found):
            tokens[sample, image_mask[sample].to(self.device)] = encoded
        return tokens

    def _encode(self, images: Tensor, present: Tensor) -> Tensor:
        """The cameras (C,3,S,S) of one sample that are there -> (V,tokens,width)."""
        graph = self._vision_for(_views(present))
        graph.inputs[IMAGES].copy_(images[present.to(images.device)])
        graph.run()
        return graph.outputs[IMAGE_TOKENS].clone()

    @torch.no_grad()
    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Stage 2; see `Engine`. The cache of one sample is valid until the next prefill of its bucket."""
        _require_samples(tokens)
        caches: list[PrefixCache] = []
        for sample in range(len(tokens)):
            present = image_mask[sample].cpu()
            slots = self._prefill(
                image_tokens[sample][present.to(image_tokens.device)], tokens[sample], token_mask[sample]
            )
            cache = self._hand_out(slots)
            if len(tokens) == 1:
                return cache
            caches.append(_copy(cache))
        return _stack(caches)

    def _prefill(self, views: Tensor, tokens: Tensor, token_mask: Tensor) -> _Slots:
        """One sample's valid cameras (V,tokens,width) and prompt (T,) into the cache of its bucket."""
        valid = tokens.cpu()[token_mask.cpu()]
        slots = self._slots_for(_views(torch.ones(len(views))), bucket_for(self._graphs.buckets, len(valid)))
        inputs = slots.prefill.inputs
        inputs[IMAGE_TOKENS].copy_(views)
        inputs[TOKENS].zero_()[0, : len(valid)] = valid.to(self.device)
        inputs[PROMPT_LENGTH].fill_(len(valid))
        slots.generation += 1
        slots.length = slots.views * self.config.vision.tokens + len(valid)
        slots.prefill.run()
        return slots

    def _hand_out(self, slots: _Slots) -> GraphCache:
        """The valid part of a static cache, as views."""
        outputs, depth = slots.prefill.outputs, self.config.vlm.depth
        cut = [outputs[name][:, :, : slots.length] for name in cache_names(self.config)]
        lengths = outputs[PREFIX_LENGTH].clone()
        return GraphCache(tuple(cut[:depth]), tuple(cut[depth:]), lengths, None, slots, slots.generation)

    def holds(self, cache: PrefixCache) -> bool:
        """See `HoldingEngine`."""
        if not isinstance(cache, GraphCache) or cache.owner not in self._slots.values():
            return False
        return cache.generation == cache.owner.generation

    @torch.no_grad()
    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Stage 3; see `Engine`. Takes its own caches as they lie, and copies in those from elsewhere.

        Raises RuntimeError if a later prefill has written over the cache.
        """
        check_state_and_noise(self.config, state, noise, len(cache.lengths))
        if isinstance(cache, GraphCache) and cache.owner in self._slots.values():
            if not self.holds(cache):
                raise RuntimeError(
                    "a later prefill has written over this PrefixCache: run denoise before the next prefill, or clone "
                    "the cache's tensors to keep them"
                )
            return self._denoise(cache.owner, state, noise, steps).clone()
        actions = []
        for sample in range(len(noise)):
            slots = self._copy_in(cache, sample)
            actions.append(self._denoise(slots, state[sample : sample + 1], noise[sample : sample + 1], steps).clone())
        return torch.cat(actions)

    def _denoise(self, slots: _Slots, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        graph = self._denoise_for(slots, steps)
        graph.inputs[NOISE].copy_(noise)
        if STATE in graph.inputs:
            graph.inputs[STATE].copy_(state)
        graph.run()
        return graph.outputs[ACTIONS]

    def _copy_in(self, cache: PrefixCache, sample: int) -> _Slots:
        """One sample of another engine's cache into static tensors that hold as many tokens."""
        visible = cache.visible[sample]
        rows = int(cache.lengths[sample])
        if int(visible.sum()) != rows:
            raise ValueError(
                f"the PrefixCache has {int(visible.sum())} valid tokens but the length {rows}: exported graphs keep no "
                "mask, so both must agree; use the engine 'eager' for such a cache"
            )
        image = self.config.vision.tokens
        # To stage 3 rows of cameras and of the prompt are the same: any graph with enough of them will do.
        views = self._graphs.views or max(1, -(-(rows - max(self._graphs.buckets)) // image))
        slots = self._slots_for(views, bucket_for(self._graphs.buckets, max(0, rows - views * image)))
        for name, layer in zip(cache_names(self.config), (*cache.keys, *cache.values), strict=True):
            slots.prefill.outputs[name][0, :, :rows].copy_(layer[sample][:, visible])
        slots.prefill.outputs[PREFIX_LENGTH].fill_(rows)
        slots.generation += 1
        return slots

    # Whole ticks

    @torch.no_grad()
    def sample_actions(self, input: ModelInput, noise: Tensor, steps: int) -> Tensor:  # noqa: A002
        """All three stages; see `TickEngine`."""
        input.check_shapes(self.config)
        _require_samples(input.tokens)
        check_noise(noise, len(input.tokens), self.config)
        actions = []
        for sample in range(len(input.tokens)):
            tokens = self._encode(input.images[sample], input.image_mask[sample])
            slots = self._prefill(tokens, input.tokens[sample], input.token_mask[sample])
            one = slice(sample, sample + 1)
            actions.append(self._denoise(slots, input.state[one], noise[one], steps).cpu().clone())
        result = torch.cat(actions)
        if not bool(torch.isfinite(result).all()):
            raise NonFiniteActionsError(
                "the exported graphs computed NaN or infinite actions; check the weights and inputs"
            )
        return result

    def describe(self) -> dict[str, Any]:
        """See `TickEngine`."""
        return {**self._runner.describe(), "graphs": self._graphs.describe()}

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _require_samples(batch: Tensor) -> None:
    if len(batch) == 0:
        raise InputError("the batch holds no samples; give at least one")


def _views(present: Tensor) -> int:
    """How many cameras are there. Raises InputError for none, which no graph is written for."""
    views = int(present.sum())
    if views == 0:
        raise InputError("no camera is there: the exported graphs need at least one; use the engine 'eager'")
    return views


def _copy(cache: PrefixCache) -> PrefixCache:
    keys, values = (tuple(layer.clone() for layer in layers) for layers in (cache.keys, cache.values))
    return PrefixCache(keys, values, cache.lengths, None)


def _stack(caches: list[PrefixCache]) -> PrefixCache:
    """Caches of one sample each as a batch, the shorter ones masked behind their end."""
    lengths = torch.cat([cache.lengths for cache in caches])
    longest = int(lengths.max())

    def padded(layers: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, 0, 0, longest - t.shape[2])) for t in layers])

    keys = tuple(padded(layers) for layers in zip(*(cache.keys for cache in caches), strict=True))
    values = tuple(padded(layers) for layers in zip(*(cache.values for cache in caches), strict=True))
    valid = torch.arange(longest, device=lengths.device) < lengths[:, None]
    return PrefixCache(keys, values, lengths, None if bool(valid.all()) else valid)
