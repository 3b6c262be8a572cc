"""Observations of a LeRobot-format dataset on disk, versions 2 and 3: Parquet tables, and images or videos beside them.

Version 2 keeps an episode a file, version 3 many; where each begins stands in meta/.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError
from ..transforms import Robot
from .files import Observation
from .lerobot_features import Matched, match_features

INFO = Path("meta", "info.json")
VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclass(frozen=True)
class Episode:
    """Where one episode lies.

    Attributes:
        index: its number.
        length: frames.
        table: its Parquet file, perhaps with others in it.
        videos: by feature, the file and the second at which the episode begins in it.
    """

    index: int
    length: int
    table: Path
    videos: Mapping[str, tuple[Path, float]]


@dataclass(frozen=True)
class LeRobotDataset:
    """A dataset's description.

    Attributes:
        root: its directory.
        fps: frames a second.
        features: as meta/info.json lists them.
        tasks: texts by number.
        episodes: in order.
    """

    root: Path
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[int, str]
    episodes: tuple[Episode, ...]

    @property
    def frames(self) -> int:
        """In all episodes."""
        return sum(episode.length for episode in self.episodes)


def open_dataset(root: str | Path) -> LeRobotDataset:
    """Read a dataset's description.

    Raises FileNotFoundError or InputError that says what is missing or cannot be read, ImportError for the packages.
    """
    place = Path(root)
    if not (place / INFO).is_file():
        raise FileNotFoundError(f"no LeRobot dataset at {place}: there is no {INFO}")
    try:
        info = json.loads((place / INFO).read_text())
        version, fps, features = info["codebase_version"], float(info["fps"]), info["features"]
        if version not in VERSIONS:
            raise InputError(f"{place} is a LeRobot dataset of version {version!r}; known: {', '.join(VERSIONS)}")
        videos = [name for name, feature in features.items() if feature["dtype"] == "video"]
        read = _episodes_of_files if version.startswith("v2") else _episodes_in_files
        tasks = _tasks_of_lines(place) if version.startswith("v2") else _tasks_of_table(place)
        return LeRobotDataset(place, fps, features, tasks, tuple(read(place, info, videos)))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(f"{place}: meta/ cannot be read as a LeRobot dataset's ({error!r})") from error


def dataset_frames(
    root: str | Path, robot: Robot, frames: int, features: Mapping[str, str] | None = None
) -> Iterator[Observation]:
    """Observations in the robot's keys, evenly spread over all frames of the dataset.

    Args:
        root: the dataset's directory.
        robot: whose keys to use.
        frames: how many; all, if the dataset has fewer.
        features: the dataset's feature for keys of the robot whose names do not tell.

    Raises:
        FileNotFoundError, InputError: a missing or unreadable file, or features that do not fit the robot.
        ImportError: pyarrow or av is missing.
    """
    if frames < 1:
        raise InputError(f"frames must be at least 1, got {frames}")
    dataset = open_dataset(root)
    matched = match_features(dataset.features, robot, features or {})
    chosen = {round(i) for i in np.linspace(0, dataset.frames - 1, min(frames, dataset.frames))}
    begin = 0
    for episode in dataset.episodes:
        rows = sorted(i - begin for i in chosen if begin <= i < begin + episode.length)
        begin += episode.length
        if rows:
            yield from _observations(dataset, episode, rows, matched, robot)


def _observations(
    dataset: LeRobotDataset, episode: Episode, rows: list[int], matched: Matched, robot: Robot
) -> Iterator[Observation]:
    columns = [*matched.state.values(), *(f for f in matched.cameras.values() if f not in episode.videos)]
    table = _rows(episode, columns)
    if len(table) != episode.length:
        raise InputError(
            f"{episode.table} has {len(table)} rows of episode {episode.index}, meta/ says {episode.length}: is a file "
            "missing or cut short?"
        )
    videos = {f: _pictures(dataset, episode, f, rows, table) for f in matched.cameras.values() if f in episode.videos}
    for place, row in enumerate(rows):
        values: Observation = {key: np.asarray(table[row][f], np.float64) for key, f in matched.state.items()}
        for key, feature in matched.cameras.items():
            picture = videos[feature][place] if feature in videos else _stored_picture(dataset, table[row][feature])
            picture = picture.transpose(2, 0, 1) if robot.image_layout == "chw" else picture
            if robot.image_group is None:
                values[key] = picture
            else:
                values.setdefault(robot.image_group, {})[key] = picture
        number = int(table[row]["task_index"])
        if number not in dataset.tasks:
            raise InputError(f"{episode.table}: task {number} has no text in meta/")
        yield {**values, robot.prompt_keys[0]: dataset.tasks[number]}


def _rows(episode: Episode, columns: list[str]) -> list[dict[str, Any]]:
    """The episode's rows in order, as Python values."""
    parquet = _require("pyarrow.parquet")
    wanted = [*dict.fromkeys((*columns, "task_index", "timestamp", "episode_index", "frame_index"))]
    table = _read_table(parquet, episode.table, columns=wanted, filters=[("episode_index", "=", episode.index)])
    rows: list[dict[str, Any]] = table.to_pylist()
    return sorted(rows, key=lambda row: row["frame_index"])


def _read_table(parquet: Any, file: Path, **what: Any) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"the dataset lacks {file}")
    try:
        return parquet.read_table(file, **what)
    except (ValueError, OSError) as error:  # pyarrow's errors are of both kinds
        raise InputError(f"{file} cannot be read as Parquet ({error})") from error


def _stored_picture(dataset: LeRobotDataset, value: Any) -> np.ndarray:
    """(H,W,3) uint8 of an image column: the file's bytes, or its path in the dataset."""
    source: Any = io.BytesIO(value["bytes"]) if value.get("bytes") else dataset.root / str(value["path"])
    with Image.open(source) as picture:
        return np.asarray(picture.convert("RGB"))


def _pictures(
    dataset: LeRobotDataset, episode: Episode, feature: str, rows: list[int], table: list[dict[str, Any]]
) -> list[np.ndarray]:
    """(H,W,3) uint8 of some rows, in order: the frame nearest to each row's time."""
    av = _require("av")
    file, begin = episode.videos[feature]
    if not file.is_file():
        raise FileNotFoundError(f"the dataset lacks {file}")
    pictures = []
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        for row in rows:
            time = begin + float(table[row]["timestamp"])
            container.seek(round(time / stream.time_base), stream=stream)
            found = next((f for f in container.decode(stream) if f.time > time - 0.5 / dataset.fps), None)
            if found is None or found.time > time + 1 / dataset.fps:
                raise InputError(f"{file} has no frame at {time:.3f} s, where row {row} of episode {episode.index} is")
            pictures.append(found.to_ndarray(format="rgb24"))
    return pictures


def _episodes_of_files(root: Path, info: Mapping[str, Any], videos: list[str]) -> Iterator[Episode]:
    """Version 2: an episode a file."""
    for line in _lines(root / "meta" / "episodes.jsonl"):
        index = int(line["episode_index"])
        place = {"episode_chunk": index // int(info["chunks_size"]), "episode_index": index}
        files = {name: root / info["video_path"].format(video_key=name, **place) for name in videos}
        table = root / info["data_path"].format(**place)
        yield Episode(index, int(line["length"]), table, {name: (file, 0.0) for name, file in files.items()})


def _episodes_in_files(root: Path, info: Mapping[str, Any], videos: list[str]) -> Iterator[Episode]:
    """Version 3: many episodes a file."""
    parquet = _require("pyarrow.parquet")
    files = sorted((root / "meta" / "episodes").rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{root} has no meta/episodes/*/*.parquet, which version 3 needs")
    rows = [row for file in files for row in _read_table(parquet, file).to_pylist()]
    for row in sorted(rows, key=lambda row: row["episode_index"]):
        table = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        beside = {}
        for name in videos:
            place = {"chunk_index": row[f"videos/{name}/chunk_index"], "file_index": row[f"videos/{name}/file_index"]}
            file = root / info["video_path"].format(video_key=name, **place)
            beside[name] = (file, float(row[f"videos/{name}/from_timestamp"]))
        yield Episode(int(row["episode_index"]), int(row["length"]), root / table, beside)


def _tasks_of_lines(root: Path) -> dict[int, str]:
    return {int(line["task_index"]): str(line["task"]) for line in _lines(root / "meta" / "tasks.jsonl")}


def _tasks_of_table(root: Path) -> dict[int, str]:
    rows = _read_table(_require("pyarrow.parquet"), root / "meta" / "tasks.parquet").to_pylist()
    # The text is the table's index, whose column is named by whoever wrote it.
    return {int(row["task_index"]): next(v for v in row.values() if isinstance(v, str)) for row in rows}


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise FileNotFoundError(f"the dataset lacks {file}")
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"LeRobot datasets need {module.split('.')[0]} ({error}); pip install 'turbo-pi[datasets]'"
        ) from error
