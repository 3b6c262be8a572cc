import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from turbopi import InputError
from turbopi.frames.lerobot_dataset import dataset_frames, open_dataset
from turbopi.frames.lerobot_features import match_features
from turbopi.transforms import ALOHA, DROID, LIBERO, robot_from_lerobot

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
av = pytest.importorskip("av")

FPS = 10
LENGTHS = (6, 9)
SIZE = 64
TASKS = ("pick up the bowl", "open the drawer")


def colour(episode: int, row: int) -> int:
    return 20 + 12 * row + 100 * episode


def picture(episode: int, row: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), colour(episode, row), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_video(path: Path, pictures: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for pixels in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def rows(episode: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "state": [float(episode), float(row), *[0.0] * 6],
            "timestamp": row / FPS,
            "frame_index": row,
            "episode_index": episode,
            "task_index": episode,
            **{name: make(episode, row) for name, make in more.items()},
        }
        for row in range(LENGTHS[episode])
    ]


def write_info(root: Path, version: str, dtype: str, data_path: str, video_path: str | None) -> None:
    features = {
        "image": {"dtype": dtype, "shape": [SIZE, SIZE, 3]},
        "wrist_image": {"dtype": dtype, "shape": [SIZE, SIZE, 3]},
        "state": {"dtype": "float32", "shape": [8]},
        "actions": {"dtype": "float32", "shape": [7]},
    }
    info = {"codebase_version": version, "fps": FPS, "features": features, "chunks_size": 1000}
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps({**info, "data_path": data_path, "video_path": video_path}))


@pytest.fixture
def version2(tmp_path: Path) -> Path:
    """Pictures inside the tables, an episode a file."""
    root = tmp_path / "v2"
    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    write_info(root, "v2.1", "image", data, None)
    (root / "data" / "chunk-000").mkdir(parents=True)
    stored = {"image": lambda e, r: {"bytes": png(picture(e, r)), "path": None}}
    stored["wrist_image"] = lambda e, r: {"bytes": None, "path": f"wrist_{e}_{r}.png"}
    for episode in range(2):
        for row in range(LENGTHS[episode]):
            (root / f"wrist_{episode}_{row}.png").write_bytes(png(255 - picture(episode, row)))
        table = pa.Table.from_pylist(rows(episode, **stored))
        pq.write_table(table, root / data.format(episode_chunk=0, episode_index=episode))
    lines = [json.dumps({"episode_index": e, "length": LENGTHS[e], "tasks": [TASKS[e]]}) for e in range(2)]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(lines))
    (root / "meta" / "tasks.jsonl").write_text(
        "\n".join(json.dumps({"task_index": i, "task": task}) for i, task in enumerate(TASKS))
    )
    return root


@pytest.fixture
def version3(tmp_path: Path) -> Path:
    """Both episodes in one table and one video a camera."""
    root = tmp_path / "v3"
    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    write_info(root, "v3.0", "video", data, video)
    table = root / data.format(chunk_index=0, file_index=0)
    table.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row for episode in range(2) for row in rows(episode)]), table)
    pictures = [picture(e, r) for e in range(2) for r in range(LENGTHS[e])]
    place = {"chunk_index": 0, "file_index": 0}
    write_video(root / video.format(video_key="image", **place), pictures)
    write_video(root / video.format(video_key="wrist_image", **place), [255 - p for p in pictures])
    episodes = [
        {
            "episode_index": e,
            "length": LENGTHS[e],
            "data/chunk_index": 0,
            "data/file_index": 0,
            **{f"videos/{name}/{key}": 0 for name in ("image", "wrist_image") for key in place},
            **{f"videos/{name}/from_timestamp": e * LENGTHS[0] / FPS for name in ("image", "wrist_image")},
        }
        for e in (1, 0)
    ]
    folder = root / "meta" / "episodes" / "chunk-000"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(episodes), folder / "file-000.parquet")
    tasks = [{"task_index": i, "__index_level_0__": task} for i, task in enumerate(TASKS)]
    pq.write_table(pa.Table.from_pylist(tasks), root / "meta" / "tasks.parquet")
    return root


@pytest.mark.parametrize("version", ["version2", "version3"])
def test_every_frame_is_the_one_of_its_row(version: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(version)
    frames = list(dataset_frames(root, LIBERO, 100))
    assert len(frames) == open_dataset(root).frames == sum(LENGTHS)
    for number, frame in enumerate(frames):
        episode, row = (0, number) if number < LENGTHS[0] else (1, number - LENGTHS[0])
        assert frame["observation/state"].tolist()[:2] == [episode, row]
        assert frame["prompt"] == TASKS[episode]
        shown = frame["observation/image"]
        assert shown.shape == (SIZE, SIZE, 3)
        assert shown.dtype == np.uint8
        assert abs(float(shown.mean()) - colour(episode, row)) < 4
        assert abs(float(frame["observation/wrist_image"].mean()) - 255 + colour(episode, row)) < 4


def test_some_frames_are_spread_from_the_first_to_the_last(version3: Path) -> None:
    frames = list(dataset_frames(version3, LIBERO, 4))
    assert [tuple(f["observation/state"][:2].astype(int)) for f in frames] == [(0, 0), (0, 5), (1, 3), (1, 8)]


def test_names_that_do_not_tell_are_asked_for_and_given(version2: Path) -> None:
    info = json.loads((version2 / "meta" / "info.json").read_text())
    features = info["features"]
    features["front"] = features.pop("image")
    with pytest.raises(
        InputError, match=r"no feature for observation/image .*wrist_image.* --features observation/image"
    ):
        match_features(features, LIBERO, {})
    assert match_features(features, LIBERO, {"observation/image": "front"}).cameras["observation/image"] == "front"
    with pytest.raises(InputError, match="--features names observation/top=front"):
        match_features(features, LIBERO, {"observation/top": "front"})
    twice = {**info["features"], "other.wrist_image": features["front"]}
    twice.pop("wrist_image")
    twice["more/wrist_image"] = features["front"]
    with pytest.raises(InputError, match="more than one feature for observation/wrist_image"):
        match_features(twice, LIBERO, {"observation/image": "front"})


def test_a_lerobot_checkpoints_own_features_are_the_datasets() -> None:
    state, image = {"type": "STATE", "shape": [8]}, {"type": "VISUAL", "shape": [3, 64, 64]}
    robot = robot_from_lerobot(
        {
            "type": "pi05",
            "chunk_size": 10,
            "input_features": {
                "observation.images.top": image,
                "observation.images.side": image,
                "observation.state": state,
            },
            "output_features": {"action": {"type": "ACTION", "shape": [7]}},
        }
    )
    features = {"observation.images.top": {"dtype": "video"}, "observation.state": {"dtype": "float32", "shape": [8]}}
    matched = match_features(features, robot, {})
    assert matched.cameras == {"observation.images.top": "observation.images.top"}
    assert matched.state == {"observation.state": "observation.state"}
    with pytest.raises(InputError, match=r"no feature for observation\.images\.top"):
        match_features({"observation.state": features["observation.state"]}, robot, {})


def test_a_dataset_of_another_robot_is_refused(version2: Path) -> None:
    with pytest.raises(InputError, match="no feature for observation/exterior_image_1_left of robot 'droid'"):
        list(dataset_frames(version2, DROID, 4))
    with pytest.raises(InputError, match=r"has shape \(8,\), robot 'aloha' sends 14 numbers as state"):
        match_features(
            {"observation.images.cam_high": {"dtype": "video"}, "state": {"dtype": "float32", "shape": [8]}}, ALOHA, {}
        )


def test_datasets_that_are_broken(version2: Path, version3: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no LeRobot dataset at"):
        open_dataset(tmp_path)
    with pytest.raises(InputError, match="frames must be at least 1"):
        list(dataset_frames(version2, LIBERO, 0))
    (version3 / "videos" / "image" / "chunk-000" / "file-000.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"the dataset lacks .*file-000\.mp4"):
        list(dataset_frames(version3, LIBERO, 2))
    info = version2 / "meta" / "info.json"
    (version2 / "data" / "chunk-000" / "episode_000001.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        list(dataset_frames(version2, LIBERO, 20))
    text = info.read_text()
    info.write_text(text.replace("v2.1", "v1.6"))
    with pytest.raises(InputError, match=r"version 'v1\.6'; known: v2\.0"):
        open_dataset(version2)
    info.write_text(text.replace('"fps"', '"rate"'))
    with pytest.raises(InputError, match="cannot be read as a LeRobot dataset's"):
        open_dataset(version2)


def test_a_table_cut_short_is_said(version2: Path) -> None:
    lines = version2 / "meta" / "episodes.jsonl"
    lines.write_text(lines.read_text().replace(f'"length": {LENGTHS[1]}', '"length": 30'))
    with pytest.raises(InputError, match=r"has 9 rows of episode 1, meta/ says 30"):
        list(dataset_frames(version2, LIBERO, 20))
