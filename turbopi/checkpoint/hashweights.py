"""Test weights and inputs as a pure function of (seed, name, flat index), the same on every machine.

The golden fixtures were made with these values, so a 3.3-billion-parameter model needs no weight file to be checked:
a 32-bit integer hash of the element's index, keyed by the tensor's name and the seed, gives 24 uniform bits, which are
scaled so that activations stay of order one. All integer arithmetic is modulo 2^32, here in int32 (same low bits).
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor

from .names import Shape, to_openpi

CHUNKS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Elements made at a time: few enough for a CPU's caches, many enough to fill a GPU."""
_GOLDEN = 0x9E3779B1
_SEED_STEP = 0x9E3779B9


def _int32(value: int) -> int:
    """The int32 with the same 32 bits."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int32, which torch only shifts arithmetically."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def uniform(name: str, count: int, seed: int, start: int = 0, device: str | torch.device = "cpu") -> Tensor:
    """(count,) float32 in (-0.5, 0.5): elements `start` onwards of the stream of (seed, name)."""
    key = zlib.crc32(name.encode()) ^ (seed * _SEED_STEP & 0xFFFFFFFF)
    h = torch.arange(start, start + count, dtype=torch.int64, device=device).to(torch.int32)
    h = h * _int32(_GOLDEN) + _int32(key)
    # The finaliser of murmur3: two multiplications between three xor-shifts.
    h = (h ^ _shift_right(h, 16)) * _int32(0x85EBCA6B)
    h = (h ^ _shift_right(h, 13)) * _int32(0xC2B2AE35)
    h = h ^ _shift_right(h, 16)
    return _shift_right(h, 8).float() * 2.0**-24 + (2.0**-25 - 0.5)


def spread(name: str, shape: Shape) -> tuple[float, float]:
    """Standard deviation and mean of the parameter with openpi's `name`."""
    if "layer_norm" in name or "post_layernorm" in name:
        return 0.10, (1.0 if name.endswith("weight") else 0.0)
    if ".dense." in name:
        return (0.5 / math.sqrt(shape[-1]) if name.endswith("weight") else 0.30), 0.0
    if name.endswith(("layernorm.weight", "norm.weight")):
        return 0.20, 0.0
    if name.endswith("embed_tokens.weight"):
        return 1.0 / math.sqrt(shape[-1]), 0.0
    if name.endswith("position_embedding.weight"):
        return 0.30, 0.0
    if name.endswith(".bias"):
        return 0.10, 0.0
    gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
    return gain / math.sqrt(math.prod(shape[1:])), 0.0


def hash_parameter(name: str, shape: Shape, seed: int, device: str | torch.device = "cpu") -> Tensor:
    """Float32 weights of our parameter `name`, hashed under openpi's name."""
    theirs = to_openpi(name)
    std, mean = spread(theirs, shape)
    scale = float(np.float32(2.0 * math.sqrt(3.0) * std))
    out = torch.empty(math.prod(shape), dtype=torch.float32, device=device)
    chunk = CHUNKS[out.device.type]
    for start in range(0, out.numel(), chunk):
        count = min(chunk, out.numel() - start)
        # Two roundings, as numpy does them: a fused multiply-add would round once.
        out[start : start + count] = (uniform(theirs, count, seed, start, device) * scale) + mean
    return out.view(shape)


def random_parameter(name: str, shape: Shape, seed: int) -> Tensor:
    """Float32 normal weights of our parameter `name` with the spread of the hashed ones, seeded per name."""
    theirs = to_openpi(name)
    std, mean = spread(theirs, shape)
    # torch's CPU generator looks at 32 bits of its seed only, so both parts must be mixed into those.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {theirs}".encode()))
    return torch.empty(shape).normal_(mean, std, generator=generator)


def hash_tensor(name: str, shape: Shape, seed: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Float32 uniform in [low, high): the images of the fixtures."""
    u = uniform(name, math.prod(shape), seed) + 0.5
    return (u * float(np.float32(high - low)) + float(np.float32(low))).view(shape)


def hash_normal(name: str, shape: Shape, seed: int) -> Tensor:
    """Float32 standard normal, by the Box-Muller transform of two streams in float64: the noise of the fixtures."""
    count = math.prod(shape)
    radius, angle = (uniform(f"{name}/{part}", count, seed).numpy().astype(np.float64) + 0.5 for part in ("u1", "u2"))
    values = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
    return torch.from_numpy(values.astype(np.float32)).view(shape)


def hash_integers(name: str, shape: Shape, seed: int, low: int, high: int) -> Tensor:
    """Int64 in low..high-1: the token ids of the fixtures."""
    u = uniform(name, math.prod(shape), seed).double() + 0.5
    return (low + torch.floor(u * (high - low))).to(torch.int64).view(shape)
