"""Where to take a bowl by its rim, so that the fingers clear everything else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scene import Snapshot

# Height above the bowl's origin and radius of the rim there, m. Low holds best; high keeps the palm over drawer walls.
LOW_GRIP, HIGH_GRIP = (0.033, 0.048), (0.041, 0.050)
_DIRECTIONS = 24
# Heights above the grasp at which the open hand comes past.
_SWEEP = (0.0, 0.03, 0.07)
# The hand in its own axes, as boxes (lowest corner, highest corner), measured on the Panda's meshes: all that the
# finger tips sweep as they close (only the bowl's rim may be there), each open finger above that, the palm.
_HAND = (
    ((-0.055, -0.010, -0.020), (0.055, 0.010, 0.009)),
    ((0.045, -0.010, -0.044), (0.065, 0.010, -0.020)),
    ((-0.065, -0.010, -0.044), (-0.045, 0.010, -0.020)),
    ((-0.102, -0.032, -0.100), (0.102, 0.032, -0.031)),
)
# At the robot's home pose: the fingers move along the world's y axis and point down.
_HOME = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
# The arm's shoulder, how the wrist sits over the finger tips of a hand that points down, and how far the wrist may be
# from the shoulder: fully stretched, at 0.719 m, the elbow folds the wrong way and the controller stalls.
_SHOULDER = np.array([-0.66, 0.0, 1.245])
_WRIST_UP, _WRIST_BACK = 0.204, 0.088
_REACH_EASY, _REACH_MOST = 0.655, 0.685
_WANTED = 0.012
_NEEDED = 0.008
_CROWDED = 0.008


@dataclass(frozen=True)
class Grasp:
    """Take the rim on the side that lies in `direction` (rad, world, from the bowl's centre), the hand turned by `yaw`.

    `grip` is where on the rim (height, radius); `clearance` (m) is how far the open hand stays from everything else on
    its way down, and when it lets go.
    """

    direction: float
    yaw: float
    grip: tuple[float, float]
    clearance: float

    def position(self, snapshot: Snapshot) -> np.ndarray:
        """Where the hand has to be, (3,) m, for the bowl where it is now."""
        return rim_points(snapshot, np.array([self.direction]), self.grip)[0]

    @property
    def rotation(self) -> np.ndarray:
        """How the hand has to be turned, (3, 3)."""
        return hand_rotation(self.yaw)


def rim_points(snapshot: Snapshot, directions: np.ndarray, grip: tuple[float, float]) -> np.ndarray:
    """The points (C, 3) to grip the bowl at, towards each direction (C,), however the bowl is tilted."""
    height, radius = grip
    up = snapshot.bowl_rotation[:, 2]
    outward = np.stack([np.cos(directions), np.sin(directions), np.zeros_like(directions)], axis=1)
    outward -= np.outer(outward @ up, up)
    outward /= np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-6)
    return np.asarray(snapshot.bowl + radius * outward + height * up)


def hand_rotation(yaw: float) -> np.ndarray:
    """The rotation (3, 3) of a hand that points straight down, turned by `yaw` (rad) from the robot's home pose."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) @ _HOME


def hand_yaw(rotation: np.ndarray) -> float:
    """The yaw (rad) of a hand's rotation (3, 3), whatever its tilt."""
    return float(np.arctan2(-rotation[0, 0], rotation[1, 0]))


def rotation_error(wanted: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The rotation vector (3,), world axes, rad, that turns one rotation (3, 3) into the other."""
    turn = wanted @ present.T
    axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / 2
    sine = float(np.linalg.norm(axis))
    angle = float(np.arctan2(sine, (np.trace(turn) - 1) / 2))
    if sine < 1e-9:
        return np.zeros(3) if angle < 1.0 else np.array([0.0, 0.0, np.pi])
    return np.asarray(axis * (angle / sine))


def choose_grasp(snapshot: Snapshot, refused: tuple[float, ...] = ()) -> Grasp:
    """The grasp that clears everything and turns the hand least; the same for the same scene, wherever the hand is.

    Args:
        snapshot: the scene.
        refused: directions that were tried in vain, taken only when nothing else is any good.
    """
    cost, grasp = _best(snapshot, LOW_GRIP, refused)
    if grasp.clearance < _CROWDED:
        high_cost, high = _best(snapshot, HIGH_GRIP, refused)
        if high_cost + 0.004 < cost:
            return high
    return grasp


def grasp_at_hand(snapshot: Snapshot) -> Grasp | None:
    """The grasp that the hand is already at, if its open fingers are around the rim now."""
    offset = snapshot.hand - snapshot.bowl
    direction = np.arctan2(offset[1], offset[0])
    grasps = [Grasp(float(direction), float(_yaws(direction)), grip, 0.0) for grip in (LOW_GRIP, HIGH_GRIP)]
    for grasp in grasps:
        away = np.linalg.norm(grasp.position(snapshot) - snapshot.hand)
        turned = np.linalg.norm(rotation_error(grasp.rotation, snapshot.hand_rotation))
        if away < 0.010 and turned < 0.15 and snapshot.gap > 0.03:
            return grasp
    return None


def _yaws(directions: np.ndarray) -> np.ndarray:
    """The hand's yaw for each direction: turned by half a turn it is the same, so a quarter turn reaches them all."""
    return np.asarray((directions + 1e-9) % np.pi - np.pi / 2)


def _best(snapshot: Snapshot, grip: tuple[float, float], refused: tuple[float, ...]) -> tuple[float, Grasp]:
    """The cheapest direction at one grip, with its cost in metres of clearance."""
    directions = np.arange(_DIRECTIONS) * (2 * np.pi / _DIRECTIONS) - np.pi
    yaws = _yaws(directions)
    hands = rim_points(snapshot, directions, grip)
    clearance, reach = _clearances(snapshot, hands, yaws), _reach(snapshot, hands)
    cost = 0.015 * np.abs(yaws) / (np.pi / 2) + 0.001 * (directions < 0)
    cost += np.maximum(_WANTED - clearance, 0.0) + 3.0 * np.maximum(_NEEDED - clearance, 0.0)
    cost += 0.5 * np.maximum(reach - _REACH_EASY, 0.0) + 3.0 * np.maximum(reach - _REACH_MOST, 0.0)
    for direction in refused:
        cost += 0.02 * (np.abs(np.angle(np.exp(1j * (directions - direction)))) < 0.3)
    best = int(np.argmin(cost))
    return float(cost[best]), Grasp(float(directions[best]), float(yaws[best]), grip, float(clearance[best]))


def _clearances(snapshot: Snapshot, hands: np.ndarray, yaws: np.ndarray) -> np.ndarray:
    """The least distance (C,) of hands at (C, 3) to anything else, over the way down to the bowl and at the goal."""
    points = hands[:, None] + np.stack([_HAND_POINTS @ hand_rotation(yaw).T for yaw in yaws])
    sweep = points[:, None] + np.array(_SWEEP)[:, None, None] * np.array([0.0, 0.0, 1.0])
    there = points + (snapshot.goal - snapshot.bowl)
    near = snapshot.obstacles.near
    taken = near(snapshot.bowl, 0.2).distance(sweep).min(axis=(1, 2))
    return np.minimum(taken, near(snapshot.goal, 0.2).distance(there).min(axis=1))


def _reach(snapshot: Snapshot, hands: np.ndarray) -> np.ndarray:
    """How far (C,) the wrist gets from the shoulder, m, for hands (C, 3) at the bowl, or then at the goal."""
    away = np.stack([hands, hands + (snapshot.goal - snapshot.bowl)]) - _SHOULDER
    level = np.linalg.norm(away[..., :2], axis=-1) - _WRIST_BACK
    return np.asarray(np.hypot(level, away[..., 2] + _WRIST_UP).max(axis=0))


def _sample(box: tuple[tuple[float, float, float], tuple[float, float, float]]) -> np.ndarray:
    """Points (P, 3) over a box, at most 3.5 cm apart along its long sides."""
    low, high = np.array(box)
    steps = [np.linspace(0.0, 1.0, max(3, int(np.ceil(side / 0.035)) + 1)) for side in high - low]
    return low + np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3) * (high - low)


_HAND_POINTS = np.concatenate([_sample(box) for box in _HAND])
