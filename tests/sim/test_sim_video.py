import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from turbopi.sim.video import VideoRecorder, film_strip


def frame(i: int, size: int = 33) -> np.ndarray:
    return np.full((size, size, 3), i % 256, np.uint8)


@pytest.mark.parametrize("count", [1, 5, 200])
def test_a_film_and_its_stills(tmp_path: Path, count: int) -> None:
    imageio = pytest.importorskip("imageio")
    pytest.importorskip("imageio_ffmpeg")
    with VideoRecorder(tmp_path / "new" / "task01_state02") as video:
        for i in range(count):
            video.add(frame(i, 32), frame(i, 32))
    video.close()
    assert video.path == tmp_path / "new" / "task01_state02.mp4"
    with imageio.get_reader(video.path) as reader:
        assert reader.count_frames() == count
        assert reader.get_data(0).shape == (32, 64, 3)
    numbers = [int(path.stem.rsplit("_", 1)[1]) for path in video.frames]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == min(count, 8)
    assert (numbers[0], numbers[-1]) == (0, count - 1)
    assert np.diff(numbers).max(initial=0) <= 1.5 * count / 8 + 1
    with Image.open(video.frames[-1]) as still:
        assert still.size == (64, 32)


def test_no_frames_no_files(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    with VideoRecorder(tmp_path / "empty") as video:
        pass
    assert video.frames == ()
    assert list(tmp_path.iterdir()) == []


def test_bad_settings(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    with pytest.raises(ValueError, match="fps is 0"):
        VideoRecorder(tmp_path / "x", fps=0)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("imageio"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"turbo-pi\[sim\]"):
        VideoRecorder(tmp_path / "x")


def test_a_strip_of_stills(tmp_path: Path) -> None:
    stills = []
    for i in range(3):
        stills.append(tmp_path / f"{i}.jpg")
        picture = np.concatenate([np.full((64, 64, 3), 60 * i, np.uint8), np.full((64, 64, 3), 200, np.uint8)], axis=1)
        Image.fromarray(picture).save(stills[-1])
    film_strip(stills, tmp_path / "strip.png", side=32)
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (3 * 35 - 3, 67)
        pixels = np.asarray(strip.convert("RGB")).astype(int)
    assert [int(pixels[16, 16 + 35 * i, 0]) for i in range(3)] == pytest.approx([0, 60, 120], abs=3)
    assert pixels[50, 16, 0] == pytest.approx(200, abs=3)
    with pytest.raises(ValueError, match="at least one still"):
        film_strip([], tmp_path / "empty.png")
