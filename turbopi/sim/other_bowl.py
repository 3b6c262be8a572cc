"""The other bowl: most scenes of libero_spatial hold two black bowls, and another task's prompt describes the second.

Asked for that one, a policy that listens leaves the task's own bowl alone; one that only looks does the task as ever.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal

import numpy as np

from .libero import LiberoEnv, Task, load_task

SUITE = "libero_spatial"
TASKS = 10
TARGET, OTHER, GOAL = "akita_black_bowl_1", "akita_black_bowl_2", "plate_1"

PromptMode = Literal["own", "other-bowl"]
"""What an evaluation tells the policy: the task's own prompt, or the one that describes the scene's other bowl."""


def region_of(bddl: str, thing: str) -> str | None:
    """Where a task description puts a thing at the start: "main_table_next_to_box_region", "cookies_1", …"""
    init = bddl[bddl.index("(:init") :]
    found = re.search(rf"\((?:On|In) {re.escape(thing)} (\S+)\)", init)
    return found[1] if found else None


@cache
def other_prompts() -> dict[int, str]:
    """For each task, the prompt that describes its other bowl: that of the task whose bowl lies in the same place."""
    tasks = [load_task(SUITE, index) for index in range(TASKS)]
    texts = [task.bddl_file.read_text() for task in tasks]
    prompt_of = {region_of(text, TARGET): task.prompt for text, task in zip(texts, tasks, strict=True)}
    found = {index: prompt_of.get(region_of(text, OTHER)) for index, text in enumerate(texts)}
    return {index: prompt for index, prompt in found.items() if prompt is not None}


def other_prompt(task: Task) -> str:
    """The prompt that describes the task's other bowl; ValueError if the scene has none that a prompt describes."""
    if task.suite != SUITE or task.index not in other_prompts():
        raise ValueError(
            f"{task.suite} task {task.index} has no other bowl to ask for; other-bowl prompts are for {SUITE}, "
            "every other suite has its own prompts only"
        )
    return other_prompts()[task.index]


class OtherBowlEnv(LiberoEnv):
    """A scene whose prompt asks for the other bowl. Success stays that of the task's own goal.

    `asked` is whether the asked-for bowl has stood on the plate since the reset, by the predicate of the task's goal.
    """

    def reset(self, initial_state: int | None = None, *, seed: int | None = None, idle_steps: int = 10) -> None:
        """See `LiberoEnv.reset`."""
        super().reset(initial_state, seed=seed, idle_steps=idle_steps)
        self.asked = self.holds("on", OTHER, GOAL)

    def step(self, action: np.ndarray) -> bool:
        """See `LiberoEnv.step`."""
        success = super().step(action)
        self.asked = self.asked or self.holds("on", OTHER, GOAL)
        return success
