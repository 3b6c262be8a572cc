"""The memory of one batch size: storages as large as its largest bucket needs, and every bucket's views into them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...config import ModelConfig
from .buckets import Bucket
from .buffers import (
    Blob,
    Buffers,
    DenoiseBuffers,
    PrefillBuffers,
    RequestBuffers,
    Spec,
    VisionBuffers,
    blob_size,
    build,
    denoise_specs,
    prefill_specs,
    request_specs,
    vision_specs,
)
from .weights import TurboWeights

Layers = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Request:
    """A bucket's inputs, on the device and where the host writes them.

    Attributes:
        device: what the kernels read.
        host: the same tensors in pinned memory.
        arrays: those of the host by name: torch would wake all its threads for 150 KB, which takes longer.
        size: bytes that both take.
    """

    device: RequestBuffers
    host: RequestBuffers
    arrays: dict[str, np.ndarray]
    size: int


class Arena:
    """Buffers of all buckets of one batch size, as the weights want them. They overlap: one bucket at a time.

    `outcome` is what `fetch` brings to the host: the actions one after the other, then 1.0 if all of them are finite.

    Raises torch.OutOfMemoryError where the device has not enough memory.
    """

    def __init__(self, config: ModelConfig, batch: int, weights: TurboWeights) -> None:
        device = weights.device
        self.config = config
        self.dtype, self.vision_dtype, self.device = weights.dtype, weights.vision_dtype, device
        self.fp8, self.tiled = weights.has_fp8, not weights.untiled
        self._buffers: dict[Bucket, Buffers] = {}
        self._cut: dict[tuple[Bucket, int], tuple[Layers, Layers]] = {}
        self._requests: dict[tuple[Bucket, torch.dtype], Request] = {}
        self._flat: dict[str, Tensor] = {}
        largest = Bucket(batch, config.cameras, config.max_tokens)
        request = blob_size(request_specs(config, largest, torch.float32))
        self._request = Blob(request, device)
        self._staging = Blob(request, torch.device("cpu"), pinned=device.type == "cuda")
        actions = batch * config.horizon * config.action_dim
        self._outcome = torch.zeros(actions + 1, device=device)
        self._host_outcome = torch.zeros(actions + 1, pin_memory=device.type == "cuda")
        self.outcome = self._host_outcome.numpy()
        self.buffers(largest)

    def buffers(self, bucket: Bucket) -> Buffers:
        """The views of one bucket."""
        if bucket not in self._buffers:
            self._buffers[bucket] = self._lay_out(bucket)
        return self._buffers[bucket]

    def request(self, bucket: Bucket, image_dtype: torch.dtype) -> Request:
        """Where a bucket's inputs go; for uint8 and for float32 images all but the images are at the same place."""
        key = (bucket, image_dtype)
        if key not in self._requests:
            specs = request_specs(self.config, bucket, image_dtype)
            device, size = self._request.lay(specs)
            host, _ = self._staging.lay(specs)
            arrays = {name: tensor.numpy() for name, tensor in host.items()}
            self._requests[key] = Request(RequestBuffers(**device), RequestBuffers(**host), arrays, size)
        return self._requests[key]

    def cut(self, buffers: Buffers, rows: int) -> tuple[Layers, Layers]:
        """The first rows of a bucket's keys and values, layer by layer; made once, since a tick has better to do."""
        key = buffers.bucket, rows
        if key not in self._cut:
            keys, values = buffers.prefill.keys, buffers.prefill.values
            self._cut[key] = keys[:, :, :, :rows].unbind(), values[:, :, :, :rows].unbind()
        return self._cut[key]

    def upload(self, request: Request) -> None:
        """Start one copy of everything that the host wrote."""
        self._request.bytes[: request.size].copy_(self._staging.bytes[: request.size], non_blocking=True)

    def fetch(self) -> None:
        """Start the copy of the actions, and of whether they are finite, to `outcome`."""
        self._host_outcome.copy_(self._outcome, non_blocking=True)

    def _view(self, name: str, spec: Spec) -> Tensor:
        """The first elements of a storage; the largest bucket, laid out first, makes it."""
        shape, dtype = spec
        count = math.prod(shape)
        if name not in self._flat:
            self._flat[name] = torch.zeros(count, dtype=dtype, device=self.device)
        return self._flat[name][:count].view(shape)

    def _lay_out(self, bucket: Bucket) -> Buffers:
        config = self.config
        vision = vision_specs(config, bucket, self.vision_dtype, self.fp8)
        prefill = prefill_specs(config, bucket, self.dtype, self.fp8, self.tiled)
        denoise = denoise_specs(config, bucket, self.dtype, self.fp8)
        x_t = self._outcome[:-1].view(denoise["x_t"][0])
        return Buffers(
            bucket=bucket,
            rows=bucket.rows(config),
            vision=build(VisionBuffers, lambda name, spec: self._view(f"vision.{name}", spec), vision),
            prefill=build(PrefillBuffers, lambda name, spec: self._view(f"prefill.{name}", spec), prefill),
            denoise=build(
                DenoiseBuffers,
                lambda name, spec: x_t if name == "x_t" else self._view(f"denoise.{name}", spec),
                denoise,
            ),
            outcome=self._outcome,
            finite=self._outcome[-1:],
        )
