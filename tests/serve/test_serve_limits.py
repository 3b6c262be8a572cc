"""Clients that send too much, read too little or come too many; and the configuration's own bounds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from typing import Any

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serve_fakes import LOCAL, NoisePolicy, handshake, observation, open_raw, samples, wait_for
from websockets.exceptions import ConnectionClosed, InvalidStatus

from turbopi.serve import ServeConfig, ServerThread, encode

# The published client opens its websocket in a way that newer `websockets` versions warn about.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")


def test_oversized_messages_are_explained_to_the_published_client() -> None:
    """100 MB in one frame, and in fragments; another connection goes on."""
    with ServerThread(NoisePolicy()) as server:
        healthy = WebsocketClientPolicy("127.0.0.1", server.port)
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        start = time.perf_counter()
        with pytest.raises(RuntimeError, match=r"InputError: frame with 100000.* exceeds limit of 67108864 bytes"):
            client.infer({"image": np.zeros(100_000_000, np.uint8)})
        assert time.perf_counter() - start < 20
        assert healthy.infer(observation())["actions"].shape == (10, 7)
        with open_raw(server.url) as raw:
            raw.recv()
            with contextlib.suppress(ConnectionClosed):  # the refusal may come while fragments are still being sent
                raw.send(bytes(20_000_000) for _ in range(5))
            assert "exceeds limit of 67108864 bytes" in str(raw.recv(timeout=10))
            with pytest.raises(ConnectionClosed) as closed:
                raw.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
        assert healthy.infer(observation())["actions"].shape == (10, 7)
        wait_for(lambda: samples(server.port)["turbopi_errors_total{too_big}"] == 2)
        healthy._ws.close()


def test_a_refused_client_that_never_closes_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbopi.serve.connection.LINGER_S", 0.2)
    with ServerThread(NoisePolicy(), dataclasses.replace(LOCAL, max_message_bytes=2048)) as server:
        peer = handshake(server.port)
        peer.sendall(b"\x82\xfe\x40\x00" + bytes(4) + bytes(64))
        received = b""
        while chunk := peer.recv(4096):
            received += chunk
        assert b"InputError: frame with 16384 bytes exceeds limit of 2048 bytes" in received
        wait_for(lambda: samples(server.port)["turbopi_open_connections"] == 0)
        peer.close()


def test_a_client_that_floods_pings_and_reads_nothing_holds_little_memory() -> None:
    with ServerThread(NoisePolicy()) as server:
        peer = handshake(server.port)
        peer.settimeout(0.5)
        ping = b"\x89\xfd" + bytes(4) + bytes(125)
        with pytest.raises(TimeoutError):  # the server stops reading, so that sending stalls
            peer.sendall(ping * 2_000_000)
        (session,) = server.server._sessions
        assert session.connection.transport.get_write_buffer_size() < 4_000_000
        assert WebsocketClientPolicy("127.0.0.1", server.port).infer(observation())["actions"].shape == (10, 7)
        assert not session.connection.transport.is_reading()
        while not session.connection.transport.is_reading():  # it reads again once the client does
            assert peer.recv(1 << 20)
        peer.close()


def test_a_client_that_never_reads_its_replies_blocks_nobody() -> None:
    class Large(NoisePolicy):
        def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
            return {"actions": np.zeros(4_000_000) if "large" in observation else np.zeros(1)}

    with ServerThread(Large(), dataclasses.replace(LOCAL, shutdown_grace_s=0.3)) as server:
        peer = handshake(server.port)
        request = encode({"large": 1})
        peer.sendall(bytes([0x82, 0x80 | len(request)]) + bytes(4) + request)
        wait_for(lambda: samples(server.port)["turbopi_requests_total"] == 1)
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        for _ in range(5):
            assert client.infer({})["actions"].shape == (1,)
        client._ws.close()
        assert server.stop() is False  # its reply could not be delivered within the grace
        peer.close()


def test_connections_are_bounded() -> None:
    with ServerThread(NoisePolicy(), dataclasses.replace(LOCAL, max_connections=2)) as server:
        first, second = open_raw(server.url), open_raw(server.url)
        first.recv(), second.recv()
        with pytest.raises(InvalidStatus, match="HTTP 503") as refusal:
            open_raw(server.url)
        assert b"All 2 connections" in refusal.value.response.body
        first.close()
        wait_for(lambda: len(server.server._sessions) == 1)
        open_raw(server.url).close()
        second.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host", ""), ("port", -1), ("port", 70_000), ("port", "80"), ("port", True), ("api_key", ""),
        ("api_key", "a b"), ("api_key", "é"), ("max_message_bytes", 10), ("max_message_bytes", 1e6),
        ("max_connections", 0), ("shutdown_grace_s", -1.0), ("shutdown_grace_s", float("nan")),
    ],
)  # fmt: skip
def test_configuration_is_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"ServeConfig.{field} "):
        ServeConfig(**{field: value})


def test_the_key_is_in_no_receipt() -> None:
    config = ServeConfig(api_key="s3cret")
    assert "s3cret" not in repr(config)
    assert config.receipt()["api_key"] is True
    assert "s3cret" not in json.dumps(config.receipt())
