"""LIBERO as an evaluation's workers get it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from .gl import choose_gl
from .libero import LiberoEnv, initial_states, load_task
from .other_bowl import OtherBowlEnv, PromptMode, other_prompt

# What changes pictures or physics.
PACKAGES = ("mujoco", "robosuite", "numpy")


@dataclass(frozen=True)
class LiberoScenes:
    """LIBERO's simulations.

    Attributes:
        camera_px: side of the frames that are drawn; openpi draws 256 and sends 224.
        prompts: what the policy is told. Success is always that of the task's own goal.
    """

    camera_px: int = 256
    prompts: PromptMode = "own"

    def prepare(self, suite: str, tasks: tuple[int, ...], trials: int) -> dict[str, Any]:
        """Check that tasks and initial states exist and that something can draw.

        Returns:
            What decides the outcome of an episode, as JSON values.

        Raises:
            ValueError: unknown suite or task, more trials than initial states, or no other bowl to ask for.
            ImportError, RendererError: packages or OpenGL are missing.
        """
        renderer = choose_gl()
        for index in tasks:
            task = load_task(suite, index)
            if self.prompts == "other-bowl":
                other_prompt(task)
            known = len(initial_states(task))
            if trials > known:
                raise ValueError(f"{suite} task {index} has {known} initial states, fewer than {trials} trials")
        versions = {name: metadata.version(name) for name in PACKAGES}
        return {"renderer": renderer, "camera_px": self.camera_px, "prompts": self.prompts, **versions}

    def open(self, suite: str, task: int) -> LiberoEnv:
        """A simulation of one task."""
        described = load_task(suite, task)
        if self.prompts == "own":
            return LiberoEnv(described, camera_px=self.camera_px)
        return OtherBowlEnv(replace(described, prompt=other_prompt(described)), camera_px=self.camera_px)
