"""The server in a process of its own: /healthz during inference, signals, exit codes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serve_fakes import BurnPolicy, NoisePolicy, ServerProcess, SleepPolicy, StuckPolicy, healthz_ms, open_raw
from websockets.exceptions import ConnectionClosed

from turbopi.serve import ServeConfig, encode, serve

# The published client opens its websocket in a way that newer `websockets` versions warn about.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")


def test_healthz_answers_within_50_ms_during_a_2_s_inference(tmp_path: Path) -> None:
    with ServerProcess(BurnPolicy, tmp_path / "log") as server:
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        replies: list[dict] = []
        thread = threading.Thread(target=lambda: replies.append(client.infer({"a": 1})))
        start = time.perf_counter()
        thread.start()
        times = []
        while thread.is_alive():
            times.append(healthz_ms(server.port))
            time.sleep(0.005)
        assert time.perf_counter() - start > 2.0
        thread.join()
        worst = max(times)
        print(
            f"/healthz during inference: {len(times)} polls, mean {sum(times) / len(times):.1f}, worst {worst:.1f} ms"
        )
        assert replies[0]["server_timing"]["infer_ms"] > 2000
        assert len(times) > 40
        assert worst < 50
        client._ws.close()


@pytest.mark.parametrize(("megabytes", "limit_ms"), [(6, 150), (60, 600)])
def test_healthz_beside_large_frames(tmp_path: Path, megabytes: int, limit_ms: float) -> None:
    """The loop only moves and unmasks bytes, but of a frame just under the limit that takes a while."""
    with ServerProcess(NoisePolicy, tmp_path / "log") as server:
        message = encode({"image": np.zeros(megabytes * 1_000_000, np.uint8)})
        times: list[float] = []

        def send() -> None:
            for _ in range(180 // megabytes):
                with open_raw(server.url) as client:
                    client.recv()
                    client.send(message)
                    assert "InputError: the observation has no observation/image" in str(client.recv(timeout=20))

        thread = threading.Thread(target=send)
        thread.start()
        while thread.is_alive():
            times.append(healthz_ms(server.port))
        thread.join()
        print(f"/healthz beside {megabytes} MB frames: {len(times)} polls, worst {max(times):.1f} ms")
        assert len(times) > 50
        assert max(times) < limit_ms


def test_sigterm_answers_what_is_in_flight_and_exits_0(tmp_path: Path) -> None:
    with ServerProcess(SleepPolicy, tmp_path / "log") as server:
        idle, queued, busy = (open_raw(server.url) for _ in range(3))
        for client in (idle, queued, busy):
            client.recv()
        busy.send(encode({"a": 1}))
        time.sleep(0.2)
        queued.send(encode({"a": 1}))
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        for client, answers in ((idle, 0), (busy, 1), (queued, 1)):
            for _ in range(answers):
                assert isinstance(client.recv(timeout=10), bytes)
            with pytest.raises(ConnectionClosed) as closed:
                client.recv(timeout=10)
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "The server is shutting down.")
            if client is idle:
                with pytest.raises(OSError, match="refused"):
                    open_raw(server.url)
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_exits_0_at_once(tmp_path: Path, number: signal.Signals) -> None:
    with ServerProcess(NoisePolicy, tmp_path / "log") as server:
        start = time.perf_counter()
        server.process.send_signal(number)
        assert server.process.wait(10) == 0
        assert time.perf_counter() - start < 5


@pytest.mark.parametrize("forced", [True, False])
def test_a_stuck_inference_ends_with_the_second_signal_or_the_grace(tmp_path: Path, forced: bool) -> None:
    grace = 60.0 if forced else 0.3
    with ServerProcess(StuckPolicy, tmp_path / "log", shutdown_grace_s=grace) as server:
        client = open_raw(server.url)
        client.recv()
        client.send(encode({"a": 1}))
        time.sleep(0.3)
        start = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
        if forced:
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 1
        assert time.perf_counter() - start < 8
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=5)
        assert "cut off" in server.log.read_text()


def test_signals_outside_the_main_thread_are_refused() -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(serve(NoisePolicy(), ServeConfig(host="127.0.0.1", port=0)))
        except (ValueError, RuntimeError) as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert "main thread" in str(errors[0])


def test_serve_stops_at_its_event_and_leaves_the_signals_as_they_were() -> None:
    async def main() -> bool:
        stop = asyncio.Event()
        return await serve(
            NoisePolicy(), ServeConfig(host="127.0.0.1", port=0), on_ready=lambda _: stop.set(), stop=stop
        )

    before = signal.getsignal(signal.SIGINT)
    assert asyncio.run(main()) is True
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['websockets'] = None; import turbopi.serve"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'turbo-pi[serve]'" in result.stderr
