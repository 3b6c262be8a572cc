"""LIBERO as an evaluation's workers get it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

from .gl import choose_gl
from .libero import LiberoEnv, initial_states, load_task

# What changes pictures or physics.
PACKAGES = ("mujoco", "robosuite", "numpy")


@dataclass(frozen=True)
class LiberoScenes:
    """LIBERO's simulations.

    Attributes:
        camera_px: side of the frames that are drawn; openpi draws 256 and sends 224.
    """

    camera_px: int = 256

    def prepare(self, suite: str, tasks: tuple[int, ...], trials: int) -> dict[str, Any]:
        """Check that tasks and initial states exist and that something can draw.

        Returns:
            What decides the outcome of an episode, as JSON values.

        Raises:
            ValueError: unknown suite or task, or more trials than initial states.
            ImportError, RendererError: packages or OpenGL are missing.
        """
        renderer = choose_gl()
        for index in tasks:
            known = len(initial_states(load_task(suite, index)))
            if trials > known:
                raise ValueError(f"{suite} task {index} has {known} initial states, fewer than {trials} trials")
        versions = {name: metadata.version(name) for name in PACKAGES}
        return {"renderer": renderer, "camera_px": self.camera_px, **versions}

    def open(self, suite: str, task: int) -> LiberoEnv:
        """A simulation of one task."""
        return LiberoEnv(load_task(suite, task), camera_px=self.camera_px)
