"""Thousands of malformed frames beside a healthy client, whose answers must stay the same to the last bit."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serve_fakes import NoisePolicy, ServerProcess, observation
from serve_fuzz import KINDS, REPLY_TIMEOUT_S, attack_from_all_sides

# The published client opens its websocket in a way that newer `websockets` versions warn about.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")

WANTED = 5_000
CLIENTS = 6
MAX_GROWTH = 256 * 1024 * 1024
HEALTHY_REQUESTS = 40


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
        done, during = threading.Event(), []
        process = psutil.Process(server.process.pid)
        warm: list[bytes] = []
        always = threading.Event()
        always.set()
        play(server.port, 3, warm, always)
        before, start = process.memory_info().rss, time.perf_counter()

        healthy = threading.Thread(target=play, args=(server.port, HEALTHY_REQUESTS, during, done))
        healthy.start()

        counts = asyncio.run(attack_from_all_sides(server.url, CLIENTS, WANTED))
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
