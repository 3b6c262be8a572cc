"""The server as openpi's clients meet it: replies, errors, keys, limits, turns, metrics."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serve_fakes import (
    LOCAL,
    FakePolicy,
    GatePolicy,
    NoisePolicy,
    RaisingPolicy,
    get,
    observation,
    open_raw,
    samples,
    wait_for,
)
from websockets.exceptions import ConnectionClosed, InvalidStatus

from turbopi.serve import ServerThread, decode, encode
from turbopi.serve.connection import PolicyConnection

# The published client opens its websocket in a way that newer `websockets` versions warn about.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "io" / "ws_golden.json").read_text())


def refused(url: str, frame: bytes | str) -> str:
    """Send one frame; return the error text after checking the close that follows it."""
    with open_raw(url) as client:
        client.recv()
        client.send(frame)
        text = client.recv(timeout=10)
        assert isinstance(text, str)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=10)
    assert closed.value.rcvd is not None
    assert [closed.value.rcvd.code, closed.value.rcvd.reason] == GOLDEN["close"]
    return text


def test_the_published_client_end_to_end() -> None:
    source = NoisePolicy()
    local = source.fork()
    with ServerThread(source) as server:
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        assert client.get_server_metadata() == source.metadata
        for index in range(3):
            reply = client.infer(observation(index))
            expected = local.infer(observation(index))
            assert reply["actions"].tobytes() == expected["actions"].tobytes()
            assert reply["policy_timing"] == expected["policy_timing"]
            assert list(reply) == ["actions", "policy_timing", "server_timing"]
            assert list(reply["server_timing"]) == ["infer_ms", "prev_total_ms"][: 1 + min(index, 1)]
        assert 0 < reply["server_timing"]["infer_ms"] < reply["server_timing"]["prev_total_ms"] + 1000
        client._ws.close()


def test_golden_replies_byte_for_byte() -> None:
    """A policy that gives the golden answer yields the golden frames, times aside."""
    answers = [decode(bytes.fromhex(GOLDEN[f"response{index}_hex"])) for index in range(2)]

    class Golden(FakePolicy):
        metadata = decode(bytes.fromhex(GOLDEN["metadata_frame_hex"]))

        def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in answers[0].items() if key != "server_timing"}

    with ServerThread(Golden()) as server, open_raw(server.url) as client:
        assert client.recv() == bytes.fromhex(GOLDEN["metadata_frame_hex"])
        for index, answer in enumerate(answers):
            client.send(bytes.fromhex(GOLDEN["request_hex"]))
            frame = client.recv()
            assert isinstance(frame, bytes)
            reply = decode(frame)
            assert list(reply["server_timing"]) == list(answer["server_timing"])
            reply["server_timing"] = answer["server_timing"]
            reply["policy_timing"] = answer["policy_timing"]
            assert encode(reply) == bytes.fromhex(GOLDEN[f"response{index}_hex"])
            assert len(frame) == len(bytes.fromhex(GOLDEN[f"response{index}_hex"]))


def test_healthz_is_openpis() -> None:
    with ServerThread(NoisePolicy(), LOCAL) as server:
        status, body, kind = get(server.port, "/healthz")
        assert [status, body, kind] == GOLDEN["healthz"]
        assert get(server.port, "/healthz?full=1")[0] == 200
        assert get(server.port, "/other")[0] == 426


def test_internal_errors_carry_the_traceback_and_bad_requests_do_not(caplog: pytest.LogCaptureFixture) -> None:
    with ServerThread(RaisingPolicy()) as server:
        text = refused(server.url, encode({"raise": "value", "text": "bad prompt"}))
        assert text.endswith(GOLDEN["error_tail"])
        assert "Traceback (most recent call last)" in text
        assert "inference failed" in caplog.text
        text = refused(server.url, encode({"raise": "input", "text": "observation/image is missing"}))
        assert text.splitlines()[-1] == "InputError: observation/image is missing"
        assert "Traceback" not in text
        text = refused(server.url, encode({"raise": "exit", "text": "5"}))
        assert text.endswith("WorkerJobError: SystemExit: 5")
        text = refused(server.url, encode({"raise": "input", "text": "long " * 10_000 + "end"}))
        assert len(text) < 20_000
        assert text.endswith("end")
        assert refused(server.url, "hello").endswith(
            "expected a binary frame with a msgpack map (openpi_client sends these)"
        )
        assert "an empty frame came" in refused(server.url, b"")
        assert "truncated" in refused(server.url, encode(observation())[:100])
        assert get(server.port, "/healthz")[0] == 200
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        with pytest.raises(RuntimeError, match="InputError: no such camera"):
            client.infer({"raise": "input", "text": "no such camera"})
        counted = samples(server.port)
        assert counted["turbopi_errors_total{internal}"] == 2
        assert counted["turbopi_errors_total{bad_request}"] == 6
        assert counted["turbopi_requests_total"] == 8
        assert counted["turbopi_answers_total"] == 0


@pytest.mark.parametrize("result", [None, {"actions": np.array([None])}, {"policy_timing": {"denoise_ms": "x"}}])
def test_an_answer_that_cannot_be_sent_is_an_internal_error(result: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Odd(FakePolicy):
        def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
            return result  # type: ignore[no-any-return]

    with caplog.at_level(logging.CRITICAL), ServerThread(Odd()) as server:
        assert "Traceback" in refused(server.url, encode({}))


def test_text_that_utf8_cannot_carry_still_reaches_the_client() -> None:
    with ServerThread(RaisingPolicy()) as server:

        class Surrogate(RaisingPolicy):
            def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
                return super().infer({"raise": "input", "text": "\ud800"})

        server.server._policy = Surrogate()
        assert refused(server.url, encode({})).endswith("\\ud800")


def test_metadata_that_cannot_be_sent_stops_the_start() -> None:
    class Odd(NoisePolicy):
        metadata: ClassVar[dict[str, Any]] = {"a": object()}

    with pytest.raises(TypeError, match="has no form on the wire"):
        ServerThread(Odd()).start()


def test_api_key() -> None:
    with ServerThread(NoisePolicy(), dataclasses.replace(LOCAL, api_key="s3cret")) as server:
        assert get(server.port, "/healthz")[0] == 200
        wrong = ("Api-Key other", "s3cret", "Bearer s3cret", "Api-Key s3cret ", "Api-Key \u00e9")
        for headers in ({}, *({"Authorization": value} for value in wrong if value.strip() != "Api-Key s3cret")):
            status, body, _ = get(server.port, "/metrics", headers)
            assert status == 401
            assert "Authorization: Api-Key <key>" in body
        with pytest.raises(InvalidStatus, match="HTTP 401"):
            WebsocketClientPolicy("127.0.0.1", server.port, api_key="other")
        with pytest.raises(InvalidStatus, match="HTTP 401"):
            WebsocketClientPolicy("127.0.0.1", server.port)
        client = WebsocketClientPolicy("127.0.0.1", server.port, api_key="s3cret")
        assert client.infer(observation())["actions"].shape == (10, 7)
        text = get(server.port, "/metrics", {"Authorization": "Api-Key s3cret"})[1]
        assert 'turbopi_errors_total{kind="unauthorized"} 7.0' in text
        client._ws.close()


def test_metrics_count_what_happened() -> None:
    with ServerThread(NoisePolicy(), LOCAL) as server, open_raw(server.url) as client:
        client.recv()
        for index in range(4):
            client.send(encode(observation(index)))
            client.recv()
        status, text, kind = get(server.port, "/metrics")
        assert status == 200
        assert kind.startswith("text/plain; version=0.0.4")
        counted = samples(server.port)
        assert counted["turbopi_requests_total"] == counted["turbopi_answers_total"] == 4
        assert counted["turbopi_open_connections"] == 1
        assert counted["turbopi_queue_depth"] == counted["turbopi_in_flight"] == 0
        stages = ("decode", "queue", "infer", "total", "transforms", "encode_images", "prefill", "denoise")
        for stage in stages:
            assert counted[f"turbopi_stage_seconds_count{{{stage}}}"] == 4
        assert counted["turbopi_stage_seconds_sum{denoise}"] == pytest.approx(0.004)
        assert counted["turbopi_stage_seconds_sum{infer}"] < counted["turbopi_stage_seconds_sum{total}"]
        assert 'turbopi_stage_seconds_bucket{le="0.001",stage="denoise"} 4.0' in text
        with ServerThread(NoisePolicy(), LOCAL) as other:
            assert samples(other.port)["turbopi_requests_total"] == 0
    wait_for(lambda: server.server.metrics.connections._value.get() == 0)


@pytest.mark.parametrize("count", [2, 4])
def test_clients_are_served_in_turn(count: int) -> None:
    """With everyone waiting at each step, nobody is served twice before all others were."""
    policy, rounds = GatePolicy(), 6
    with ServerThread(policy) as server:
        metrics = server.server.metrics
        depth, received = metrics.queue_depth._value, metrics.requests._value
        served_by: dict[str, set[int]] = {}

        def play(name: str) -> None:
            with open_raw(server.url) as client:
                client.recv()
                for _ in range(rounds):
                    client.send(encode({"client": name}))
                    reply = client.recv()
                    assert isinstance(reply, bytes)
                    served_by.setdefault(name, set()).add(decode(reply)["fork"])

        threads = [threading.Thread(target=play, args=(f"client {index}",)) for index in range(count)]
        for thread in threads:
            thread.start()
        total = rounds * count
        for step in range(total):
            # One is being served and all others wait: only then is that one let through.
            state = (min(count + step, total), min(count, total - step) - 1)
            wait_for(lambda state=state: (received.get(), depth.get()) == state)
            policy.gate.release()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    everyone = {f"client {index}" for index in range(count)}
    for start in range((rounds - 1) * count):
        assert set(policy.served[start : start + count]) == everyone, policy.served
    assert sorted(map(len, served_by.values())) == [1] * count
    assert len(set.union(*served_by.values())) == count


def test_interleaved_clients_get_what_each_would_get_alone() -> None:
    alone = NoisePolicy().fork()
    expected = [alone.infer(observation(index))["actions"].tobytes() for index in range(20)]
    with ServerThread(NoisePolicy()) as server:
        results: list[list[bytes]] = [[] for _ in range(3)]

        def play(result: list[bytes]) -> None:
            client = WebsocketClientPolicy("127.0.0.1", server.port)
            result.extend(client.infer(observation(index))["actions"].tobytes() for index in range(20))
            client._ws.close()

        threads = [threading.Thread(target=play, args=(result,)) for result in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert results == [expected] * 3


def test_a_client_that_leaves_while_waiting_loses_its_turn() -> None:
    policy = GatePolicy()
    with ServerThread(policy) as server:
        depth = server.server.metrics.queue_depth._value
        clients = [open_raw(server.url) for _ in range(3)]
        for index, client in enumerate(clients):
            client.recv()
            client.send(encode({"client": str(index)}))
            wait_for(lambda index=index: depth.get() == index)
        clients[1].close()
        policy.gate.release(2)
        clients[0].recv(timeout=10)
        clients[2].recv(timeout=10)
        assert policy.served == ["0", "2"]
        clients[0].send(encode({"client": "gone"}))
        wait_for(lambda: samples(server.port)["turbopi_in_flight"] == 1)
        clients[0].close()
        policy.gate.release()
        wait_for(lambda: samples(server.port)["turbopi_errors_total{disconnected}"] == 2)
        clients[2].close()


def test_sockets_send_at_once_and_notice_dead_peers() -> None:
    with ServerThread(NoisePolicy()) as server, open_raw(server.url) as client:
        client.recv()
        (session,) = server.server._sessions
        assert isinstance(session.connection, PolicyConnection)
        peer = session.connection.transport.get_extra_info("socket")
        assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert session.connection.ping_interval is None
        assert client.protocol.extensions == []


def test_requests_are_logged_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "turbopi.serve.requests")
    for asked in (False, True):
        with ServerThread(NoisePolicy(), dataclasses.replace(LOCAL, log_requests=asked)) as server:
            WebsocketClientPolicy("127.0.0.1", server.port).infer(observation())
            refused(server.url, b"\xc1")
        records = [json.loads(record.message) for record in caplog.records if record.name.endswith("requests")]
        assert [record["outcome"] for record in records] == (["ok", "bad_request"] if asked else [])
    assert records[0]["connection"] == records[0]["request"] == 1
    assert records[0]["received_bytes"] == len(encode(observation()))
    assert {"infer_ms", "queue_ms", "decode_ms", "total_ms", "denoise_ms"} <= records[0].keys()


def test_a_taken_port_is_an_error_at_the_start() -> None:
    with ServerThread(NoisePolicy()) as server:
        with pytest.raises(OSError, match="address already in use"):
            ServerThread(NoisePolicy(), dataclasses.replace(LOCAL, port=server.port)).start()
        unstarted = ServerThread(NoisePolicy())
        with pytest.raises(RuntimeError, match="has not been started"):
            _ = unstarted.port
