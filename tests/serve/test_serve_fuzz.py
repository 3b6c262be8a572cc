"""Thousands of malformed frames beside a healthy client, whose answers must stay the same to the last bit."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serve_fakes import NoisePolicy, ServerProcess, observation
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from turbopi.serve import encode

# The published client opens its websocket in a way that newer `websockets` versions warn about.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")

WANTED = 5_000
CLIENTS = 6
REPLY_TIMEOUT_S = 20
MAX_GROWTH = 256 * 1024 * 1024
HEALTHY_REQUESTS = 40


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


async def attack(url: str, seed: int, counts: Counter[str]) -> None:
    """Send frames until enough were refused; reconnect after each refusal, as the protocol has it."""
    source = frames(seed)
    while sum(counts[kind] for kind in KINDS) < WANTED:
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


KINDS = ("random", "truncated", "flipped", "fields", "content", "text", "bomb")


def broken_framing(port: int, count: int) -> Counter[str]:
    """Bytes that are not even websocket frames or HTTP; each must end in a close, never in a hang."""
    rng = random.Random(3)
    upgrade = (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    after = [
        b"\x82\x05hello",  # not masked
        b"\xf2\x85" + bytes(9),  # reserved bits
        b"\x83\x85" + bytes(9),  # an opcode that does not exist
        b"\x81\x82" + bytes(4) + b"\xff\xfe",  # text that is not UTF-8
        b"\x89\xfe\x01\x00" + bytes(4 + 256),  # a ping that is too long
        b"\x80\x80" + bytes(4),  # a continuation of nothing
        b"\x82\xff\x7f" + b"\xff" * 7 + bytes(4),  # 2^63 bytes declared
        b"\x88\x81" + bytes(4) + b"x",  # a close frame with half a code
    ]
    before = [rng.randbytes(50) + b"\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n"]
    before += [b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n", b"GET " + b"/" * 20_000 + b" HTTP/1.1\r\n\r\n"]
    ends: Counter[str] = Counter()
    for index in range(count):
        with socket.create_connection(("127.0.0.1", port), timeout=REPLY_TIMEOUT_S) as peer:
            received, stage = b"", ("before", "at once", "after")[index % 3]
            if stage == "after":
                peer.sendall(upgrade)
                while b"reset_pose" not in received:
                    received += peer.recv(65_536)
                peer.sendall(rng.choice(after))
            else:
                peer.sendall(rng.choice(before) if stage == "before" else upgrade + rng.choice(after))
            try:
                while chunk := peer.recv(65_536):
                    received += chunk
            except ConnectionResetError:  # closed while some of our bytes were unread
                pass
            if stage == "after":
                assert b"InputError: " in received, received
            ends[f"broken {stage}"] += 1
    return ends


def play(port: int, requests: int, results: list[bytes], until: threading.Event) -> None:
    """A healthy client: its first `requests` actions, then on until told to stop."""
    client = WebsocketClientPolicy("127.0.0.1", port)
    while len(results) < requests or not until.is_set():
        actions = client.infer(observation(len(results) % 7, size=16))["actions"]
        results.append(actions.tobytes())
        time.sleep(0.01)
    client._ws.close()


def test_malformed_frames_hurt_only_their_own_connection(tmp_path: Path) -> None:
    with ServerProcess(NoisePolicy, tmp_path / "log") as server:
        done, during, counts = threading.Event(), [], Counter()
        process = psutil.Process(server.process.pid)
        warm: list[bytes] = []
        always = threading.Event()
        always.set()
        play(server.port, 3, warm, always)
        before, start = process.memory_info().rss, time.perf_counter()

        healthy = threading.Thread(target=play, args=(server.port, HEALTHY_REQUESTS, during, done))
        healthy.start()

        async def attack_all() -> None:
            await asyncio.gather(*(attack(server.url, seed, counts) for seed in range(CLIENTS)))

        asyncio.run(attack_all())
        ends = broken_framing(server.port, 120)
        took = time.perf_counter() - start
        done.set()
        healthy.join(30)
        assert not healthy.is_alive()
        growth = process.memory_info().rss - before
        server.process.terminate()
        assert server.process.wait(10) == 0
    print(f"fuzz: {dict(counts)}, {dict(ends)} in {took:.1f} s, {len(during)} healthy answers, RSS +{growth >> 20} MiB")
    assert sum(counts[kind] for kind in KINDS) >= WANTED
    assert min(counts[kind] for kind in KINDS) > 50
    assert growth < MAX_GROWTH
    errors = [line for line in server.log.read_text().splitlines() if line.startswith(("ERROR", "CRITICAL"))]
    # Older `websockets` versions log what is not HTTP as an error; nothing else may be one, least of all a lost task.
    assert [line for line in errors if "opening handshake failed" not in line] == []

    with ServerProcess(NoisePolicy, tmp_path / "quiet") as server:
        alone: list[bytes] = []
        play(server.port, HEALTHY_REQUESTS, alone, always)
    local = NoisePolicy().fork()
    expected = [local.infer(observation(index % 7, size=16))["actions"].tobytes() for index in range(len(during))]
    assert during == expected
    assert alone == expected[: len(alone)]
    assert len(set(expected)) == len(expected) >= HEALTHY_REQUESTS
