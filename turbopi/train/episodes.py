"""Demonstrations on disk: one file per episode, frames as lossless PNG, everything else as numbers.

An episode's file is an .npz of plain arrays: `state` (T,8) float32, `actions` (T,7) float32 (the expert's answer to the
state at each tick, whatever was executed), `frames` (T, cameras) byte offsets into `png` (uint8), and `meta`, a JSON
text with prompt, task, seed and how the episode was made.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True, eq=False)
class Episode:
    """One demonstration.

    Attributes:
        frames: (T, cameras, S, S, 3) uint8, as the model's transforms resize them.
        state: (T, state_dim) float32, the robot's, not normalised.
        actions: (T, action_dim) float32, to imitate.
        meta: "prompt", and whatever else tells where the episode came from.
    """

    frames: np.ndarray
    state: np.ndarray
    actions: np.ndarray
    meta: Mapping[str, Any]

    def __post_init__(self) -> None:
        ticks = len(self.frames)
        if ticks == 0 or len(self.state) != ticks or len(self.actions) != ticks:
            raise ValueError(f"an episode of {ticks} frames, {len(self.state)} states, {len(self.actions)} actions")
        if self.frames.dtype != np.uint8 or self.frames.ndim != 5:
            raise ValueError(
                f"frames are {self.frames.shape} {self.frames.dtype}, expected (T, cameras, S, S, 3) uint8"
            )
        if not isinstance(self.meta.get("prompt"), str):
            raise ValueError("the episode's meta has no prompt")


def save_episode(path: Path, episode: Episode) -> None:
    """Write an episode; the file appears whole or not at all."""
    pngs = [_png(image) for tick in episode.frames for image in tick]
    ends = np.cumsum([len(png) for png in pngs], dtype=np.int64).reshape(episode.frames.shape[:2])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(
            file,
            png=np.frombuffer(b"".join(pngs), np.uint8),
            frames=ends,
            state=episode.state.astype(np.float32),
            actions=episode.actions.astype(np.float32),
            meta=np.array(json.dumps(dict(episode.meta))),
        )
    partial.rename(path)


def load_episode(path: Path) -> Episode:
    """Read an episode. Raises ValueError that names the file if it is not one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            png, ends = file["png"].tobytes(), file["frames"]
            starts = np.concatenate(([0], ends.ravel()[:-1]))
            images = [_image(png[start:end]) for start, end in zip(starts, ends.ravel(), strict=True)]
            frames = np.stack(images).reshape(*ends.shape, *images[0].shape)
            return Episode(frames, file["state"], file["actions"], json.loads(str(file["meta"])))
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not an episode file ({error}); generate the demonstrations again") from error


def episode_files(directories: Sequence[Path]) -> list[Path]:
    """All episode files in some directories, sorted. Raises FileNotFoundError if there are none."""
    files = sorted(file for directory in directories for file in directory.glob("*.npz"))
    if not files:
        places = ", ".join(map(str, directories))
        raise FileNotFoundError(f"no episodes in {places}; make some with `turbo-pi demos --out DIR`")
    return files


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _image(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))
