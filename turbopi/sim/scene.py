"""What the scripted expert knows of a LIBERO scene: the hand, the bowl, the goal, and what stands in the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_HAND_SITE = "gripper0_grip_site"
_FINGERS = (
    ("gripper0_finger1_pad_collision", "gripper0_finger1_collision"),
    ("gripper0_finger2_pad_collision", "gripper0_finger2_collision"),
)
_FINGER_JOINTS = ("gripper0_finger_joint1", "gripper0_finger_joint2")
_FINGER_TRAVEL = 0.04
_NO_OBSTACLE = ("robot0_", "gripper0_", "mount0_", "world", "table", "floor")


@dataclass(frozen=True)
class Boxes:
    """N oriented boxes: `centre` (N, 3) m, `rotation` (N, 3, 3), axes as columns, `half` sides (N, 3) m."""

    centre: np.ndarray
    rotation: np.ndarray
    half: np.ndarray

    def near(self, point: np.ndarray, distance: float) -> Boxes:
        """The boxes that may reach within `distance` (m) of a point (3,)."""
        reach = np.linalg.norm(self.half, axis=1) + distance
        keep = np.linalg.norm(self.centre - point, axis=1) < reach
        return Boxes(self.centre[keep], self.rotation[keep], self.half[keep])

    def gap(self, other: Boxes) -> np.ndarray:
        """How far apart (M,) m each of M `other` boxes is from the nearest of these; inf where there is none.

        Measured along the boxes' own axes, which never says more than the true distance. Negative: how far one must
        move to come free, so that a thin wall in the middle of a box counts as deep and not as its own thickness.
        """
        if not len(self.half):
            return np.full(len(other.half), np.inf)
        between = self.centre[None] - other.centre[:, None]
        turned = np.abs(np.einsum("mki,nkj->mnij", other.rotation, self.rotation))
        along_other = np.abs(np.einsum("mnk,mki->mni", between, other.rotation)) - other.half[:, None]
        along_other -= np.einsum("mnij,nj->mni", turned, self.half)
        along_self = np.abs(np.einsum("mnk,nkj->mnj", between, self.rotation)) - self.half[None]
        along_self -= np.einsum("mnij,mi->mnj", turned, other.half)
        apart = np.maximum(along_other.max(axis=-1), along_self.max(axis=-1))
        return np.asarray(apart.min(axis=1))

    def tops(self) -> np.ndarray:
        """Height (N,) of each box's highest point, m."""
        return self.centre[:, 2] + np.einsum("nj,nj->n", np.abs(self.rotation[:, 2, :]), self.half)

    def lateral(self, point: np.ndarray) -> np.ndarray:
        """Horizontal distance (N,) from a point (3,) to each box's bounding rectangle, m."""
        extent = np.einsum("nij,nj->ni", np.abs(self.rotation[:, :2, :]), self.half)
        return np.linalg.norm(np.maximum(np.abs(point[:2] - self.centre[:, :2]) - extent, 0.0), axis=1)


@dataclass(frozen=True)
class Snapshot:
    """A scene now; positions (3,) m, rotations (3, 3).

    `hand` is the point between the finger tips, its velocity in m/s; its rotation's x axis runs from finger to finger,
    its z axis out of the hand. `gap` (m) is how far the fingers are apart, 0 to 0.08; `closing` is how far they were
    told to close, 0 to 1. `pinched`: both fingers touch the bowl. `placed`: the bowl touches the goal. `obstacles`:
    everything but the robot, the table and the bowl.
    """

    hand: np.ndarray
    hand_rotation: np.ndarray
    hand_velocity: np.ndarray
    gap: float
    closing: float
    bowl: np.ndarray
    bowl_rotation: np.ndarray
    goal: np.ndarray
    pinched: bool
    placed: bool
    obstacles: Boxes


class Scene:
    """Reads snapshots of one environment, whichever model it holds at the time (a hard reset makes a new one)."""

    def __init__(self, env: Any, target: str, goal: str) -> None:
        """Remember whom to watch.

        Args:
            env: a `LiberoEnv`; only `env.raw.sim` is read.
            target: name of the bowl to carry.
            goal: name of the plate that it belongs on.

        Raises:
            ValueError: the scene has no such object.
        """
        self._env = env
        self._names = {"target": f"{target}_main", "goal": f"{goal}_main"}
        self._model: Any = None
        self._index()

    @property
    def model(self) -> Any:
        """The simulator's present model: another object after a hard reset."""
        return self._env.raw.sim.model._model

    def read(self) -> Snapshot:
        """The scene after the last step."""
        if self.model is not self._model:
            self._index()
        data = self._env.raw.sim.data._data
        fingers = data.qpos[self._fingers]
        touching, bowl, goal = self._touching(data.contact.geom)
        return Snapshot(
            hand=data.site_xpos[self._hand].copy(),
            hand_rotation=data.site_xmat[self._hand].reshape(3, 3).copy(),
            hand_velocity=self._env.raw.sim.data.get_site_xvelp(_HAND_SITE).copy(),
            gap=float(np.abs(fingers).sum()),
            closing=float(1.0 - np.abs(data.ctrl[self._actuators]).mean() / _FINGER_TRAVEL),
            bowl=data.xpos[self._target].copy(),
            bowl_rotation=data.xmat[self._target].reshape(3, 3).copy(),
            goal=data.xpos[self._goal].copy(),
            pinched=all((finger & bowl[:, ::-1]).any() for finger in touching),
            placed=bool((bowl & goal[:, ::-1]).any()),
            obstacles=self._boxes(data),
        )

    def _index(self) -> None:
        """Look up names in the present model."""
        model = self._env.raw.sim.model
        self._model = model._model
        bodies = {model.body_id2name(i): i for i in range(model.nbody)}
        for role, name in self._names.items():
            if name not in bodies:
                known = sorted(b.removesuffix("_main") for b in bodies if b.endswith("_main"))
                raise ValueError(f"the scene has no {role} {name.removesuffix('_main')!r}; it has {', '.join(known)}")
        self._target, self._goal = bodies[self._names["target"]], bodies[self._names["goal"]]
        self._hand = model.site_name2id(_HAND_SITE)
        self._finger_geoms = [[model.geom_name2id(name) for name in finger] for finger in _FINGERS]
        self._fingers = [int(model.get_joint_qpos_addr(name)) for name in _FINGER_JOINTS]
        joints = [model.joint_name2id(name) for name in _FINGER_JOINTS]
        self._actuators = [i for i in range(model.nu) if self._model.actuator_trnid[i, 0] in joints]
        solid = (self._model.geom_contype | self._model.geom_conaffinity) > 0
        owner = self._model.geom_bodyid
        free = np.array([not (model.body_id2name(b) or "world").startswith(_NO_OBSTACLE) for b in owner])
        self._solid = np.flatnonzero(solid & free & (owner != self._target))

    def _touching(self, pairs: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Of contact pairs (C, 2): which side is each finger, the bowl, the goal; each (C, 2) bool."""
        owner = self._model.geom_bodyid[pairs]
        return [np.isin(pairs, geoms) for geoms in self._finger_geoms], owner == self._target, owner == self._goal

    def _boxes(self, data: Any) -> Boxes:
        rotation = data.geom_xmat[self._solid].reshape(-1, 3, 3)
        bounds = self._model.geom_aabb[self._solid]
        centre = data.geom_xpos[self._solid] + np.einsum("nij,nj->ni", rotation, bounds[:, :3])
        return Boxes(centre, rotation, bounds[:, 3:])
