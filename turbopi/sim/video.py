"""Films of episodes: an mp4 of both cameras side by side, a few stills, and a strip of them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image


class VideoRecorder:
    """Writes STEM.mp4 as frames come, and STEM_NNNN.jpg stills when it is closed; a context manager.

    Attributes:
        path: the mp4.
        frames: the stills' paths, in order, once closed.
    """

    def __init__(self, stem: Path, *, fps: int = 20, stills: int = 8) -> None:
        """Prepare a film; nothing is written before the first frame.

        Args:
            stem: path without a suffix; its directory is made.
            fps: 20 plays at the robot's own speed.
            stills: how many frames to keep as pictures, evenly spread from the first to the last.

        Raises:
            ImportError: the encoder's package is missing.
        """
        try:
            self._imageio: Any = importlib.import_module("imageio")
            importlib.import_module("imageio_ffmpeg")
        except ImportError as error:
            raise ImportError(
                f"videos need imageio with its ffmpeg ({error}); install the extra: pip install 'turbo-pi[sim]'"
            ) from error
        if fps < 1 or stills < 1:
            raise ValueError(f"fps is {fps} and stills is {stills}; both must be at least 1")
        self.path = stem.with_name(f"{stem.name}.mp4")
        self.frames: tuple[Path, ...] = ()
        self._stem = stem
        self._fps = fps
        self._stills = stills
        self._writer: Any = None
        self._count = 0
        # Candidates for the stills: every `_stride`-th frame, thinned when there are twice as many as needed.
        self._stride = 1
        self._kept: list[tuple[int, np.ndarray]] = []
        self._last: tuple[int, np.ndarray] | None = None

    def __enter__(self) -> VideoRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, agentview: np.ndarray, wrist: np.ndarray) -> None:
        """Append one frame of each camera: (height, width, 3) uint8 RGB, of equal heights."""
        picture = np.concatenate([agentview, wrist], axis=1)
        if self._writer is None:
            self._stem.parent.mkdir(parents=True, exist_ok=True)
            # Even sides, which the codec wants; 16 would resize.
            self._writer = self._imageio.get_writer(
                self.path, fps=self._fps, codec="libx264", quality=8, macro_block_size=2, ffmpeg_log_level="error"
            )
        self._writer.append_data(picture)
        self._last = (self._count, picture)
        if self._count % self._stride == 0:
            self._kept.append(self._last)
            if len(self._kept) > 4 * self._stills:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._count += 1

    def close(self) -> None:
        """Finish the mp4 and write the stills; closing twice is harmless."""
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        self.frames = tuple(self._write_still(number, picture) for number, picture in self._chosen())
        self._kept, self._last = [], None

    def _chosen(self) -> list[tuple[int, np.ndarray]]:
        assert self._last is not None
        candidates = self._kept if self._kept[-1][0] == self._last[0] else [*self._kept, self._last]
        wanted = np.linspace(0, self._last[0], self._stills)
        numbers = np.array([number for number, _ in candidates])
        return [candidates[i] for i in dict.fromkeys(int(np.abs(numbers - w).argmin()) for w in wanted)]

    def _write_still(self, number: int, picture: np.ndarray) -> Path:
        path = self._stem.with_name(f"{self._stem.name}_{number:04d}.jpg")
        Image.fromarray(picture).save(path, quality=85)
        return path


def film_strip(stills: Sequence[Path], path: Path, *, side: int = 144) -> None:
    """Write one PNG of 256 colours from a film's stills: the agent views in a row, the wrist views below them.

    Args:
        stills: pictures of both cameras side by side, as `VideoRecorder.frames` are.
        path: the PNG.
        side: of a frame in it, in pixels.

    Raises:
        ValueError: no stills.
    """
    if not stills:
        raise ValueError("a film strip needs at least one still; close the recorder before its frames are read")
    gap = 3
    step = side + gap
    strip = Image.new("RGB", (step * len(stills) - gap, 2 * side + gap), "white")
    for column, still in enumerate(stills):
        with Image.open(still) as picture:
            views = picture.resize((2 * side, side), Image.Resampling.LANCZOS)
        for row in (0, 1):
            strip.paste(views.crop((row * side, 0, (row + 1) * side, side)), (column * step, row * step))
    strip.quantize(256).save(path, optimize=True)
