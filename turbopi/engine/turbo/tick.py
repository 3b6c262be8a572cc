"""One request of the turbo engine: written on the host, started, waited for; and what the device needs for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...config import ModelConfig
from ...errors import NonFiniteActionsError
from ...model import ModelInput
from ...model.inputs import check_noise
from ..base import STAGES
from .arena import Arena, Request
from .buckets import Bucket, Layout, host_array
from .buffers import Buffers

if TYPE_CHECKING:
    from .again import Placed
    from .engine import TurboEngine


class Tick:
    """One request in its bucket. A call is `start` and `read`; upload, launch and read are it in parts, to be timed."""

    def __init__(
        self,
        engine: TurboEngine,
        arena: Arena,
        request: Request,
        buffers: Buffers,
        steps: int,
        placed: Placed | None = None,
    ) -> None:
        self._engine, self._arena, self.request, self.buffers = engine, arena, request, buffers
        self.steps = steps
        self._placed = placed
        self._fetched = False

    @property
    def bucket(self) -> Bucket:
        """Where the request was put."""
        return self.buffers.bucket

    def start(self) -> None:
        """Start everything, from the copy of the inputs to that of the actions; the first of a bucket captures it."""
        self._engine._run("call", self.request, self.buffers, self.steps)
        self._note_cache()
        self._fetched = True

    def upload(self) -> None:
        """Start the copy of the inputs to the device alone."""
        self._arena.upload(self.request)

    def launch(self) -> None:
        """Start the computation alone; the first of a bucket captures it."""
        self._engine._run("tick", self.request, self.buffers, self.steps)
        self._note_cache()
        self._fetched = False

    def _note_cache(self) -> None:
        """Only now the buffers hold this request's keys: one that failed has left another's, or parts of both."""
        if self._placed is not None:
            self._engine._placed[self.bucket.batch] = self._placed

    def launch_stage(self, stage: str) -> None:
        """Start one of `STAGES` alone. Raises ValueError for another name."""
        if stage not in STAGES:
            raise ValueError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}")
        self._engine._run(stage, self.request, self.buffers, self.steps)
        self._fetched = False

    def read(self) -> Tensor:
        """Wait, and return the actions (B,H,32) float32 on the CPU.

        Raises NonFiniteActionsError where they hold NaN or infinite values.
        """
        if not self._fetched:
            self._arena.fetch()
        if self._engine.device.type == "cuda":
            torch.cuda.current_stream(self._engine.device).synchronize()
        outcome = self._arena.outcome
        if not outcome[-1]:
            raise NonFiniteActionsError(
                f"the engine 'turbo' in {self._engine.precision} computed NaN or infinite actions; check the weights "
                "(`turbo-pi doctor`), and whether the engine 'eager' in fp32 computes the same"
            )
        return torch.from_numpy(outcome[:-1].reshape(self.request.arrays["noise"].shape).copy())


class CallClock:
    """The device's time of whole calls: two events in the call's graph, before and behind everything else in it.

    Beside the graph, on the stream, they would count how late the host starts it as well.
    """

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is put into the queue within is timed."""
        self._begin.record()
        yield
        self._end.record()

    def read(self) -> float:
        """Milliseconds of the latest call, which must be over."""
        return self._begin.elapsed_time(self._end)


def check_request_noise(noise: Tensor, batch: int, config: ModelConfig) -> None:
    """`check_noise`, at once where the noise is on the host and its squares have a finite sum."""
    right = noise.shape == (batch, config.horizon, config.action_dim) and noise.dtype == torch.float32
    if right and noise.is_cpu:
        flat = host_array(noise).reshape(-1)
        if math.isfinite(np.dot(flat, flat)):
            return
    check_noise(noise, batch, config)


def write_request(to: Mapping[str, np.ndarray], layout: Layout, values: ModelInput, noise: Tensor) -> None:
    """A request into its arrays. Places without a camera are zeroed: what lay there may not be a number."""
    to["lengths"][:], to["first"][:], to["tokens"][:] = layout.lengths, layout.first, layout.prompt
    to["state"][:], to["noise"][:] = host_array(values.state), host_array(noise)
    images, into = host_array(values.images), to["images"]
    for sample, row in enumerate(layout.places):
        count = len(row)
        into[sample, count:] = 0
        if row == list(range(count)):
            into[sample, :count] = images[sample, :count]
            continue
        for place, camera in enumerate(row):
            into[sample, place] = images[sample, camera]
