"""Malformed frames without end, and a client that sends them."""

from __future__ import annotations

import asyncio
import random
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from serve_fakes import observation
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from turbopi.serve import encode

REPLY_TIMEOUT_S = 20
KINDS = ("random", "truncated", "flipped", "fields", "content", "text", "bomb")


def array_map(data: Any, dtype: Any, shape: Any) -> dict[bytes, Any]:
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


def wrong_fields(rng: random.Random, valid: dict[str, Any]) -> bytes:
    """One array of a valid request with a wrong dtype, shape or data."""
    key = rng.choice(["observation/image", "observation/wrist_image", "observation/state"])
    data, dtype, shape = valid[key].tobytes(), valid[key].dtype.str, list(valid[key].shape)
    changes: list[dict[bytes, Any]] = [
        array_map(
            data, rng.choice(["|O", "O", "<c8", "|V1", "<M8[us]", "<f16", "x", "", "|u2", "<U1", 7, None]), shape
        ),
        array_map(data, dtype, rng.choice([[], [-1], [2**62, 2**62], [1] * 40, shape[:-1], [*shape, 2], "x", [0.5]])),
        array_map(data[: rng.randrange(len(data))], dtype, shape),
        array_map(data + b"x", dtype, shape),
        array_map(None, dtype, shape),
        {b"__ndarray__": True},
        {b"__npgeneric__": True, b"data": rng.choice([None, "x", 1e300, 2**63]), b"dtype": "<i4"},
    ]
    return bytes(msgpack.packb({**{k: v for k, v in valid.items() if k == "prompt"}, key: rng.choice(changes)}))


def wrong_content(rng: random.Random, valid: dict[str, Any]) -> bytes:
    """A well-formed message that is not an observation: missing keys, wrong shapes, NaN."""
    changed = dict(valid)
    key = rng.choice(list(valid))
    kind = rng.randrange(4)
    if kind == 0:
        del changed[key]
    elif kind == 1:
        image = np.ones((8, 8, 3), rng.choice([np.float32, np.float64, np.float16]))
        image[rng.randrange(8)] = rng.choice([np.nan, np.inf])
        changed["observation/image"] = image
    elif kind == 2:
        changed[key] = rng.choice([None, 5, [1, 2], {}, np.zeros(()), np.zeros((3, 4)), np.zeros((0, 0))])
        if key == "prompt":
            changed["prompt"] = rng.choice([None, 5, [], {}])
    else:
        changed["observation/state"] = np.full(8, np.nan, np.float32)
    return encode(changed)


def bomb(rng: random.Random) -> bytes:
    """Deep nesting, huge declared lengths, floods of tiny items."""
    head = rng.choice([b"\x81\xa1a", b"", b"\x82\xa6prompt\xa0\xa1b"])
    return head + rng.choice(
        [
            b"\x91" * rng.randrange(20, 30_000),
            b"\x81\xa1a" * rng.randrange(20, 10_000),
            rng.choice([b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"]) + struct.pack(">I", rng.randrange(2**16, 2**32)),
            (b"\xdc\xff\xff" + b"\x80" * 65_535) * rng.randrange(1, 4),
            b"\xdd\x00\x04\x00\x00" + b"\xc0" * 262_144,
            msgpack.packb({b"__ndarray__": True, b"data": b""})[:-2] + b"\xc6\xff\xff\xff\xff",
        ]
    )


def flipped(rng: random.Random, frame: bytes) -> bytes:
    """Some bits of a valid frame turned, most of them in its small fields."""
    changed = bytearray(frame)
    for _ in range(rng.randrange(1, 6)):
        where = rng.randrange(60) if rng.random() < 0.5 else rng.randrange(len(changed))
        changed[where] ^= 1 << rng.randrange(8)
    return bytes(changed)


def frames(seed: int) -> Iterator[tuple[str, bytes | str]]:
    rng = random.Random(seed)
    valid = observation(seed, size=8)
    packed = encode(valid)
    while True:
        yield "random", rng.randbytes(rng.randrange(0, 300))
        yield "truncated", packed[: rng.randrange(len(packed))]
        yield "flipped", flipped(rng, packed)
        yield "fields", wrong_fields(rng, valid)
        yield "content", wrong_content(rng, valid)
        yield "text", rng.choice(["", "hello", "é" * 50, packed.hex()[:200]])
        if rng.random() < 0.15:
            yield "bomb", bomb(rng)


async def attack(url: str, seed: int, counts: Counter[str], wanted: int) -> None:
    """Send frames until `wanted` were refused; reconnect after each refusal, as the protocol has it."""
    source = frames(seed)
    while sum(counts[kind] for kind in KINDS) < wanted:
        async with connect(url, compression=None, max_size=None, ping_interval=None) as client:
            await asyncio.wait_for(client.recv(), REPLY_TIMEOUT_S)
            for kind, frame in source:
                await client.send(frame)
                reply = await asyncio.wait_for(client.recv(), REPLY_TIMEOUT_S)
                if isinstance(reply, bytes):  # a flipped bit in a pixel makes no malformed frame
                    assert kind == "flipped", (kind, frame[:100])
                    counts["answered"] += 1
                    continue
                assert "InputError: " in reply.splitlines()[-1], reply
                assert len(reply) < 2000
                counts[kind] += 1
                with pytest.raises(ConnectionClosed) as closed:
                    await asyncio.wait_for(client.recv(), REPLY_TIMEOUT_S)
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1011
                break


async def attack_from_all_sides(url: str, clients: int, wanted: int) -> Counter[str]:
    """Let several clients attack until `wanted` frames were refused; how many of each kind were."""
    counts: Counter[str] = Counter()
    await asyncio.gather(*(attack(url, seed, counts, wanted) for seed in range(clients)))
    return counts
