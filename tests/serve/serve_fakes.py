"""Small policies for the server's tests, and a server process: `python serve_fakes.py POLICY [ServeConfig as JSON]`."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from websockets.sync.client import ClientConnection, connect

from turbopi.errors import InputError
from turbopi.serve import ServeConfig, serve_forever

LOCAL = ServeConfig(host="127.0.0.1", port=0)
TIMING = {"infer_ms": 4.0, "transforms_ms": 0.5, "encode_images_ms": 1.0, "prefill_ms": 1.5, "denoise_ms": 1.0}


def observation(seed: int = 0, size: int = 32) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {
        "observation/image": generator.integers(0, 256, (size, size, 3), dtype=np.uint8),
        "observation/wrist_image": generator.integers(0, 256, (size, size, 3), dtype=np.uint8),
        "observation/state": generator.standard_normal(8).astype(np.float32),
        "prompt": "put the bowl on the plate",
    }


class FakePolicy:
    """Forks are numbered; each starts the same noise stream."""

    metadata: ClassVar[dict[str, Any]] = {"reset_pose": [0.0, -1.5]}

    def __init__(self) -> None:
        self.forks = 0
        self.name = 0
        self.noise = np.random.default_rng(7)

    def fork(self) -> FakePolicy:
        self.forks += 1
        child = object.__new__(type(self))
        child.__dict__.update(self.__dict__)
        child.name = self.forks
        child.reset()
        return child

    def reset(self) -> None:
        self.noise = np.random.default_rng(7)

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


class NoisePolicy(FakePolicy):
    """Checks its input as a real policy does; its actions depend on the input and on how many came before."""

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        for key in ("observation/image", "observation/wrist_image", "observation/state", "prompt"):
            if key not in observation:
                raise InputError(
                    f"the observation has no {key}, expected it beside {sorted(map(str, observation))[:8]}"
                )
        for key in ("observation/image", "observation/wrist_image"):
            image = observation[key]
            if not isinstance(image, np.ndarray) or image.dtype.kind not in "uf" or image.ndim != 3:
                raise InputError(f"{key} is not a height × width × 3 image")
            if image.shape[2] != 3 or not np.isfinite(image).all():
                raise InputError(f"{key} has shape {image.shape} or values that are not finite")
        state = observation["observation/state"]
        if not isinstance(state, np.ndarray) or state.shape != (8,) or state.dtype.kind != "f":
            raise InputError("observation/state must be 8 floats")
        if not np.isfinite(state).all():
            raise InputError("observation/state is not finite")
        if not isinstance(observation["prompt"], (str, bytes, np.ndarray)):
            raise InputError("prompt must be text")
        actions = self.noise.standard_normal((10, 7)) + np.float64(state.astype(np.float64).sum())
        return {"actions": actions + observation["observation/image"].mean(), "policy_timing": dict(TIMING)}


class BurnPolicy(FakePolicy):
    """Two seconds of torch in the worker thread, half of them in many small operations that fight for the GIL."""

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        import torch

        large, small = torch.randn(512, 512), torch.randn(8, 8)
        start = time.perf_counter()
        while time.perf_counter() - start < 1.0:
            large = torch.nn.functional.normalize(large @ large)
        while time.perf_counter() - start < 2.0:
            small = torch.nn.functional.normalize(small @ small)
        return {"actions": np.zeros((2, 7)), "policy_timing": dict(TIMING)}


class SleepPolicy(FakePolicy):
    seconds = 1.0

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.seconds)
        return {"actions": np.full((2, 7), 3.0)}


class StuckPolicy(SleepPolicy):
    seconds = 600.0


class RaisingPolicy(FakePolicy):
    """Raises what the observation names."""

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        raise {"value": ValueError, "input": InputError, "exit": SystemExit}[observation["raise"]](observation["text"])


class GatePolicy(FakePolicy):
    """Each inference waits until the test lets one through; `served` tells whose requests were, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.served: list[str] = []

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        assert self.gate.acquire(timeout=20)
        self.served.append(observation["client"])
        return {"actions": np.zeros((1, 7)), "fork": self.name}


def open_raw(url: str) -> ClientConnection:
    """A websocket as openpi's client opens it; the first frame is still to be received."""
    return connect(url, compression=None, max_size=None)


def healthz_ms(port: int) -> float:
    """How long GET /healthz takes over a connection of its own, in milliseconds."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/healthz")
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"OK\n")
    connection.close()
    return (time.perf_counter() - start) * 1000


def get(port: int, path: str, headers: dict[str, str] | None = None) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers=headers or {})
    response = connection.getresponse()
    result = response.status, response.read().decode(), response.getheader("Content-Type", "")
    connection.close()
    return result


def samples(port: int) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(get(port, "/metrics")[1]):
        for sample in family.samples:
            label = next(iter(sample.labels.values()), "") if "le" not in sample.labels else "bucket"
            found[f"{sample.name}{{{label}}}" if label else sample.name] = sample.value
    return found


def handshake(port: int) -> socket.socket:
    """A bare socket past the websocket handshake and the metadata frame."""
    peer = socket.create_connection(("127.0.0.1", port), timeout=10)
    peer.sendall(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    received = b""
    while b"reset_pose" not in received:
        received += peer.recv(4096)
    return peer


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.002)


class ServerProcess:
    """A server in a process of its own: its port, its log, its exit code."""

    def __init__(self, policy: type[FakePolicy], log: Path, **config: Any) -> None:
        self.log = log
        settings = json.dumps({"host": "127.0.0.1", "port": 0, **config})
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__)), policy.__name__, settings],
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server did not start: {log.read_text()}"
        self.port = int(line)
        self.url = f"ws://127.0.0.1:{self.port}"

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _main() -> None:
    import logging

    logging.basicConfig(level=logging.INFO)
    policy = globals()[sys.argv[1]]()
    if isinstance(policy, BurnPolicy):
        import torch

        torch.set_num_threads(1)
    config = ServeConfig(**json.loads(sys.argv[2]))
    sys.exit(serve_forever(policy, config, on_ready=lambda server: print(server.port, flush=True)))


if __name__ == "__main__":
    _main()
