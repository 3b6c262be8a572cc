"""A run's directory: its configuration and one JSON line per finished episode, which survive a kill at any moment.

`config.json` says what was evaluated: another configuration may not continue here. `episodes.jsonl` has one line per
episode, written whole and synced before the next. `run.lock` is held while a process evaluates here.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import write_whole

CONFIG_FILE, EPISODES_FILE, LOCK_FILE = "config.json", "episodes.jsonl", "run.lock"
FORMAT = 1

EpisodeKey = tuple[str, int, int, int]
"""(suite, task, initial state, seed): what makes two episodes of different runs a pair."""


@dataclass(frozen=True)
class EpisodeRecord:
    """One line of episodes.jsonl.

    Attributes:
        suite: LIBERO suite.
        task: index in the suite.
        initial_state: number of the official initial state.
        seed: of the run; with the three above, all that the policy's noise depends on.
        prompt: what the policy was told.
        success: whether the goal was reached; False where `error` is set.
        steps: actions executed.
        inferences: chunks asked for.
        infer_ms: what each of them took, in milliseconds.
        note: what was odd about an outcome that counts, such as a simulation that became unstable.
        error: why no outcome exists (the evaluation's fault, not a failure of the policy); None if one does.
        attempts: times the episode was begun; more than 1 where a worker died.
        wall_s: seconds of the last attempt, simulation included.
        media: paths of the video and of frames, relative to the run's directory; {} if none was asked for.
        asked: where the prompt asks for something else than the task's own goal, whether that was reached; else None.
        jerk: of the actions that were executed, see `turbopi.sim.rollout.jerk`; None for fewer than three.
        runtime: what the policy's runtime reported of the episode; None for a policy that reports nothing.
    """

    suite: str
    task: int
    initial_state: int
    seed: int
    prompt: str
    success: bool
    steps: int
    inferences: int
    infer_ms: list[float]
    note: str | None
    error: str | None
    attempts: int
    wall_s: float
    media: dict[str, Any]
    asked: bool | None = None
    jerk: float | None = None
    runtime: dict[str, Any] | None = None

    @property
    def key(self) -> EpisodeKey:
        """What identifies the episode."""
        return self.suite, self.task, self.initial_state, self.seed


_FIELDS = {field.name for field in fields(EpisodeRecord)}
_NEEDED = _FIELDS - {"asked", "jerk", "runtime"}  # lines that were written before there was such a field are whole


def read_records(directory: Path) -> list[EpisodeRecord]:
    """The lines of a run, in the order in which episodes ended. A torn last line is none.

    An episode may have several lines with an error, and after them one with an outcome.

    Raises:
        FileNotFoundError: `directory` is not the directory of a run.
        ValueError: a line inside the file that is no episode, or an episode that has two outcomes.
    """
    path = directory / EPISODES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {EPISODES_FILE} in {directory}; give the --out directory of a `turbo-pi eval`")
    whole = path.read_bytes().split(b"\n")[:-1]
    records = [_parse(line, path, number) for number, line in enumerate(whole, start=1)]
    ended: set[EpisodeKey] = set()
    for record in records:
        if record.key in ended:
            raise ValueError(f"{path} has the episode {record.key} twice; the file was edited or joined: remove a line")
        if record.error is None:
            ended.add(record.key)
    return records


def _parse(line: bytes, path: Path, number: int) -> EpisodeRecord:
    try:
        values = json.loads(line)
        if not isinstance(values, dict) or not _NEEDED <= values.keys() <= _FIELDS:
            raise ValueError(f"expected a map with {', '.join(sorted(_NEEDED))}")
        return EpisodeRecord(**values)
    except ValueError as error:
        raise ValueError(
            f"{path} line {number} is no episode ({error}); the file was damaged or comes from another version: "
            "evaluate into a new directory"
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """The run's configuration, as `RunDirectory` wrote it.

    Raises:
        FileNotFoundError: `directory` is not the directory of a run.
        ValueError: the file is not one of ours.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG_FILE} in {directory}; give the --out directory of a `turbo-pi eval`")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); evaluate into a new directory") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is not a configuration of format {FORMAT}; evaluate into a new directory")
    return values


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """The fields in which two JSON values differ, each as "name: old → new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        prefix = f"{name}." if name else ""
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{prefix}{k}")]
    return [] if old == new else [f"{name}: {json.dumps(old)} → {json.dumps(new)}"]


def _with_trials_of(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """`new` as if it asked for no more trials than `old`: a run may go on with more episodes of the same kind."""
    grown = isinstance(old.get("trials"), int) and isinstance(new.get("trials"), int) and new["trials"] > old["trials"]
    return {**new, "trials": old["trials"]} if grown else new


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all."""
    write_whole(path, (json.dumps(values, indent=1) + "\n").encode())


class RunDirectory:
    """The one writer of a run's directory; a context manager that holds its lock."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """Open or create the directory of a run.

        Args:
            path: the directory.
            config: all that decides outcomes, as JSON values.

        Raises:
            ValueError: episodes of another configuration are there, or another process is writing.
        """
        self.path = path
        self._confirmed = False
        path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take_lock()
            self._episodes = os.open(path / EPISODES_FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                self._cut_torn_line()
                self.records = read_records(path)
                self._config = self._settle_config(json.loads(json.dumps(config)))
            except BaseException:
                os.close(self._episodes)
                raise
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._episodes)
        os.close(self._lock)

    def append(self, record: EpisodeRecord) -> None:
        """Add an episode; when this returns it is on the disk."""
        line = json.dumps(asdict(record), allow_nan=False).encode() + b"\n"
        written = os.write(self._episodes, line)
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes fit into {self.path / EPISODES_FILE}; free some space")
        os.fsync(self._episodes)
        self.records.append(record)

    def confirm_policy(self, description: Mapping[str, Any]) -> None:
        """Note what the policy turned out to be (engine, precision, device, model), or check that it still is that.

        Raises ValueError that names what differs if earlier episodes or another worker have another policy.
        """
        new = json.loads(json.dumps(description))
        known = self._config.get("policy")
        changes = [] if known is None else differences(known, new, "policy")
        if self.records:
            self._refuse(changes)
        if self._confirmed and changes:
            raise ValueError(f"workers of {self.path} have different policies ({'; '.join(changes)}); begin it again")
        self._confirmed = True
        if known != new:
            self._config["policy"] = new
            write_json(self.path / CONFIG_FILE, self._config)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is evaluating into {self.path}; wait for it, or give another --out"
            ) from error

    def _cut_torn_line(self) -> None:
        """Drop what a kill in the middle of a write left behind, so that the episode is played again."""
        data = (self.path / EPISODES_FILE).read_bytes()
        os.ftruncate(self._episodes, data.rfind(b"\n") + 1)

    def _settle_config(self, config: dict[str, Any]) -> dict[str, Any]:
        new = {"format": FORMAT, "config": config}
        if self.records:
            old = read_config(self.path)
            self._refuse(differences(old["config"], _with_trials_of(config, old["config"])))
            if old["config"] != config:
                write_json(self.path / CONFIG_FILE, old := {**old, "config": config})
            return old
        write_json(self.path / CONFIG_FILE, new)
        return new

    def _refuse(self, changes: list[str]) -> None:
        if changes:
            raise ValueError(
                f"{self.path} holds {len(self.records)} episodes of another configuration ({'; '.join(changes)}); "
                "give another --out, or the options it was begun with"
            )
