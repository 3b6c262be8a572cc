import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_fakes import observation
from websockets.sync.client import connect

from turbopi.errors import InputError
from turbopi.frames import read_frames, read_observation
from turbopi.serve import ServerThread, decode, encode
from turbopi.serve.recorder import PATTERN, WAITING, RecordConfig, Recorder, RecordingPolicy
from turbopi.transforms import LIBERO


class Answering:
    """Answers whatever has a state; counts its forks and resets."""

    metadata: dict[str, Any] = {"reset_pose": [1.0]}  # noqa: RUF012

    def __init__(self) -> None:
        self.resets = 0

    def infer(self, observation: dict[str, Any], /) -> dict[str, Any]:
        if "observation/state" not in observation:
            raise InputError("no state")
        return {"actions": np.zeros((10, 7)), "policy_timing": {}}

    def fork(self) -> "Answering":
        return Answering()

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder(RecordConfig(tmp_path / "frames", every=1))
    yield made
    made.close()


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob(PATTERN))


def test_what_is_answered_is_kept_as_it_came(recorder: Recorder) -> None:
    policy = RecordingPolicy(Answering(), recorder).fork()
    sent = [observation(seed) for seed in range(3)]
    for one in sent:
        policy.infer(one)
        time.sleep(0.02)
    assert recorder.close()
    directory = recorder.config.directory
    assert [file.name for file in files(directory)] == [f"frame_{i:06d}.npz" for i in range(3)]
    for one, kept in zip(sent, read_frames(directory, LIBERO), strict=True):
        assert set(kept) == set(one)
        assert all(np.array_equal(kept[key], value) for key, value in one.items())
    assert (recorder.written, recorder.dropped) == (3, 0)


def test_what_is_refused_is_not_kept(recorder: Recorder) -> None:
    policy = RecordingPolicy(Answering(), recorder)
    with pytest.raises(InputError):
        policy.infer({"prompt": "x"})
    recorder.close()
    assert not files(recorder.config.directory)


def test_the_policy_behind_is_reached(recorder: Recorder) -> None:
    inner = Answering()
    policy = RecordingPolicy(inner, recorder)
    policy.reset()
    assert inner.resets == 1
    assert policy.metadata == {"reset_pose": [1.0]}


def test_every_tenth_and_never_more_than_allowed(tmp_path: Path) -> None:
    recorder = Recorder(RecordConfig(tmp_path, every=10, max_frames=3))
    for number in range(60):
        recorder.offer({"observation/state": np.full(8, float(number)), "prompt": b"text"})
        time.sleep(0.005)
    recorder.close()
    kept = [read_observation(file) for file in files(tmp_path)]
    assert [frame["observation/state"][0] for frame in kept] == [0.0, 10.0, 20.0]
    assert kept[0]["prompt"] == "text"
    again = Recorder(RecordConfig(tmp_path, every=1, max_frames=4))
    for _ in range(3):
        again.offer({"observation/state": np.zeros(8)})
        time.sleep(0.02)
    again.close()
    assert [file.name for file in files(tmp_path)][-1] == "frame_000003.npz"
    assert len(files(tmp_path)) == 4
    assert not list(tmp_path.glob("*.partial"))


def test_bytes_are_bounded(tmp_path: Path) -> None:
    recorder = Recorder(RecordConfig(tmp_path, every=1, max_bytes=30_000))
    for seed in range(6):
        recorder.offer(observation(seed))
        time.sleep(0.02)
    recorder.close()
    assert 0 < sum(file.stat().st_size for file in tmp_path.iterdir()) <= 30_000


def test_a_slow_disk_drops_observations_and_blocks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(RecordConfig(tmp_path, every=1))
    gate = threading.Event()
    write = recorder._write
    monkeypatch.setattr(recorder, "_write", lambda one: gate.wait(10) and write(one))
    begin = time.perf_counter()
    for seed in range(20):
        recorder.offer(observation(seed, size=4))
    assert time.perf_counter() - begin < 0.5
    assert 20 - WAITING - 1 <= recorder.dropped <= 20 - WAITING
    gate.set()
    assert recorder.close()
    assert recorder.written + recorder.dropped == 20


def test_a_full_disk_ends_recording_not_serving(recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    recorder._write = full  # type: ignore[method-assign]
    policy = RecordingPolicy(Answering(), recorder)
    with caplog.at_level(logging.ERROR):
        for seed in range(5):
            assert "actions" in policy.infer(observation(seed))
            time.sleep(0.01)
        recorder.close()
    assert recorder.written == 0
    assert [record.getMessage() for record in caplog.records if "has ended" in record.getMessage()]
    assert len(caplog.records) == 1


def test_an_odd_observation_is_left_out_and_the_next_one_kept(recorder: Recorder) -> None:
    recorder.offer({"observation/state": np.zeros(8), "extra": [{"a": 1}]})
    recorder.offer(observation())
    assert recorder.close()
    assert (recorder.written, recorder.dropped) == (1, 1)
    assert len(files(recorder.config.directory)) == 1


def test_nested_cameras_are_written_flat(recorder: Recorder) -> None:
    recorder.offer({"images": {"cam_high": np.zeros((3, 4, 4), np.uint8)}, "state": np.zeros(14)})
    recorder.close()
    assert read_observation(files(recorder.config.directory)[0], "images")["images"]["cam_high"].shape == (3, 4, 4)


def test_a_directory_that_cannot_be_had_is_said_before_serving(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Recorder(RecordConfig(tmp_path / "file"))
    for name in ("every", "max_frames", "max_bytes"):
        with pytest.raises(ValueError, match=f"RecordConfig.{name} must be an integer of at least 1"):
            RecordConfig(tmp_path, **{name: 0})


def test_through_the_server(recorder: Recorder) -> None:
    with ServerThread(RecordingPolicy(Answering(), recorder)) as server, connect(server.url) as client:
        client.recv()
        for seed in range(4):
            client.send(encode(observation(seed)))
            assert decode(client.recv())["actions"].shape == (10, 7)
            time.sleep(0.02)
    recorder.close()
    found = read_frames(recorder.config.directory, LIBERO)
    assert np.array_equal(found[3]["observation/image"], observation(3)["observation/image"])
