"""Two observations at a time: the prefix of the next one beside stage 3 of this one, on two streams.

For throughput, not for latency: an observation takes as long as ever, but the next one is begun before it is done.
Both halves use the same folded weights; each has buffers, graphs and scratch memory of its own, since what an engine
has captured must never run at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import NonFiniteActionsError
from ...model import ModelInput
from ..capture import CudaGraphRecorder
from .arena import Request
from .buckets import Bucket, token_buckets
from .buffers import Buffers
from .engine import TurboEngine
from .loops import LoopName


class _Lane:
    """A stream and what it has reached; on a CPU everything is done at once."""

    def __init__(self, device: torch.device, priority: int) -> None:
        self.stream = torch.cuda.Stream(device, priority=priority) if device.type == "cuda" else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is launched within goes to this stream."""
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """A point on the stream."""
        return None if self.stream is None else self.stream.record_event()

    def after(self, event: torch.cuda.Event | None) -> None:
        """What comes on this stream waits for a point on another."""
        if self.stream is not None and event is not None:
            self.stream.wait_event(event)


@dataclass(frozen=True, eq=False)
class _Pending:
    """An observation whose actions are on their way to `host` (actions, then 1.0 if they are finite)."""

    host: Tensor
    shape: torch.Size
    done: torch.cuda.Event | None


class OverlapPipeline:
    """Actions of one observation after the other, each returned when the next has been submitted.

    Args:
        engine: whose weights are used; its own buffers stay untouched.
        steps: flow-matching evaluations.
        first_loop: the first denoise loop that may run stage 3. The persistent one takes the whole GPU and leaves no
            room for a prefix beside it; "fused" and "rows" leave some and are slower.

    Not for use from two threads at once, and not beside ticks of other engines where the persistent loop runs.
    """

    def __init__(self, engine: TurboEngine, steps: int, *, first_loop: LoopName | None = None) -> None:
        self.steps = steps
        self.device = engine.device
        cuda = self.device.type == "cuda"
        self._front = engine.apart(CudaGraphRecorder(self.device) if cuda else None)
        self._back = engine.apart(CudaGraphRecorder(self.device) if cuda else None, first_loop=first_loop)
        self._prefix, self._denoise = _Lane(self.device, 0), _Lane(self.device, -1)
        self._uploaded: torch.cuda.Event | None = None
        self._taken: torch.cuda.Event | None = None
        self._pending: _Pending | None = None
        self._hosts: list[Tensor] = []
        self._count = 0

    @property
    def recorded(self) -> int:
        """Graphs of both halves; in a loop this stands still."""
        return int(self._front.describe()["graphs"]) + int(self._back.describe()["graphs"])

    @torch.no_grad()
    def warm_up(self, cameras: int, images: torch.dtype = torch.uint8) -> None:
        """Capture for one observation with prompts of any length and `cameras` valid cameras."""
        arena = self._front._arena(1)
        for tokens in reversed(token_buckets(self._front.config)):
            buffers = arena.buffers(Bucket(1, cameras, tokens))
            request = arena.request(buffers.bucket, images)
            for tensor in (request.device.images, request.device.tokens, request.device.first):
                tensor.zero_()
            request.device.lengths.fill_(buffers.rows)
            for stage in ("encode_images", "prefill"):
                self._front._graphs.ensure(*self._front._work(stage, request, buffers, 0))
        self._back.warm_up_again(cameras, self.steps)
        self._back.synchronize()

    @torch.no_grad()
    def submit(self, input: ModelInput, noise: Tensor) -> Tensor | None:  # noqa: A002
        """Begin an observation, and return the actions (B,H,32) of the one before it; None for the first.

        Raises InputError for what does not fit, NonFiniteActionsError where the actions hold NaN or infinite values.
        """
        if self._uploaded is not None:
            self._uploaded.synchronize()
        tick = self._front.place(input, noise, self.steps)
        with self._prefix.running():
            self._prefix.after(self._taken)
            tick.upload()
            self._uploaded = self._prefix.mark()
            tick.launch_stage("encode_images")
            tick.launch_stage("prefill")
            ready = self._prefix.mark()
        before, self._pending = self._pending, self._finish(tick.request, tick.buffers, ready)
        return None if before is None else self._read(before)

    def drain(self) -> Tensor | None:
        """The actions of the last observation, once."""
        last, self._pending = self._pending, None
        return None if last is None else self._read(last)

    def _finish(self, request: Request, front: Buffers, ready: torch.cuda.Event | None) -> _Pending:
        """Take the prefix over, and start stage 3 on it."""
        arena = self._back._arena(front.bucket.batch)
        buffers, own = arena.buffers(front.bucket), arena.request(front.bucket, torch.uint8)
        self._back._next_generation(front.bucket.batch)
        host = self._host(buffers.outcome)
        with self._denoise.running():
            self._denoise.after(ready)
            buffers.prefill.keys.copy_(front.prefill.keys)
            buffers.prefill.values.copy_(front.prefill.values)
            for name in ("lengths", "state", "noise"):
                getattr(own.device, name).copy_(getattr(request.device, name))
            self._taken = self._denoise.mark()
            self._back._run("denoise", own, buffers, self.steps)
            host.copy_(buffers.outcome, non_blocking=True)
            return _Pending(host, request.host.noise.shape, self._denoise.mark())

    def _host(self, outcome: Tensor) -> Tensor:
        """One of two places for outcomes: one is read while the other is written."""
        if not self._hosts or self._hosts[0].shape != outcome.shape:
            pinned = self.device.type == "cuda"
            self._hosts = [torch.zeros(outcome.shape, pin_memory=pinned) for _ in range(2)]
        self._count += 1
        return self._hosts[self._count % 2]

    def _read(self, pending: _Pending) -> Tensor:
        if pending.done is not None:
            pending.done.synchronize()
        if not float(pending.host[-1]):
            raise NonFiniteActionsError("the overlapped engine 'turbo' computed NaN or infinite actions")
        return pending.host[:-1].view(pending.shape).clone()
