"""A real, tiny policy behind the server: actions over the wire are those of the library, and bad input is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serve_fakes import open_raw, wait_for

from turbopi import Policy, RuntimeConfig, load_policy
from turbopi.checkpoint import init_checkpoint
from turbopi.config import preset
from turbopi.runtime import ReuseConfig
from turbopi.serve import ServedPolicy, ServerThread, encode

# The published client opens its websocket in a way that newer `websockets` versions warn about.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("served") / "tiny"
    init_checkpoint(directory, preset("pi05-tiny"), robot="libero", weights="random")
    return load_policy(directory, robot="libero", device="cpu")


def observation(index: int, prompt: Any = "put the bowl on the plate") -> dict[str, Any]:
    generator = np.random.default_rng(index)
    return {
        "observation/image": generator.integers(0, 256, (256, 256, 3), dtype=np.uint8),
        "observation/wrist_image": generator.integers(0, 256, (256, 256, 3), dtype=np.uint8),
        "observation/state": generator.standard_normal(8),
        "prompt": prompt,
    }


def test_actions_over_the_wire_are_the_librarys(policy: Policy) -> None:
    served: ServedPolicy = policy
    local = policy.fork()
    with ServerThread(served) as server:
        clients = [WebsocketClientPolicy("127.0.0.1", server.port) for _ in range(2)]
        for index in range(3):
            expected = local.infer(observation(index))
            for client in clients:
                reply = client.infer(observation(index))
                assert reply["actions"].tobytes() == expected["actions"].tobytes()
                assert reply["actions"].dtype == expected["actions"].dtype
                assert {"infer_ms", "encode_images_ms", "prefill_ms", "denoise_ms"} <= reply["policy_timing"].keys()
        counted = 'turbopi_stage_seconds_count{stage="prefill"} 6.0'
        wait_for(lambda: counted in server.server.metrics.text())
        for client in clients:
            client._ws.close()


def test_a_client_says_where_an_episode_begins(policy: Policy) -> None:
    remembering = Policy(policy.transforms, policy.engine, RuntimeConfig(1, reuse=ReuseConfig(every=4)))
    assert remembering.remembers
    assert not policy.remembers
    with ServerThread(remembering) as server:
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        replies = [client.infer(observation(index)) for index in (0, 1)]
        replies += [client.infer({**observation(index), "reset": index == 0}) for index in (0, 1)]
        assert [reply["runtime"]["prefix"] for reply in replies] == ["full", "fast", "full", "fast"]
        for before, after in zip(replies[:2], replies[2:], strict=True):
            assert before["actions"].tobytes() == after["actions"].tobytes()
        with pytest.raises(RuntimeError, match="'reset' is 'yes', expected True with an episode's first observation"):
            client.infer({**observation(0), "reset": "yes"})


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing image": ({"observation/image": None}, "observation/image"),
    "wrong shape": ({"observation/image": np.zeros((3, 4), np.uint8)}, "observation/image"),
    "NaN image": ({"observation/wrist_image": np.full((64, 64, 3), np.nan, np.float32)}, "observation/wrist_image"),
    "short state": ({"observation/state": np.zeros(3)}, "state"),
    "NaN state": ({"observation/state": np.full(8, np.nan)}, "state"),
    "prompt is a number": ({"prompt": 5}, "prompt"),
    "text as state": ({"observation/state": "left"}, "state"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_observation_is_a_bad_request_that_names_the_key(policy: Policy, name: str) -> None:
    changes, key = BAD[name]
    request = {k: v for k, v in (observation(0) | changes).items() if v is not None}
    with ServerThread(policy) as server, open_raw(server.url) as client:
        client.recv()
        client.send(encode(request))
        last = str(client.recv(timeout=30)).splitlines()[-1]
        assert last.startswith("InputError: ")
        assert key in last


def test_every_connection_has_a_runtime_of_its_own(policy: Policy) -> None:
    """What one client's ticks reuse does not depend on the other's; each starts as after a reset."""
    runtime = RuntimeConfig(steps=2, reuse=ReuseConfig(every=2))
    served: ServedPolicy = Policy(policy.transforms, policy.engine, runtime)
    told = []
    with ServerThread(served) as server:
        clients = [WebsocketClientPolicy("127.0.0.1", server.port) for _ in range(2)]
        for client, index in ((0, 0), (0, 1), (1, 2), (0, 3), (1, 4), (1, 5)):
            reply = clients[client].infer(observation(index))
            told.append((client, reply["runtime"]["prefix"], reply["runtime"]["age"]))
        for each in clients:
            each._ws.close()
    assert [entry[1:] for entry in told if entry[0] == 0] == [("full", 0), ("fast", 1), ("full", 0)]
    assert [entry[1:] for entry in told if entry[0] == 1] == [("full", 0), ("fast", 1), ("full", 0)]
