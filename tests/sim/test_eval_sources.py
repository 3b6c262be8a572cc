"""Policies that an evaluation drives: a checkpoint's, here and behind a server."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fakes import fake_config
from websockets.sync.server import ServerConnection, serve

from turbopi import load_policy
from turbopi.checkpoint import init_checkpoint
from turbopi.serve import ServeConfig, ServerThread, encode
from turbopi.sim import remote
from turbopi.sim.episodes_file import read_config
from turbopi.sim.evaluate import evaluate
from turbopi.sim.remote import RefusedError, RemotePolicyError, RemoteSource, websocket_url
from turbopi.sim.sources import CheckpointSource, check_robot, fingerprint
from turbopi.transforms import get_robot


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_checkpoint(tmp_path_factory.mktemp("sources") / "ck", "pi05-tiny", weights="hash", robot="libero")


def observation(index: int) -> dict[str, Any]:
    generator = np.random.default_rng(index)
    return {
        "observation/image": generator.integers(0, 256, (224, 224, 3), dtype=np.uint8),
        "observation/wrist_image": generator.integers(0, 256, (224, 224, 3), dtype=np.uint8),
        "observation/state": generator.standard_normal(8),
        "prompt": "put the bowl on the plate",
    }


def test_an_episodes_noise_is_its_own(checkpoint: Path) -> None:
    opened = CheckpointSource(checkpoint, {"steps": 2, "device": "cpu"}).open()

    def play(seed: int) -> list[bytes]:
        policy = opened.episode(seed)
        policy.reset()
        return [policy.infer(observation(i))["actions"].tobytes() for i in range(2)]

    first, other, again = play(1), play(2), play(1)
    assert first == again
    assert first != other
    expected = load_policy(checkpoint, steps=2, seed=1, device="cpu").infer(observation(0))["actions"]
    assert first[0] == expected.tobytes()
    assert opened.describe()["runtime"]["steps"] == 2


def test_a_checkpoint_is_described_by_what_it_holds(checkpoint: Path, tmp_path: Path) -> None:
    source = CheckpointSource(checkpoint, {"steps": 10, "tokenizer": Path("t.model")})
    described = source.describe()
    assert described["steps"] == 10
    assert described["tokenizer"] == "t.model"
    assert described["fingerprint"] == fingerprint(checkpoint)
    (tmp_path / "a").write_bytes(bytes(300_000))
    before = fingerprint(tmp_path)
    (tmp_path / "a").write_bytes(bytes(160_000) + b"\1" + bytes(139_999))
    assert fingerprint(tmp_path) != before
    before = fingerprint(tmp_path)
    (tmp_path / "calibration.json").write_text("{}")
    assert fingerprint(tmp_path) == before
    with pytest.raises(FileNotFoundError, match="no checkpoint directory"):
        fingerprint(tmp_path / "absent")


def test_a_checkpoint_of_another_robot_is_refused(tmp_path: Path) -> None:
    path = init_checkpoint(tmp_path / "ck", "pi05-tiny", weights="hash", robot="droid")
    with pytest.raises(ValueError, match=r"is for robot 'droid', with cameras .*; LIBERO has cameras obs"):
        CheckpointSource(path, {"device": "cpu"}).open()
    check_robot(get_robot("libero"), "x")


@pytest.mark.parametrize(
    ("address", "url"),
    [("localhost:8000", "ws://localhost:8000"), ("ws://[::1]:1", "ws://[::1]:1"), ("wss://a.b:443/", "wss://a.b:443")],
)
def test_addresses(address: str, url: str) -> None:
    assert websocket_url(address) == url


@pytest.mark.parametrize("address", ["localhost", "http://a:1", ":8000", "a:b", ""])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match="expected host:port"):
        websocket_url(address)


def test_a_server_plays_every_episode_from_its_own_seed(checkpoint: Path) -> None:
    policy = load_policy(checkpoint, steps=2, seed=5, device="cpu")
    expected = [policy.infer(observation(i))["actions"].tobytes() for i in range(2)]
    with ServerThread(policy, ServeConfig(host="127.0.0.1", port=0, api_key="sesame")) as server:
        source = RemoteSource(f"127.0.0.1:{server.port}", "sesame")
        opened = source.open()
        assert source.describe() == opened.describe() == {"remote": server.url, "server_metadata": {}}
        assert "sesame" not in str(source.describe())
        for seed in range(2):
            episode = opened.episode(seed)
            episode.reset()
            assert [episode.infer(observation(i))["actions"].tobytes() for i in range(2)] == expected
        episode.reset()
        assert episode.infer(observation(0))["actions"].tobytes() == expected[0]
        with pytest.raises(RefusedError, match="InputError: the observation has no"):
            episode.infer({"prompt": "x"})
        with pytest.raises(RefusedError, match=r"401.*TURBO_PI_API_KEY"):
            RemoteSource(server.url).open()
    with pytest.raises(RemotePolicyError, match=r"no policy server answers.*turbo-pi serve"):
        source.open()


def test_an_evaluation_drives_a_server(checkpoint: Path, tmp_path: Path) -> None:
    with ServerThread(load_policy(checkpoint, steps=1, device="cpu"), ServeConfig(host="127.0.0.1", port=0)) as server:
        config = fake_config(tmp_path, source=RemoteSource(server.url), tasks=(0,), trials=2, workers=1)
        summary = evaluate(config)
        assert summary["total"]["episodes"] == 2
        assert summary["latency"]["inferences"] >= 2
        assert read_config(tmp_path)["policy"] == {"remote": server.url, "server_metadata": {}}
    with pytest.raises(RemotePolicyError, match="no policy server answers"):
        evaluate(config)


@contextmanager
def rogue(*replies: Any, greetings: Iterable[bytes] = ()) -> Iterator[str]:
    """A server that greets with the first reply and answers with the others; None closes, ... keeps silent.

    With `greetings`, each connection gets the next of these for the first reply.
    """
    greeting = iter(greetings)

    def handle(connection: ServerConnection) -> None:
        for index, reply in enumerate((next(greeting), *replies) if greetings else replies):
            if index:
                connection.recv()
            if reply is ...:
                connection.recv()
            elif reply is None:
                connection.close()
            else:
                connection.send(reply)

    with serve(handle, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


HELLO = encode({"arm": np.zeros(2), "names": ["a"], "n": np.float32(2)})


@pytest.mark.parametrize(
    ("replies", "kind", "message"),
    [
        ((HELLO, "Traceback\nValueError: broken"), RefusedError, "answered with an error: ValueError: broken"),
        ((HELLO, ""), RefusedError, "(nothing)"),
        ((HELLO, b"\xc1"), RefusedError, "no answer"),
        ((HELLO, None), RemotePolicyError, "was closed"),
        ((HELLO, ...), RemotePolicyError, "did not answer within"),
        ((None,), RemotePolicyError, "was closed"),
        ((b"\xc1",), RefusedError, "no answer"),
    ],
)
def test_servers_that_misbehave(
    replies: tuple[Any, ...], kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "REPLY_SECONDS", 0.5)
    with rogue(*replies) as address:
        episode = remote.RemoteEpisode(RemoteSource(address))
        with pytest.raises(kind, match=message):
            episode.infer({"a": 1})
        episode.close()
        episode.close()


def test_a_servers_metadata_becomes_json(monkeypatch: pytest.MonkeyPatch) -> None:
    with rogue(HELLO) as address:
        described = RemoteSource(address).describe()
    assert described["server_metadata"] == {"arm": [0.0, 0.0], "names": ["a"], "n": 2.0}


def test_a_server_that_becomes_another_is_refused() -> None:
    odd = encode({"policy": "a", "scale": np.full(1, np.nan)})
    with rogue(..., greetings=[odd, odd, odd, encode({"policy": "b"})]) as address:
        episode = RemoteSource(address).open().episode(0)
        for _ in range(2):
            episode.reset()
        with pytest.raises(RefusedError, match=r'exchanged during the run.*"policy": "a".*and says {"policy": "b"}'):
            episode.reset()


def test_a_connection_that_breaks_between_ticks() -> None:
    with rogue(HELLO, encode({"actions": np.zeros((5, 7))}), None) as address:
        episode = remote.RemoteEpisode(RemoteSource(address))
        assert episode.infer({"a": 1})["actions"].shape == (5, 7)
        for _ in range(2):
            with pytest.raises(RemotePolicyError, match="was closed"):
                episode.infer({"a": 1})
