"""Where to take a bowl by its rim, so that the fingers clear everything else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scene import Boxes, Snapshot

# Where the hand closes: height above the bowl's origin and distance from its axis, m. Low holds best; high keeps the
# palm over drawer walls; the inner one is inside the rim, where a wall leaves the outer finger no room beyond it:
# the hand moves out to the rim as the fingers close.
LOW_GRIP, HIGH_GRIP, INNER_GRIP = (0.033, 0.048), (0.041, 0.050), (0.037, 0.035)
_RIM, _WIDE = 0.048, 0.08
_DIRECTIONS = 24
# How far above the grasp the open hand comes straight down, m.
_SWEEP = 0.07
# The hand in its own axes, as boxes (lowest corner, highest corner), measured on the Panda's meshes: all that the
# finger tips sweep as they close (only the bowl's rim may be there), each open finger above that, the palm.
_HAND = (
    ((-0.055, -0.010, -0.020), (0.055, 0.010, 0.009)),
    ((0.045, -0.010, -0.044), (0.065, 0.010, -0.020)),
    ((-0.065, -0.010, -0.044), (-0.045, 0.010, -0.020)),
    ((-0.102, -0.032, -0.100), (0.102, 0.032, -0.031)),
)
_HAND_CORNERS = np.array(_HAND)
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
# A hand is at a grasp within this distance (m) and turn (rad), its fingers at least this far (m) apart.
_AT, _AT_TURN, _AROUND = 0.010, 0.15, 0.03


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
        """Where the hand has to be, (3,) m, for the bowl and the fingers as they are now."""
        height, radius = self.grip
        closed = float(np.clip(1.0 - snapshot.gap / _WIDE, 0.0, 1.0))
        radius += closed * max(_RIM - radius, 0.0)
        return rim_points(snapshot, np.array([self.direction]), (height, radius))[0]

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
    return _cheapest(snapshot, refused, at_hand=False)[1]


def grasp_at_hand(snapshot: Snapshot) -> Grasp | None:
    """The grasp that the hand is already at, if its open fingers are around the rim now.

    It is one of those that `choose_grasp` chooses from, by the same rule, so that who meets a hand at its grasp and
    who brought it there mean the same.
    """
    if snapshot.gap <= _AROUND:
        return None
    cost, grasp = _cheapest(snapshot, (), at_hand=True)
    return grasp if np.isfinite(cost) else None


def _cheapest(snapshot: Snapshot, refused: tuple[float, ...], at_hand: bool) -> tuple[float, Grasp]:
    """The cheapest grasp and its cost, inf if none will do: the low grip unless that is crowded."""
    cost, grasp = _best(snapshot, LOW_GRIP, refused, at_hand)
    if np.isfinite(cost) and grasp.clearance >= _CROWDED:
        return cost, grasp
    others = [_best(snapshot, grip, refused, at_hand) for grip in (HIGH_GRIP, INNER_GRIP)]
    options = [(cost, grasp), *((other + 0.004, taken) for other, taken in others)]
    return min(options, key=lambda option: option[0])


def room(snapshot: Snapshot) -> float:
    """How far (m) from everything but the bowl and the table the hand would be if it opened where it is now."""
    hand = _open_hands(snapshot.hand[None], np.array([hand_yaw(snapshot.hand_rotation)]), 0.0)
    return float(snapshot.obstacles.near(snapshot.hand, 0.2).gap(hand).min())


def _yaws(directions: np.ndarray) -> np.ndarray:
    """The hand's yaw for each direction: turned by half a turn it is the same, so a quarter turn reaches them all."""
    return np.asarray((directions + 1e-9) % np.pi - np.pi / 2)


def _best(
    snapshot: Snapshot, grip: tuple[float, float], refused: tuple[float, ...], at_hand: bool
) -> tuple[float, Grasp]:
    """The cheapest direction at one grip, with its cost in metres of clearance; of those at the hand only, if asked."""
    directions = np.arange(_DIRECTIONS) * (2 * np.pi / _DIRECTIONS) - np.pi
    yaws = _yaws(directions)
    hands = rim_points(snapshot, directions, grip)
    clearance, reach = _clearances(snapshot, hands, yaws), _reach(snapshot, hands)
    cost = 0.015 * np.abs(yaws) / (np.pi / 2) + 0.001 * (directions < 0)
    cost += np.maximum(_WANTED - clearance, 0.0) + 3.0 * np.maximum(_NEEDED - clearance, 0.0)
    cost += 0.5 * np.maximum(reach - _REACH_EASY, 0.0) + 3.0 * np.maximum(reach - _REACH_MOST, 0.0)
    for direction in refused:
        cost += 0.02 * (np.abs(np.angle(np.exp(1j * (directions - direction)))) < 0.3)
    rows = zip(directions.tolist(), yaws.tolist(), clearance.tolist(), strict=True)
    grasps = [Grasp(direction, yaw, grip, room) for direction, yaw, room in rows]
    if at_hand:
        cost = np.where([_is_at(snapshot, grasp) for grasp in grasps], cost, np.inf)
    best = int(np.argmin(cost))
    return float(cost[best]), grasps[best]


def _is_at(snapshot: Snapshot, grasp: Grasp) -> bool:
    away = np.linalg.norm(grasp.position(snapshot) - snapshot.hand)
    return bool(away < _AT and np.linalg.norm(rotation_error(grasp.rotation, snapshot.hand_rotation)) < _AT_TURN)


def _clearances(snapshot: Snapshot, hands: np.ndarray, yaws: np.ndarray) -> np.ndarray:
    """The least gap (C,) m between hands at (C, 3) and anything else, over the way down to the bowl and at the goal."""
    near = snapshot.obstacles.near
    taken = near(snapshot.bowl, 0.2).gap(_open_hands(hands, yaws, _SWEEP))
    there = near(snapshot.goal, 0.2).gap(_open_hands(hands + (snapshot.goal - snapshot.bowl), yaws, 0.0))
    return np.asarray(np.minimum(taken, there).reshape(len(hands), -1).min(axis=1))


def _open_hands(hands: np.ndarray, yaws: np.ndarray, above: float) -> Boxes:
    """The boxes, hand by hand, that open hands at (C, 3) fill, or all that they pass when coming from `above` (m)."""
    low, high = _HAND_CORNERS[:, 0].copy(), _HAND_CORNERS[:, 1]
    low[:, 2] -= above
    rotations = np.stack([hand_rotation(yaw) for yaw in yaws])
    centres = hands[:, None] + np.einsum("cij,bj->cbi", rotations, (low + high) / 2)
    half = np.broadcast_to((high - low) / 2, centres.shape)
    return Boxes(centres.reshape(-1, 3), np.repeat(rotations, len(low), axis=0), half.reshape(-1, 3))


def _reach(snapshot: Snapshot, hands: np.ndarray) -> np.ndarray:
    """How far (C,) the wrist gets from the shoulder, m, for hands (C, 3) at the bowl, or then at the goal."""
    away = np.stack([hands, hands + (snapshot.goal - snapshot.bowl)]) - _SHOULDER
    level = np.linalg.norm(away[..., :2], axis=-1) - _WRIST_BACK
    return np.asarray(np.hypot(level, away[..., 2] + _WRIST_UP).max(axis=0))
