"""Stages of several engines in one: "vision=onnx,prefill=turbo,denoise=turbo", and what handing over costs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteActionsError
from ..model import ModelInput, Pi0, PrefixCache
from ..quant import Quantisation
from .base import STAGES, DescribedEngine, Engine, Precision, TickEngine, create_engine, register_family
from .reuse import HoldingEngine, LentCache

T = TypeVar("T")
NAMES = {"vision": "encode_images", "encode_images": "encode_images", "prefill": "prefill", "denoise": "denoise"}
"""Stages by the names that they may be given."""
KEPT = 1000
"""Hand-overs whose times are kept."""


def parse_stages(name: str) -> dict[str, str]:
    """The engine of every stage, by "vision=ENGINE,prefill=ENGINE,denoise=ENGINE".

    Raises ValueError unless each stage is named once.
    """
    chosen: dict[str, str] = {}
    for part in name.split(","):
        stage, _, engine = part.partition("=")
        known = NAMES.get(stage.strip())
        if known is None or known in chosen or not engine:
            raise ValueError(
                f"{name!r} does not give each stage one engine; write it like 'vision=onnx,prefill=turbo,denoise=turbo'"
            )
        chosen[known] = engine.strip()
    missing = [stage for stage in STAGES if stage not in chosen]
    if missing:
        raise ValueError(f"{name!r} names no engine for {', '.join(missing)}; every stage needs one")
    return {stage: chosen[stage] for stage in STAGES}


@register_family("=")
def create_mixed(name: str, model: Pi0, precision: Precision, quantisation: Quantisation | None = None) -> MixedEngine:
    """Stages of several engines over one model; stages of the same name share an engine.

    Raises ValueError for a name that cannot be read, and whatever the engines raise.
    """
    stages = parse_stages(name)
    made = {engine: create_engine(engine, model, precision, quantisation) for engine in dict.fromkeys(stages.values())}
    types = {"image_tokens": model.projector.weight.dtype, "cache": model.vlm.dtype}
    return MixedEngine(name, {stage: made[engine] for stage, engine in stages.items()}, precision, types)


class MixedEngine:
    """Runs each stage on its own engine. What passes between two of them takes the reference's type and device.

    Each hand-over is timed, with the device waited for on both sides; `describe` tells the medians. Copying into an
    engine's static memory is part of its own stage.

    Args:
        name: as it was given.
        engines: by stage.
        precision: of all.
        types: of what the reference hands over: "image_tokens" and "cache".
    """

    accepts_uint8 = False

    def __init__(
        self, name: str, engines: Mapping[str, Engine], precision: Precision, types: Mapping[str, torch.dtype]
    ) -> None:
        self.name = name
        self.precision = precision
        self.engines = dict(engines)
        first = self.engines[STAGES[0]]
        self.config = first.config
        self.device = first.device
        self._types = dict(types)
        self._handed: dict[str, deque[float]] = {}

    def _hand_over(self, source: str, target: str, convert: Callable[[], T]) -> T:
        """The converted value, and the time that it took; only between engines that differ."""
        self.engines[source].synchronize()
        start = time.perf_counter()
        value = convert()
        self.engines[target].synchronize()
        times = self._handed.setdefault(f"{source} to {target}", deque(maxlen=KEPT))
        times.append(1e3 * (time.perf_counter() - start))
        return value

    def encode_images(self, images: Tensor, image_mask: Tensor) -> Tensor:
        """Stage 1; see `Engine`."""
        return self.engines["encode_images"].encode_images(images, image_mask)

    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Stage 2; see `Engine`."""
        engine, given = self.engines["prefill"], image_tokens
        if engine is not self.engines["encode_images"]:
            given = self._hand_over(
                "encode_images", "prefill", lambda: image_tokens.to(engine.device, self._types["image_tokens"])
            )
        return engine.prefill(given, image_mask, tokens, token_mask)

    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Stage 3; see `Engine`. Raises RuntimeError if something was computed over the cache since it was made."""
        engine, source = self.engines["denoise"], self.engines["prefill"]
        if engine is not source:
            if isinstance(cache, LentCache) and isinstance(source, HoldingEngine) and not source.holds(cache):
                raise RuntimeError(
                    f"the engine {source.name!r} does not hold this PrefixCache as it was made: something was computed "
                    "over it, or it was changed; run denoise first, or clone its tensors into a PrefixCache to keep "
                    "them"
                )
            cache = self._hand_over("prefill", "denoise", lambda: self._converted(cache, engine.device))
        return engine.denoise(cache, state, noise, steps)

    def _converted(self, cache: PrefixCache, device: torch.device) -> PrefixCache:
        """The same values as a plain cache in the reference's type."""
        keys, values = (
            tuple(layer.to(device, self._types["cache"]) for layer in layers) for layers in (cache.keys, cache.values)
        )
        valid = None if cache.valid is None else cache.valid.to(device)
        return PrefixCache(keys, values, cache.lengths.to(device), valid)

    def sample_actions(self, input: ModelInput, noise: Tensor, steps: int) -> Tensor:  # noqa: A002
        """All three stages; see `TickEngine`."""
        tokens = self.encode_images(input.images, input.image_mask)
        cache = self.prefill(tokens, input.image_mask, input.tokens, input.token_mask)
        actions = self.denoise(cache, input.state, noise, steps).cpu()
        if not bool(torch.isfinite(actions).all()):
            raise NonFiniteActionsError(f"the engines {self.name} computed NaN or infinite actions")
        return actions

    def warm_up(self, cameras: int, steps: int, batch: int = 1, images: torch.dtype = torch.float32) -> None:
        """Warm up the engines that can; see `TickEngine`."""
        for engine in dict.fromkeys(self.engines.values()):
            if isinstance(engine, TickEngine):
                engine.warm_up(cameras, steps, batch, torch.float32)

    def describe(self) -> dict[str, Any]:
        """See `TickEngine`."""
        engines = dict.fromkeys(self.engines.values())
        return {
            "stages": {stage: engine.name for stage, engine in self.engines.items()},
            "engines": {e.name: e.describe() for e in engines if isinstance(e, DescribedEngine)},
            "hand_over_ms": {
                place: {"median": float(np.median(times)), "max": max(times), "count": len(times)}
                for place, times in self._handed.items()
            },
        }

    def synchronize(self) -> None:
        """Wait for the GPU."""
        for engine in dict.fromkeys(self.engines.values()):
            engine.synchronize()
