"""Asking for the scene's other bowl."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("libero")

from turbopi.sim.episodes_file import read_records
from turbopi.sim.libero import load_task
from turbopi.sim.other_bowl import GOAL, OTHER, TARGET, OtherBowlEnv, other_prompt
from turbopi.sim.simulations import LiberoScenes
from turbopi.sim.summary import summarize

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def move(env: OtherBowlEnv, thing: str, place: str) -> None:
    """Put a thing where another one stands, a little higher, and let it fall."""
    simulation = env.raw.sim
    target = simulation.data.get_body_xpos(f"{place}_main").copy()
    joint = f"{thing}_joint0"
    pose = simulation.data.get_joint_qpos(joint).copy()
    pose[:3] = target
    pose[2] += 0.05
    simulation.data.set_joint_qpos(joint, pose)
    simulation.data.set_joint_qvel(joint, np.zeros(6))
    simulation.forward()


def test_the_other_bowl_is_asked_for_and_the_tasks_goal_judged() -> None:
    idle = np.array([0.0] * 6 + [-1.0])
    scenes = LiberoScenes(prompts="other-bowl")
    with scenes.open("libero_spatial", 2) as env:
        assert isinstance(env, OtherBowlEnv)
        assert env.task.prompt == load_task("libero_spatial", 8).prompt
        env.reset(0, seed=7)
        assert env.asked is False
        move(env, OTHER, GOAL)
        for _ in range(20):
            env.step(idle)
        assert env.asked is True
        assert not env.success
        assert env.holds("on", OTHER, GOAL)
        assert not env.holds("on", TARGET, GOAL)
        move(env, OTHER, TARGET)
        env.step(idle)
        assert env.asked is True, "it stood there once"
        env.reset(0, seed=7)
        assert env.asked is False


def test_every_spatial_task_has_another_bowl_and_other_suites_do_not() -> None:
    tasks = [load_task("libero_spatial", index) for index in range(10)]
    assert all(other_prompt(task) in {t.prompt for t in tasks} - {task.prompt} for task in tasks)
    facts = LiberoScenes(prompts="other-bowl").prepare("libero_spatial", (0, 9), 1)
    assert facts["prompts"] == "other-bowl"
    assert LiberoScenes().prepare("libero_object", (0,), 1)["prompts"] == "own"
    with pytest.raises(ValueError, match="libero_object task 0 has no other bowl"):
        LiberoScenes(prompts="other-bowl").prepare("libero_object", (0,), 1)


def test_runs_from_before_the_option_are_read() -> None:
    records = read_records(RESULTS / "libero_spatial_h200")
    assert len(records) == 200
    assert summarize(records, 50)["total"]["asked"] is None
