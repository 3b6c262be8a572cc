"""The turbo engine: the three stages over static buffers, each stage and the whole tick a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...config import ModelConfig
from ...model import ModelInput, Pi0, PrefixCache
from ...quant import Quantisation
from ...quant.fp8 import fp8_details
from ..base import Precision, register_engine
from ..capture import CudaGraphRecorder, Recorder
from ..stage_inputs import check_images, check_stage_input, check_state_and_noise
from .again import Again, Placed, SteeringBuffers
from .arena import Arena, Request
from .buckets import Bucket, Layout, camera_places, lay_out, token_buckets
from .buffers import Buffers, RequestBuffers
from .cache import TurboCache, hand_out
from .checks import PRECISIONS, check_device, check_model, check_quantisation, too_large
from .denoise import DenoiseLoop, Schedules, note_finite
from .graphs import GraphSet, ieee_float32
from .loops import LoopName, make_loop, told
from .ops import Ops, triton_ops
from .prefill import attention_obstacles, prefill
from .tick import CallClock, Tick, check_request_noise, write_request
from .tiled_vision import VisionStage
from .weights import fold_model


class TurboEngine(Again):
    """π0 and π0.5 through fused kernels, cuBLAS and CUDA graphs. Equal to the reference within rounding.

    A request goes into the smallest bucket (batch, valid cameras, prompt length in steps of 16) that holds it. A
    bucket's graphs are captured at `warm_up` or when it is first seen; within a bucket nothing is captured, allocated
    or waited for until the actions are read. Not for use from two threads at once.

    Args:
        model: the reference on its device. It is only read, shares its token embedding, and must not move.
        precision: "bf16", "fp8" as the quantisation says, or "fp32" for audits.
        ops: what to launch.
        recorder: what captures; None launches everything anew each time, on any device.
        schedules: of the model, by number of steps; None folds them as they are asked for. An audit gives its own.
        quantisation: for "fp8", its plan and calibration.

    Raises:
        ValueError: a model, plan or calibration that the kernels cannot run; names what can.
        RuntimeError: too little GPU memory.
    """

    name = "turbo"
    accepts_uint8 = True

    def __init__(
        self,
        model: Pi0,
        precision: Precision,
        ops: Ops,
        recorder: Recorder | None,
        schedules: Schedules | None = None,
        quantisation: Quantisation | None = None,
    ) -> None:
        check_model(model, precision)
        check_quantisation(model, precision, quantisation)
        self._details = {} if quantisation is None else fp8_details(model.config, quantisation)
        self.precision = precision
        self.config: ModelConfig = model.config
        self.device = next(model.parameters()).device
        self._ops = ops
        try:
            with ieee_float32():
                self._weights = fold_model(model, quantisation)
        except torch.OutOfMemoryError as error:
            raise too_large("the folded weights", error) from error
        self._schedules = schedules or Schedules(model)
        self._stage_1 = VisionStage(self.config.vision, self._weights.vision)
        self._graphs = GraphSet(recorder)
        self._loops: dict[int, DenoiseLoop] = {}
        self._arenas: dict[int, Arena] = {}
        self._generations: dict[int, int] = {}
        self._placed: dict[int, Placed] = {}
        self._steering: dict[int, SteeringBuffers] = {}
        self._first_loop: LoopName = "persistent"
        self._clock: CallClock | None = None

    def observed(self, wrap: Callable[[Ops], Ops]) -> TurboEngine:
        """An engine over the same weights that launches `wrap(ops)` one by one: for audits.

        Its buffers are its own, it captures nothing, and its stages 1 and 3 are those that go kernel by kernel.
        """
        other = self.apart(None, first_loop="rows")
        other._ops, other._stage_1 = wrap(self._ops), self._stage_1.watched()
        return other

    def apart(self, recorder: Recorder | None, *, first_loop: LoopName | None = None) -> TurboEngine:
        """An engine over the same weights, with buffers and graphs of its own.

        `first_loop`: the first denoise loop that may run, see `loops.make_loop`. None: as here.
        """
        other = copy.copy(self)
        other._graphs, other._first_loop = GraphSet(recorder), first_loop or self._first_loop
        other._clock = None
        other._loops, other._arenas, other._generations, other._placed, other._steering = {}, {}, {}, {}, {}
        return other

    def beside(self, ops: Ops, recorder: Recorder | None) -> TurboEngine:
        """An engine over the same weights and buffers: each takes up what the other has left in them."""
        other = copy.copy(self)
        other._ops, other._graphs, other._loops = ops, GraphSet(recorder), {}
        return other

    # Parts that are made once

    def _on_device(self) -> AbstractContextManager[object]:
        """Kernels go to the current device's stream, which in a server's thread need not be this one's."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _arena(self, batch: int) -> Arena:
        if batch not in self._arenas:
            try:
                self._arenas[batch] = Arena(self.config, batch, self._weights)
            except torch.OutOfMemoryError as error:
                raise too_large(f"the buffers for a batch of {batch}", error) from error
        return self._arenas[batch]

    def _loop(self, batch: int) -> DenoiseLoop:
        """Which loop runs a batch. A fixed rule, told by `describe`: what one loop cannot run is never tried on it."""
        if batch not in self._loops:
            parts = self.config, self._weights, self._ops, self._schedules
            with torch.no_grad():
                self._loops[batch] = make_loop(*parts, batch, self._first_loop)
        return self._loops[batch]

    def _next_generation(self, batch: int) -> int:
        """What earlier caches of this batch size showed is about to be overwritten."""
        self._generations[batch] = self._generations.get(batch, 0) + 1
        return self._generations[batch]

    # The work of each stage

    def _vision(self, request: RequestBuffers, buffers: Buffers) -> None:
        self._stage_1.run(self._ops, request.images, buffers.vision)

    def _prefill(self, request: RequestBuffers, buffers: Buffers) -> None:
        prefill(self.config, self._weights, self._ops, request, buffers)

    def _denoise(self, request: RequestBuffers, buffers: Buffers, steps: int) -> None:
        self._loop(buffers.bucket.batch).run(request, buffers, steps)
        note_finite(buffers)

    def _tick(self, request: RequestBuffers, buffers: Buffers, steps: int) -> None:
        self._vision(request, buffers)
        self._prefill(request, buffers)
        self._denoise(request, buffers, steps)

    def _call(self, request: Request, buffers: Buffers, steps: int) -> None:
        """A tick from pinned memory to pinned memory, so that a call starts one thing and waits for it."""
        arena = self._arena(buffers.bucket.batch)
        with self._clock.running() if self._clock is not None else nullcontext():
            arena.upload(request)
            self._tick(request.device, buffers, steps)
            arena.fetch()

    def _work(self, stage: str, request: Request, buffers: Buffers, steps: int) -> tuple[object, Callable[[], None]]:
        """The key of a stage's graph, of the whole "tick"'s or, with its copies, the "call"'s, and what it launches."""
        bucket, inputs = buffers.bucket, request.device
        images = inputs.images.dtype
        if stage == "encode_images":
            # The prompt's bucket decides where the images lie.
            return (stage, bucket, images), partial(self._vision, inputs, buffers)
        if stage == "prefill":
            return (stage, bucket), partial(self._prefill, inputs, buffers)
        self._loop(bucket.batch).prepare(steps)
        if stage == "denoise":
            return (stage, bucket, steps), partial(self._denoise, inputs, buffers, steps)
        if stage == "call":
            return (stage, bucket, images, steps, self._clock is None), partial(self._call, request, buffers, steps)
        return (stage, bucket, images, steps), partial(self._tick, inputs, buffers, steps)

    def _run(self, stage: str, request: Request, buffers: Buffers, steps: int = 0) -> None:
        key, work = self._work(stage, request, buffers, steps)
        if not self._graphs.replay(key):
            with self._on_device():
                self._graphs.run(key, work)

    # A whole tick

    def sample_actions(self, input: ModelInput, noise: Tensor, steps: int) -> Tensor:  # noqa: A002
        """See `TickEngine`. The input should be on the CPU; earlier PrefixCaches of this batch size are gone after it.

        Raises InputError for shapes and dtypes that do not fit, and for a prompt of more than `max_tokens`.
        """
        tick = self.place(input, noise, steps)
        tick.start()
        return tick.read()

    def place(self, input: ModelInput, noise: Tensor, steps: int) -> Tick:  # noqa: A002
        """Write a request into its bucket's pinned memory. The next `place` of the batch size writes over it.

        Raises InputError as `sample_actions`, and ValueError for less than one step; the engine is then as it was.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        input.check_shapes(self.config, uint8_images=True)
        batch = input.tokens.shape[0]
        check_request_noise(noise, batch, self.config)
        arena = self._arena(batch)
        layout = lay_out(self.config, input.image_mask, input.tokens, input.token_mask)
        request = arena.request(layout.bucket, input.images.dtype)
        write_request(request.arrays, layout, input, noise)
        buffers = arena.buffers(layout.bucket)
        placed = Placed(buffers, layout.lengths, self._next_generation(batch))
        return self._tick_of(request, buffers, steps, placed)

    def _tick_of(self, request: Request, buffers: Buffers, steps: int, placed: Placed | None = None) -> Tick:
        return Tick(self, self._arena(buffers.bucket.batch), request, buffers, steps, placed)

    @torch.no_grad()
    def warm_up(self, cameras: int, steps: int, batch: int = 1, images: torch.dtype = torch.uint8) -> None:
        """Capture the whole tick of every prompt bucket for `cameras` valid cameras and images of one dtype."""
        arena = self._arena(batch)
        self._next_generation(batch)
        for tokens in reversed(token_buckets(self.config)):
            buffers = arena.buffers(Bucket(batch, cameras, tokens))
            request = arena.request(buffers.bucket, images)
            _write_blank(request.host, buffers.rows)
            with self._on_device():
                self._graphs.ensure(*self._work("call", request, buffers, steps))
        self.synchronize()

    def describe(self) -> dict[str, Any]:
        """See `TickEngine`."""
        return {
            "ops": self._ops.name,
            **told(self.config, self._weights, self._loops),
            "vision": self._stage_1.told(),
            "prefix_attention": "; ".join(attention_obstacles(self.config, self._weights)) or "wgmma",
            "prefix_gate_up": "; ".join(self._weights.untiled) or "tiled",
            "graphs": self._graphs.recorded,
            "weight_bytes": self._weights.bytes_by_format(),
            **self._details,
        }

    # The stages one at a time

    @torch.no_grad()
    def encode_images(self, images: Tensor, image_mask: Tensor) -> Tensor:
        """Stage 1; see `Engine`. Images may be uint8. Missing cameras are not computed: their tokens are zeros."""
        places, most = camera_places(image_mask)
        batch = len(places)
        check_images(self.config, images, batch, uint8=True)
        arena = self._arena(batch)
        buffers = arena.buffers(Bucket(batch, most, token_buckets(self.config)[0]))
        request = arena.request(buffers.bucket, images.dtype)
        for sample, place, camera in _placed(places):
            request.device.images[sample, place].copy_(images[sample, camera], non_blocking=True)
        self._run("encode_images", request, buffers)
        by_camera = (self.config.vision.tokens, self.config.vlm.width)
        encoded = buffers.vision.image_tokens.view(batch, most, *by_camera)
        tokens = encoded.new_zeros(batch, self.config.cameras, *by_camera)
        for sample, place, camera in _placed(places):
            tokens[sample, camera].copy_(encoded[sample, place])
        return tokens

    @torch.no_grad()
    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> TurboCache:
        """Stage 2; see `Engine`. The cache is valid as `TurboCache` says.

        Raises InputError for a prompt of more than `max_tokens`.
        """
        layout = lay_out(self.config, image_mask, tokens, token_mask)
        batch, by_camera = layout.bucket.batch, (self.config.vision.tokens, self.config.vlm.width)
        shape = (batch, self.config.cameras, *by_camera)
        check_stage_input("image_tokens", image_tokens, shape, (self._weights.dtype, self._weights.vision_dtype))
        arena = self._arena(batch)
        generation = self._next_generation(batch)
        buffers = arena.buffers(layout.bucket)
        request = arena.request(layout.bucket, torch.float32)
        static = buffers.vision.image_tokens.view(batch, layout.bucket.cameras, *by_camera)
        for sample, place, camera in _placed(layout.places):
            static[sample, place].copy_(image_tokens[sample, camera])
        _write_prompt(request.device, layout)
        self._run("prefill", request, buffers)
        return hand_out(arena, buffers, layout.lengths, generation)

    @torch.no_grad()
    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Stage 3; see `Engine`. Its own latest cache is used in place, one from elsewhere is copied in.

        Raises:
            RuntimeError: something was computed over this cache since; see `TurboCache`.
            ValueError: a cache from elsewhere whose lengths are not its number of valid tokens, or that is too long.
        """
        batch = len(cache.lengths)
        check_state_and_noise(self.config, state, noise, batch)
        arena = self._arena(batch)
        buffers = self._buffers_with(cache)
        request = arena.request(buffers.bucket, torch.float32)
        request.device.lengths.copy_(cache.lengths)
        request.device.state.copy_(state)
        request.device.noise.copy_(noise)
        self._run("denoise", request, buffers, steps)
        return buffers.denoise.x_t.view(noise.shape).clone()

    def time_calls(self) -> bool:
        """See `TimedEngine`: the graphs of calls are captured anew, with two events more."""
        if self.device.type == "cuda" and self._clock is None:
            self._clock = CallClock()
        return self._clock is not None

    def call_ms(self) -> float:
        """See `TimedEngine`. Raises RuntimeError without `time_calls`."""
        if self._clock is None:
            raise RuntimeError("calls are not timed; call time_calls() first, and then sample_actions")
        return self._clock.read()

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _placed(places: list[list[int]]) -> list[tuple[int, int, int]]:
    """(sample, place, camera) of every valid camera."""
    return [(sample, place, camera) for sample, row in enumerate(places) for place, camera in enumerate(row)]


def _write_prompt(request: RequestBuffers, layout: Layout) -> None:
    for to, packed in (
        (request.lengths, layout.lengths),
        (request.first, layout.first),
        (request.tokens, layout.prompt),
    ):
        to.copy_(torch.from_numpy(packed))


def _write_blank(request: RequestBuffers, rows: int) -> None:
    """Zeros of full length, to capture with: an attention over nothing would be a division by zero."""
    for tensor in (request.first, request.tokens, request.state, request.noise, request.images):
        tensor.zero_()
    request.lengths.fill_(rows)


@register_engine("turbo", PRECISIONS)
def create_turbo(model: Pi0, precision: Precision, quantisation: Quantisation | None = None) -> TurboEngine:
    """On the model's GPU, with kernels and graphs."""
    device = next(model.parameters()).device
    check_device(device, precision)
    recorder = CudaGraphRecorder(device)
    return TurboEngine(model, precision, triton_ops(), recorder, quantisation=quantisation)
