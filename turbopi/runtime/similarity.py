"""How like one another two ticks are, as numbers up to 1; and whether a chunk is at a delicate place."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .config import PhaseGate


def token_similarity(now: Tensor, then: Tensor, cameras: tuple[int, ...]) -> float:
    """Cosine of the image tokens of the least similar camera. (1,cameras,S,width) each; waits for the device."""
    if not cameras:
        return 1.0
    ours, theirs = (tokens[0, list(cameras)].flatten(1).float() for tokens in (now, then))
    return float(torch.nn.functional.cosine_similarity(ours, theirs, dim=1).min())


def image_similarity(now: np.ndarray, then: np.ndarray) -> float:
    """Cosine of the pixels, 0 (black) to 1, of the least similar camera. (cameras,3,S,S) uint8 or float32."""
    found = [_cosine(_pixels(a), _pixels(b)) for a, b in zip(now, then, strict=True)]
    return min(found, default=1.0)


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


def _pixels(image: np.ndarray) -> np.ndarray:
    flat = image.ravel()
    return flat.astype(np.float32) if image.dtype == np.uint8 else (flat + 1.0) * 0.5


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    if norms == 0.0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(a @ b) / norms
