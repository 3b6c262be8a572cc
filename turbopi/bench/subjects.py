"""What is timed: an engine of ours, or somebody else's model, over the same observation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..engine import STAGES, DescribedEngine, Engine, TickEngine, TimedEngine, sample_actions
from ..model import ModelInput
from .workloads import as_uint8

Mark = Callable[[], None]


class Subject(Protocol):
    """Something that makes a chunk of actions of an observation.

    Attributes:
        name: for tables and receipts.
        stage_names: what `stages` marks, in order; empty if it cannot be taken apart.
    """

    name: str
    stage_names: tuple[str, ...]

    def warm_up(self) -> None:
        """Whatever a policy would have prepared when it was loaded."""

    def call(self) -> None:
        """The whole tick, from observation on the host to actions on the host."""

    def call_device_ms(self) -> float | None:
        """The device's own time of the latest `call`, where it was taken within it."""

    def split(self) -> dict[str, float]:
        """The whole tick again; milliseconds of its parts, as far as the subject lets them be told apart.

        Parts named "host ..." follow each other and add up to the call; those named "device ..." happen meanwhile.
        """

    def prepare(self) -> None:
        """Bring the observation to the device for `stages` and `graph`, which are not to count that."""

    def stages(self, mark: Mark) -> None:
        """One tick; `mark` after each stage, without waiting."""

    def graph(self) -> Callable[[], None] | None:
        """What launches the whole tick's one graph and nothing else, if there is one."""


class PlacedTick(Protocol):
    """A request that lies in an engine's own memory: `start` and `read` are a call, the others parts of it."""

    def start(self) -> None:
        """Start everything, copies included."""

    def upload(self) -> None:
        """Start the copy to the device."""

    def launch(self) -> None:
        """Start the whole tick."""

    def launch_stage(self, stage: str) -> None:
        """Start one stage."""

    def read(self) -> Tensor:
        """Wait, and return the actions."""


@runtime_checkable
class PlacingEngine(TickEngine, Protocol):
    """An engine whose whole tick can be taken apart into placing, starting and reading."""

    def place(self, input: ModelInput, noise: Tensor, steps: int) -> PlacedTick:  # noqa: A002
        """Write a request where the device will fetch it."""


class EngineSubject:
    """An engine, called as a policy calls it: in one piece if it can run a whole tick, else stage by stage.

    The observation is in pageable memory, with images as uint8 if the engine takes them so. Stages get it on the
    device, except the masks, which engines read on the host.
    """

    stage_names: tuple[str, ...] = STAGES

    def __init__(self, name: str, engine: Engine, inputs: ModelInput, noise: Tensor, steps: int) -> None:
        self.name = name
        self.engine = engine
        self.steps = steps
        self.noise = noise
        self.inputs = as_uint8(inputs) if isinstance(engine, TickEngine) and engine.accepts_uint8 else inputs
        self._tick: PlacedTick | None = None
        self._timed = engine if isinstance(engine, TimedEngine) and engine.time_calls() else None
        device = engine.device
        resident = {name: getattr(inputs, name).to(device) for name in ("images", "tokens", "state")}
        self._resident = dataclasses.replace(inputs, **resident)
        self._resident_noise = noise.to(device)

    def warm_up(self) -> None:
        """See `Subject`."""
        if isinstance(self.engine, TickEngine):
            cameras = int(self.inputs.image_mask[0].sum())
            batch = len(self.inputs.tokens)
            self.engine.warm_up(cameras, self.steps, batch, self.inputs.images.dtype)

    def call(self) -> None:
        """See `Subject`."""
        sample_actions(self.engine, self.inputs, self.noise, self.steps)

    def call_device_ms(self) -> float | None:
        """See `Subject`."""
        return None if self._timed is None else self._timed.call_ms()

    def split(self) -> dict[str, float]:
        """See `Subject`."""
        if isinstance(self.engine, PlacingEngine) and self.engine.device.type == "cuda":
            return self._split_placed(self.engine)
        start = time.perf_counter()
        if isinstance(self.engine, TickEngine):
            self.call()
            return {"host whole": 1e3 * (time.perf_counter() - start)}
        actions = self._compose(self.inputs, self.noise, lambda: None)
        asked = time.perf_counter()
        actions.cpu()
        return {"host ask": 1e3 * (asked - start), "host wait and read": 1e3 * (time.perf_counter() - asked)}

    def _split_placed(self, engine: PlacingEngine) -> dict[str, float]:
        times = [time.perf_counter()]
        tick = engine.place(self.inputs, self.noise, self.steps)
        times.append(time.perf_counter())
        tick.start()
        times.append(time.perf_counter())
        tick.read()
        times.append(time.perf_counter())
        names = ("host place", "host launch", "host wait and read")
        parts = {name: 1e3 * (b - a) for name, a, b in zip(names, times, times[1:], strict=False)}
        device_ms = self.call_device_ms()
        return parts if device_ms is None else parts | {"device whole": device_ms}

    def prepare(self) -> None:
        """See `Subject`."""
        if isinstance(self.engine, PlacingEngine):
            self._tick = self.engine.place(self.inputs, self.noise, self.steps)
            self._tick.upload()

    def stages(self, mark: Mark) -> None:
        """See `Subject`."""
        if self._tick is None:
            self._compose(self._resident, self._resident_noise, mark)
            return
        for stage in self.stage_names:
            self._tick.launch_stage(stage)
            mark()

    def graph(self) -> Callable[[], None] | None:
        """See `Subject`."""
        return None if self._tick is None else self._tick.launch

    def describe(self) -> dict[str, Any]:
        """What the engine says of itself."""
        return self.engine.describe() if isinstance(self.engine, DescribedEngine) else {}

    def _compose(self, inputs: ModelInput, noise: Tensor, mark: Mark) -> Tensor:
        engine = self.engine
        tokens = engine.encode_images(inputs.images, inputs.image_mask)
        mark()
        cache = engine.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
        mark()
        actions = engine.denoise(cache, inputs.state, noise, self.steps)
        mark()
        return actions


def transfer_tensors(inputs: ModelInput, noise: Tensor, device: torch.device) -> tuple[Callable[[], object], ...]:
    """The bare copies of a tick: everything to the device, and actions back, each of which waits for its end."""
    sources = (inputs.images, inputs.tokens, inputs.token_mask, inputs.image_mask, inputs.state, noise)
    targets = [source.to(device) for source in sources]

    def up() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    return up, lambda: targets[-1].cpu()
