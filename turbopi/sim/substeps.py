"""robosuite's control step without what was computed already and what nobody reads. Every bit stays what it was.

A control step of 1/20 s is 25 substeps of MuJoCo's. In each, robosuite asks three times for all that follows from the
present state: before the controller, in the controller, and in the substep itself. Between the three neither positions
nor velocities change, so collisions, inertias and bias forces are the same and are kept from the first. What is done
each time is the constraint solver's part, whose solution starts from the one before and so depends on how often it ran.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np


class _Substeps:
    """Stands in for `forward` and `step` of a robosuite simulation."""

    def __init__(self, mujoco: Any, sim: Any) -> None:
        self._mujoco, self._model, self._data = mujoco, sim.model._model, sim.data._data
        self._velocities = int(mujoco.mjtStage.mjSTAGE_VEL)
        self._qpos, self._qvel = self._data.qpos, self._data.qvel
        self._known: tuple[bytes, bytes] | None = None

    def forward(self) -> None:
        """`mj_forward`; of a state that was computed already, only forces and accelerations."""
        if self._is_known():
            self._mujoco.mj_forwardSkip(self._model, self._data, self._velocities, 0)
        else:
            self._mujoco.mj_forward(self._model, self._data)
            # Of NaN nothing is kept: MuJoCo's own step says so and begins anew.
            finite = np.isfinite(self._qpos).all() and np.isfinite(self._qvel).all()
            self._known = self._state() if finite else None

    def step(self, with_udd: bool = True) -> None:
        """`mj_step`; of a state that was computed already, its second half. robosuite ignores `with_udd`, too."""
        if self._is_known():
            self._mujoco.mj_step2(self._model, self._data)
        else:
            self._mujoco.mj_step(self._model, self._data)
        self._known = None

    def _state(self) -> tuple[bytes, bytes]:
        return self._qpos.tobytes(), self._qvel.tobytes()

    def _is_known(self) -> bool:
        return self._known is not None and self._known == self._state()


@contextlib.contextmanager
def each_state_once(mujoco: Any, sim: Any) -> Iterator[None]:
    """Within, `sim` computes what follows from a state once. For a control step, in which nobody changes the model.

    Args:
        mujoco: the package.
        sim: robosuite's `MjSim`. One integrated by Runge-Kutta, whose step has no second half, goes on as it was.
    """
    if sim.model._model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4:
        yield
        return
    substeps = _Substeps(mujoco, sim)
    sim.forward, sim.step = substeps.forward, substeps.step
    try:
        yield
    finally:
        del sim.forward, sim.step


@contextlib.contextmanager
def only_what_is_read(domain: Any) -> Iterator[None]:
    """Within, `domain`, LIBERO's environment, makes no observations (29 a substep) and no reward (the goal again)."""
    domain._update_observables = domain.reward = lambda *_, **__: 0.0
    try:
        yield
    finally:
        del domain._update_observables, domain.reward
