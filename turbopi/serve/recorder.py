"""Keeping some of what clients send, for calibration and replay, without ever standing in the server's way.

A request is offered to a short queue after it was answered; one thread compresses and writes. When the thread is
behind, observations are dropped; when the disk fails, recording ends. Serving goes on in either case.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import ServedPolicy

logger = logging.getLogger("turbopi.serve.recorder")

PATTERN = f"frame_{'[0-9]' * 6}.npz"
WAITING = 4
"""Observations in memory at most, each of a few megabytes."""
MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class RecordConfig:
    """What to keep.

    Attributes:
        directory: one .npz file an observation, as `turbo-pi infer --observation` reads it; earlier files are kept.
        every: keep the first of this many answered requests.
        max_frames: files in the directory at most.
        max_bytes: of all files in the directory at most.
    """

    directory: Path
    every: int = 10
    max_frames: int = 2000
    max_bytes: int = 2048 * MEBIBYTE

    def __post_init__(self) -> None:
        for name in ("every", "max_frames", "max_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"RecordConfig.{name} must be an integer of at least 1, got {value!r}")


class Recorder:
    """Writes observations in a thread of its own. `offer` returns at once and never raises.

    Attributes:
        written, dropped: how many observations so far.

    Raises OSError if the directory cannot be made or written to.
    """

    def __init__(self, config: RecordConfig) -> None:
        self.config = config
        config.directory.mkdir(parents=True, exist_ok=True)
        probe = config.directory / ".writable"
        probe.touch()
        probe.unlink()
        files = sorted(config.directory.glob(PATTERN))
        self._next = int(files[-1].stem.rpartition("_")[2]) + 1 if files else 0
        self._frames, self._bytes = len(files), sum(file.stat().st_size for file in files)
        self._offered = 0
        self.written = self.dropped = 0
        self._full = False
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="turbopi-recorder", daemon=True)
        self._thread.start()

    def offer(self, observation: Mapping[str, Any]) -> None:
        """Keep this observation if it is its turn and there is room; its arrays must not change afterwards."""
        self._offered += 1
        if self._full or (self._offered - 1) % self.config.every:
            return
        try:
            self._queue.put_nowait(observation)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = 10.0) -> bool:
        """Write what waits, and end; False if that took longer than `timeout_s` seconds."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return False
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (observation := self._queue.get()) is not None:
            if self._full:
                continue
            try:
                self._write(observation)
            except OSError as error:
                self._full = True
                logger.error("recording to %s has ended: %s", self.config.directory, error)
            except Exception as error:  # a client's doing: the next observation may be better
                self.dropped += 1
                logger.warning("an observation was not recorded: %s", error)

    def _write(self, observation: Mapping[str, Any]) -> None:
        file = self.config.directory / f"frame_{self._next:06d}.npz"
        partial = file.with_suffix(".partial")
        with partial.open("wb") as stream:
            np.savez_compressed(stream, **flat(observation))
        size = partial.stat().st_size
        if self._frames + 1 > self.config.max_frames or self._bytes + size > self.config.max_bytes:
            partial.unlink()
            self._full = True
            logger.warning("%s is full: %d files, %d bytes", self.config.directory, self._frames, self._bytes)
            return
        partial.rename(file)
        self._next += 1
        self._frames += 1
        self._bytes += size
        self.written += 1


def flat(observation: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays by key; a nested map is written as "images/cam_high". Raises ValueError for what is no plain array."""
    arrays: dict[str, np.ndarray] = {}
    for key, value in observation.items():
        if isinstance(value, Mapping):
            arrays |= flat(value, f"{prefix}{key}/")
            continue
        array = np.asarray(value.decode() if isinstance(value, bytes) else value)
        if array.dtype.kind not in "biufSU":
            raise ValueError(f"{prefix}{key} is a {type(value).__name__}, which no .npz file of plain arrays can hold")
        arrays[f"{prefix}{key}"] = array
    return arrays


class RecordingPolicy:
    """A policy whose answered requests are offered to a recorder; its forks are too."""

    def __init__(self, policy: ServedPolicy, recorder: Recorder) -> None:
        self._policy = policy
        self._recorder = recorder

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The policy's."""
        return self._policy.metadata

    def infer(self, observation: dict[str, Any], /) -> dict[str, Any]:
        """The policy's answer. Observations that it refuses are not kept."""
        kept = dict(observation)
        result = self._policy.infer(observation)
        self._recorder.offer(kept)
        return result

    def fork(self) -> RecordingPolicy:
        """A fork of the policy, recorded too."""
        return RecordingPolicy(self._policy.fork(), self._recorder)

    def reset(self) -> None:
        """Forget the episode."""
        self._policy.reset()
