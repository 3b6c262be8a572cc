"""A scripted expert for libero_spatial: takes a bowl by the rim and puts it on the plate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .grasp import Grasp, choose_grasp, grasp_at_hand, hand_rotation, hand_yaw, room, rotation_error
from .scene import Scene, Snapshot

OPEN, CLOSE = -1.0, 1.0
PHASES = ("reach", "descend", "grasp", "lift", "carry", "lower", "release", "retreat")
_RIM_HEIGHT = 0.05  # m, over the bowl's origin


@dataclass(frozen=True)
class ExpertConfig:
    """Gains and tolerances; lengths in m, angles in rad, speeds in units of the action."""

    position_gain: float = 28.0  # action per metre; above 20 the controller overshoots a little
    rotation_gain: float = 3.0  # action per radian: 1.5 per unit of 0.5 rad
    top_speed: float = 1.0
    top_turn: float = 0.5
    gentle_speed: float = 0.35  # close to the plate
    lift_speed: float = 0.5  # between walls, where a jerk pulls the fingers off the rim
    free_room: float = 0.010  # an open hand with less room stands between walls; with twice as much, it does not
    grasp_lateral: float = 0.009
    grasp_height: float = 0.008
    least_lateral: float = 0.006  # asked for before going down between walls
    foresight: float = 0.1  # s: the hand slows down for where it will be, or it would overshoot into a wall
    grasp_turn: float = 0.10
    funnel_slope: float = 3.0  # metres of height per metre that the hand is still off to the side
    hover: float = 0.065  # the open fingers clear the rim
    carry_height: float = 0.05
    place_lateral: float = 0.020
    kept_lateral: float = 0.027
    kept_height: float = 0.018
    open_gap: float = 0.060
    missed_gap: float = 0.003
    patience: int = 16  # steps to wait for a grip


class SpatialExpert:
    """Acts from any state: what to do follows from the scene, and memory only keeps it from wavering.

    One expert serves one episode; `replan` forgets it.
    """

    def __init__(
        self,
        env: Any,
        target: str = "akita_black_bowl_1",
        goal: str = "plate_1",
        config: ExpertConfig | None = None,
    ) -> None:
        """Watch an environment.

        Args:
            env: a `LiberoEnv` (only `env.raw.sim` is read, never changed).
            target: the bowl to carry.
            goal: the plate to put it on.
            config: gains and tolerances; None takes the defaults.

        Raises:
            ValueError: the scene has no such object.
        """
        self._scene = Scene(env, target, goal)
        self._config = config or ExpertConfig()
        self.replan()

    def replan(self) -> None:
        """Forget everything: the next action is what an expert would do who sees this state for the first time."""
        self.phase = "reach"
        self._grasp: Grasp | None = None
        self._grasped_from = np.zeros(3)
        self._refused: tuple[float, ...] = ()
        self._model = self._scene.model
        self._closing = 0
        self._unheld = 99
        self._held = False

    @property
    def grasp(self) -> Grasp | None:
        """The grasp that it is going for, None before the first action."""
        return self._grasp

    @property
    def done(self) -> bool:
        """Whether its bowl is on the goal now, by LIBERO's own measure: touching, above, within 3 cm."""
        s = self._scene.read()
        level = s.bowl[:2] - s.goal[:2]
        return s.placed and bool(s.bowl[2] >= s.goal[2]) and bool(np.linalg.norm(level) < 0.03)

    def act(self) -> np.ndarray:
        """The action (7,) float64 in [-1, 1] for the environment's present state."""
        if self._scene.model is not self._model:
            self.replan()
        snapshot = self._scene.read()
        if self._on_goal(snapshot):
            return self._leave(snapshot)
        if self._holding(snapshot):
            return self._carry(snapshot)
        return self._acquire(snapshot)

    def _on_goal(self, s: Snapshot) -> bool:
        """Whether the bowl stands where it belongs; once it is being let go, a bounce does not change that."""
        c = self._config
        lateral = float(np.linalg.norm(s.bowl[:2] - s.goal[:2]))
        if self.phase in ("release", "retreat"):
            return lateral < c.kept_lateral and s.bowl[2] < s.goal[2] + c.kept_height
        return s.placed and lateral < c.place_lateral

    def _holding(self, s: Snapshot) -> bool:
        """Whether the bowl is firmly between the fingers; a grip survives two steps without contact."""
        firm = s.pinched and s.closing > 0.9
        self._unheld = 0 if firm else self._unheld + 1
        self._held = firm or (self._held and self._unheld <= 2 and s.closing > 0.5 and s.gap > self._config.missed_gap)
        return self._held

    def _leave(self, s: Snapshot) -> np.ndarray:
        opened = s.gap > self._config.open_gap
        self.phase = "retreat" if opened else "release"
        self._closing = 0
        return self._action(np.array([0.0, 0.0, 0.01 if opened else 0.0]), self._upright(s), OPEN)

    def _carry(self, s: Snapshot) -> np.ndarray:
        """Move the bowl, not the hand, to the plate: up, across, down a funnel."""
        c = self._config
        self._closing = 0
        lateral = s.goal[:2] - s.bowl[:2]
        off = float(np.linalg.norm(lateral))
        clear = max(s.goal[2] + c.carry_height, self._height_over(s, s.bowl, radius=0.065, below=0.025))
        funnel = s.goal[2] - 0.005 + c.funnel_slope * max(0.0, off - c.grasp_lateral)
        wanted, height = min(funnel, clear), s.bowl[2]
        error = np.array([*lateral, wanted - height])
        error[:2] *= _gate(wanted - height) * _stiffer(off)
        self.phase = "lift" if wanted - height > 0.02 else "lower" if funnel < clear else "carry"
        near = max(0.0, height - s.goal[2] - 0.01)
        free = float(np.clip(room(s) / c.free_room - 1.0, 0.0, 1.0))
        error[2] = min(error[2], (c.lift_speed + free * (c.top_speed - c.lift_speed)) / c.position_gain)
        return self._action(error, self._upright(s), CLOSE, sink=c.gentle_speed + 8.0 * near)

    def _acquire(self, s: Snapshot) -> np.ndarray:
        """Reach over the rim, down a funnel, close."""
        c = self._config
        grasp = self._plan(s)
        there = grasp.position(s)
        error = there - s.hand - c.foresight * s.hand_velocity
        turn = rotation_error(grasp.rotation, s.hand_rotation)
        turned = float(np.linalg.norm(turn))
        off = float(np.linalg.norm((there - s.hand)[:2]))
        if self._close_now(s, off, abs(there[2] - s.hand[2]), turned):
            self.phase = "grasp"
            return self._action(1.5 * error, turn, CLOSE)
        clear = max(there[2] + c.hover, self._height_over(s, s.hand, radius=0.07, below=0.025))
        ready = s.gap > c.open_gap
        play = float(np.clip(grasp.clearance, c.least_lateral, c.grasp_lateral))
        loose = max(0.0, off - play) + 0.15 * max(0.0, turned - c.grasp_turn)
        funnel = there[2] + c.funnel_slope * loose if ready else np.inf
        wanted = min(funnel, clear)
        self.phase = "descend" if funnel < clear else "reach"
        rise = wanted - s.hand[2]
        error[2] = rise - c.foresight * s.hand_velocity[2]
        error[:2] *= _gate(rise) * _stiffer(off)
        return self._action(error, turn, OPEN)

    def _plan(self, s: Snapshot) -> Grasp:
        """The present grasp, or another if the bowl is no longer where that one was chosen."""
        rim = s.bowl + _RIM_HEIGHT * s.bowl_rotation[:, 2]  # moves with the bowl, and when it rights itself
        moved = np.linalg.norm(rim - self._grasped_from) > (0.03 if self._closing else 0.015)
        if self._grasp is None or moved:
            self._grasp = grasp_at_hand(s) or choose_grasp(s, self._refused)
            self._grasped_from = rim
        return self._grasp

    def _close_now(self, s: Snapshot, off: float, height: float, turned: float) -> bool:
        """Whether to close, or to go on closing; a grip that never comes counts against this grasp."""
        c = self._config
        slack = 2.5 if self._closing or s.closing > 0.3 else 1.0
        fits = off < slack * c.grasp_lateral and height < slack * c.grasp_height and turned < slack * c.grasp_turn
        missed = (s.gap < c.missed_gap and not s.pinched) or self._closing > c.patience
        if missed and self._closing and self._grasp is not None:
            self._refused += (self._grasp.direction,)
            self._grasp = None
        self._closing = self._closing + 1 if fits and not missed else 0
        return self._closing > 0

    def _height_over(self, s: Snapshot, point: np.ndarray, radius: float, below: float) -> float:
        """The height (m) that `point` needs so that what reaches `below` it and `radius` around it clears everything.

        Things farther away ask for less, a metre of height per metre of distance, so that the height changes smoothly.
        """
        distance = np.maximum(s.obstacles.lateral(point) - radius, 0.0)
        return float(np.max(s.obstacles.tops() - distance, initial=-np.inf)) + below

    def _upright(self, s: Snapshot) -> np.ndarray:
        return rotation_error(hand_rotation(hand_yaw(s.hand_rotation)), s.hand_rotation)

    def _action(self, error: np.ndarray, turn: np.ndarray, gripper: float, sink: float = 1.0) -> np.ndarray:
        """Proportional control of both errors (3,), each limited in length so that its direction stays."""
        c = self._config
        move = _limit(c.position_gain * error, c.top_speed)
        move[2] = max(move[2], -sink)
        return np.array([*move, *_limit(c.rotation_gain * turn, c.top_turn), gripper])


def _gate(rise: float) -> float:
    """How much of its way sideways something may go that is still `rise` (m) too low: all below 6 mm, none at 24 mm."""
    return float(np.clip(1.0 - (rise - 0.006) / 0.018, 0.0, 1.0))


def _stiffer(off: float) -> float:
    """How much stronger the pull towards the goal becomes within 2 cm of it, where the stretched arm tends to sag."""
    return 1.0 + float(np.exp(-((off / 0.015) ** 2)))


def _limit(vector: np.ndarray, length: float) -> np.ndarray:
    norm = float(np.linalg.norm(vector))
    return vector * (length / norm) if norm > length else np.array(vector)
