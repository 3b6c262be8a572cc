"""How like one another two ticks are, as numbers up to 1; and whether a chunk is at a delicate place."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .config import PhaseGate

PIXEL_ROWS = 4
ROUNDING = 1e-5
"""By which a cosine of some hundred thousand float32 numbers may be off."""


def token_similarity(now: Tensor, then: Tensor, cameras: tuple[int, ...]) -> float:
    """Cosine of the image tokens of the least similar camera. (1,cameras,S,width) each; waits for the device.

    It is 1 only where they are identical.
    """
    if not cameras:
        return 1.0
    ours, theirs = (tokens[0, list(cameras)].flatten(1).float() for tokens in (now, then))
    found = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=1).min())
    return _settled(found, lambda: torch.equal(ours, theirs))


Pixels = tuple[np.ndarray, list[float]]
"""Of each camera its pixels, (cameras,n) float32, 0 where black, and their Euclidean length."""


def pixels_of(images: np.ndarray) -> Pixels:
    """The pixels that are compared: every fourth row, which says what all say in a quarter of the time.

    (cameras,3,S,S) uint8, or float32 from -1 to 1.
    """
    rows = images[:, :, ::PIXEL_ROWS].astype(np.float32).reshape(len(images), -1)
    if images.dtype != np.uint8:
        rows = (rows + 1.0) * 0.5
    return rows, [math.sqrt(row @ row) for row in rows]


def image_similarity(now: Pixels, then: Pixels, same: Callable[[], bool]) -> float:
    """Cosine of the pixels of the least similar camera; 1 only if `same` says that the whole frames are identical."""
    return _settled(min(map(_cosine, *now, *then), default=1.0), same)


def state_similarity(now: np.ndarray, then: np.ndarray) -> float:
    """1 minus half the root-mean-square difference of two normalised states: 1 where equal, 0 at opposite ends.

    A cosine would say little of states near 0, where the direction is noise.
    """
    return 1.0 - 0.5 * float(np.sqrt(np.mean(np.square(now - then))))


def eventful(chunk: np.ndarray, gate: PhaseGate) -> bool:
    """Whether the last chunk opens or closes the gripper, or bends sharply. (H,dims) normalised actions."""
    ahead = chunk[: gate.window]
    if gate.gripper >= ahead.shape[1]:
        raise ValueError(f"PhaseGate.gripper is {gate.gripper}, the robot's actions have {ahead.shape[1]} dimensions")
    grip = np.sign(ahead[:, gate.gripper])
    if (grip[1:] * grip[:-1] < 0).any():
        return True
    if not np.isfinite(gate.curvature) or len(ahead) < 3:
        return False
    bend = np.diff(np.delete(ahead, gate.gripper, axis=1), n=2, axis=0)
    return bool(np.sqrt(np.mean(np.square(bend), axis=1)).max() > gate.curvature)


def _settled(cosine: float, same: Callable[[], bool]) -> float:
    """The cosine, which is 1 where nothing differs and nowhere else, whatever was rounded."""
    if cosine < 1.0 - ROUNDING:
        return cosine
    return 1.0 if same() else min(cosine, math.nextafter(1.0, 0.0))


def _cosine(a: np.ndarray, length_a: float, b: np.ndarray, length_b: float) -> float:
    if length_a * length_b == 0.0:
        return float(length_a == length_b)
    return float(a @ b) / (length_a * length_b)
