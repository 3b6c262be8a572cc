"""Buckets: the shapes for which buffers are laid out and graphs captured, and how a request is put into one.

Valid tokens stand first in each sample. A request goes into the smallest bucket that holds it; how many tokens are
really valid is a number on the device, so that a prompt that grows within its bucket changes no shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ...config import ModelConfig
from ...errors import InputError

TOKEN_STEP = 16


@dataclass(frozen=True, order=True)
class Bucket:
    """A batch of samples with at most `cameras` cameras and `tokens` prompt tokens each."""

    batch: int
    cameras: int
    tokens: int

    def rows(self, config: ModelConfig) -> int:
        """Prefix rows of one sample, P."""
        return self.cameras * config.vision.tokens + self.tokens


def token_buckets(config: ModelConfig) -> tuple[int, ...]:
    """Prompt lengths for which there are buckets: multiples of 16, and the longest."""
    return (*range(TOKEN_STEP, config.max_tokens, TOKEN_STEP), config.max_tokens)


def token_bucket(config: ModelConfig, tokens: int) -> int:
    """The smallest of `token_buckets` that holds a prompt."""
    return min(max(1, -(-tokens // TOKEN_STEP)) * TOKEN_STEP, config.max_tokens)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where a request's valid cameras and tokens go; decided on the host.

    Attributes:
        bucket: the smallest that fits.
        places: of each sample, its valid cameras in order; the k-th stands at place k.
        first: (B,) int32, the row at which the prompt starts.
        prompt: (B, bucket.tokens) int64, the valid token ids, then 0.
        lengths: (B,) int32, valid prefix tokens.
    """

    bucket: Bucket
    places: list[list[int]]
    first: np.ndarray
    prompt: np.ndarray
    lengths: np.ndarray


def host_array(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory on the host, else a copy. Here numpy takes a fraction of the time that torch takes."""
    return tensor.numpy() if tensor.is_cpu and not tensor.requires_grad else tensor.numpy(force=True)


def camera_places(image_mask: Tensor) -> tuple[list[list[int]], int]:
    """(B,cameras) bool -> the valid cameras of each sample in order, and how many the richest sample has.

    Raises InputError for a batch of no samples.
    """
    rows = host_array(image_mask).tolist()
    if not rows:
        raise InputError("the batch holds no samples; the turbo engine needs at least one")
    places = [[camera for camera, valid in enumerate(row) if valid] for row in rows]
    return places, max(map(len, places))


def lay_out(config: ModelConfig, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> Layout:
    """Find the bucket of a request and pack its prompts. Masks on the GPU are waited for.

    Raises InputError if a prompt has more valid tokens than the model's `max_tokens`.
    """
    places, most = camera_places(image_mask)
    # Row by row: for one sample half the time of numpy's ways along an axis, and it stands in every tick.
    mask, ids = host_array(token_mask), host_array(tokens)
    prompts = [row.compress(valid) for row, valid in zip(ids, mask, strict=True)]
    counts = [len(row) for row in prompts]
    longest = max(counts)
    if longest > config.max_tokens:
        raise InputError(
            f"a prompt has {longest} tokens, the turbo engine holds at most max_tokens = {config.max_tokens}; "
            "shorten it, or use the engine 'eager'"
        )
    bucket = Bucket(len(ids), most, token_bucket(config, longest))
    prompt = np.zeros((bucket.batch, bucket.tokens), np.int64)
    for into, row in zip(prompt, prompts, strict=True):
        into[: len(row)] = row
    first = np.array([len(row) * config.vision.tokens for row in places], np.int32)
    return Layout(bucket, places, first, prompt, first + np.array(counts, np.int32))


def bucket_for_rows(config: ModelConfig, batch: int, rows: int) -> Bucket:
    """The smallest bucket whose prefix holds `rows` rows a sample.

    Raises ValueError if there is none.
    """
    found = [
        bucket
        for cameras in range(config.cameras + 1)
        for tokens in token_buckets(config)
        if (bucket := Bucket(batch, cameras, tokens)).rows(config) >= rows
    ]
    if not found:
        raise ValueError(
            f"the PrefixCache holds {rows} tokens, the turbo engine at most {config.prefix_slots}; "
            "use the engine 'eager'"
        )
    return min(found, key=lambda bucket: bucket.rows(config))
