"""`turbo-pi serve` as an operator runs it, with a real policy, openpi's client, and hostile neighbours."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from turbopi import Policy, load_policy
from turbopi.checkpoint import init_checkpoint
from turbopi.cli.main import main
from turbopi.frames import read_frames
from turbopi.transforms import LIBERO

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from serve_fuzz import KINDS, attack_from_all_sides

# The published client opens its websocket in a way that newer `websockets` versions warn about.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")
MALFORMED = 5_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_checkpoint(tmp_path_factory.mktemp("served") / "ck", "pi05-tiny", weights="hash", robot="libero")


@pytest.fixture(scope="module")
def frames(data: Path) -> list[dict[str, Any]]:
    z = np.load(data / "libero_frames.npz")
    return [
        {
            "observation/image": np.ascontiguousarray(z["agentview"][i][::-1, ::-1]),
            "observation/wrist_image": np.ascontiguousarray(z["wrist"][i][::-1, ::-1]),
            "observation/state": z["state"][i],
            "prompt": str(z["prompt"][i]),
        }
        for i in range(5)
    ]


@contextmanager
def serving(checkpoint: Path, *options: str, **environment: str) -> Iterator[tuple[int, list[str]]]:
    """A `turbo-pi serve` process: its port and its log's lines. Ended with SIGTERM, it must exit with 0."""
    command = [sys.executable, "-c", "from turbopi.cli.main import main; main()", "serve"]
    command += ["--checkpoint", str(checkpoint), "--host", "127.0.0.1", "--port", "0", "--device", "cpu", *options]
    # One thread, as in the tests' own process: see conftest.
    env = os.environ | {"OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stderr is not None
            announced, log = process.stderr.readline(), []
            found = re.search(r"ws://127\.0\.0\.1:(\d+)", announced)
            assert found, announced
            assert str(checkpoint) in announced
            threading.Thread(target=lambda: log.extend(process.stderr), daemon=True).start()
            yield int(found[1]), log
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def play(policy: Policy | WebsocketClientPolicy, frames: list[dict[str, Any]], ticks: int) -> list[bytes]:
    return [policy.infer(frames[tick % len(frames)])["actions"].tobytes() for tick in range(ticks)]


def test_malformed_neighbours_do_not_change_a_bit(checkpoint: Path, frames: list[dict[str, Any]]) -> None:
    ticks = 60
    expected = play(load_policy(checkpoint, device="cpu"), frames, ticks)
    assert len(set(expected)) == ticks
    answers: list[bytes] = []
    with serving(checkpoint) as (port, _):
        client = WebsocketClientPolicy("127.0.0.1", port)
        assert client.get_server_metadata() == {}
        healthy = threading.Thread(target=lambda: answers.extend(play(client, frames, ticks)))
        healthy.start()
        counts = asyncio.run(attack_from_all_sides(f"ws://127.0.0.1:{port}", 4, MALFORMED))
        healthy.join(60)
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert answers == expected
    assert sum(counts[kind] for kind in KINDS) >= MALFORMED
    refused = re.search(r'turbopi_errors_total\{kind="bad_request"\} (\S+)', metrics)
    assert refused is not None
    assert float(refused[1]) >= MALFORMED
    assert 'turbopi_stage_seconds_count{stage="denoise"}' in metrics


def test_api_key_and_request_log(checkpoint: Path, frames: list[dict[str, Any]]) -> None:
    with serving(checkpoint, "--log-requests", TURBO_PI_API_KEY="sesame") as (port, log):
        with pytest.raises(Exception, match="401"):
            WebsocketClientPolicy("127.0.0.1", port)
        client = WebsocketClientPolicy("127.0.0.1", port, api_key="sesame")
        assert client.infer(frames[0])["actions"].shape == (10, 7)
    assert [json.loads(line)["outcome"] for line in log] == ["ok"]


def test_a_port_that_is_taken_is_one_clear_line(checkpoint: Path) -> None:
    with serving(checkpoint) as (port, _):
        command = [sys.executable, "-c", "from turbopi.cli.main import main; main()", "serve"]
        command += ["--checkpoint", str(checkpoint), "--host", "127.0.0.1", "--port", str(port)]
        second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1
    assert second.stderr.startswith("error: ")
    assert "address already in use" in second.stderr
    assert "Traceback" not in second.stderr


def test_chunks_are_the_clients_to_play(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["serve", "--checkpoint", str(checkpoint), "--port", "0", "--runtime", "tensorrt_pipelined"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "a server's clients play theirs themselves" in capsys.readouterr().err


def test_what_the_server_records_can_be_read_as_frames(
    checkpoint: Path, frames: list[dict[str, Any]], tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    with serving(checkpoint, "--record", str(kept), "--record-every", "1") as (port, log):
        client = WebsocketClientPolicy("127.0.0.1", port)
        answers = [client.infer(frames[tick % len(frames)])["actions"] for tick in range(9)]
        time.sleep(0.3)
    assert log[-1].startswith("recorded ")
    found = read_frames(kept, LIBERO)
    assert len(answers) - 2 <= len(found) <= len(answers)
    assert np.array_equal(found[0]["observation/image"], frames[0]["observation/image"])
