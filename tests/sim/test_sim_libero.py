"""The real simulator, drawn in software. Two scenes are loaded; the tests share them."""

import contextlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from turbopi.errors import InputError
from turbopi.sim import libero
from turbopi.sim.gl import RendererError
from turbopi.sim.libero import SUITES, LiberoEnv, axis_angle, initial_states, load_task
from turbopi.sim.rollout import EpisodeSpec, run_episode
from turbopi.sim.video import VideoRecorder
from turbopi.transforms import resize_with_pad

pytest.importorskip("libero")

RECORD = Path(__file__).parents[1] / "data" / "libero_frames.npz"
# The official initial state of task 4 that the record's episode began from, found by trying all 50.
RECORDED_STATE = 3


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    with LiberoEnv(load_task("libero_spatial", 4)) as made:
        yield made


@pytest.fixture(scope="module")
def blind() -> Iterator[LiberoEnv]:
    with LiberoEnv(load_task("libero_spatial", 0), cameras=False) as made:
        yield made


def actions(count: int) -> np.ndarray:
    values = np.random.default_rng(0).normal(0, 0.5, (count, 7))
    values[:, 2] -= 0.4
    values[:, 6] = np.sign(values[:, 6])
    return np.clip(values, -1, 1)


def trajectory(env: LiberoEnv, count: int, look: int = 0) -> np.ndarray:
    """Every state of the whole simulation, drawing every `look` steps."""
    rows = []
    for i, action in enumerate(actions(count)):
        env.step(action)
        if look and i % look == 0:
            env.frames()
        rows.append(env.raw.get_sim_state())
    return np.array(rows)


@pytest.mark.parametrize(("suite", "limit"), list(zip(SUITES, (220, 280, 300, 520), strict=True)))
def test_tasks(suite: str, limit: int, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [load_task(suite, i) for i in range(10)]
    assert len({task.prompt for task in tasks}) == 10
    assert {task.step_limit for task in tasks} == {limit}
    assert all(task.bddl_file.is_file() for task in tasks)
    states = initial_states(tasks[3])
    assert len(states) == 50
    assert states.dtype == np.float64
    assert capsys.readouterr().out == ""


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"'libero_90'.*libero_spatial, libero_object, libero_goal, libero_10"):
        load_task("libero_90", 0)
    for index in (10, -1):
        with pytest.raises(ValueError, match=f"no task {index}; its tasks are 0 to 9"):
            load_task("libero_goal", index)


def test_the_record_of_another_program(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    # robosuite's own observations are compared here.
    monkeypatch.setattr(libero, "only_what_is_read", lambda _: contextlib.nullcontext())
    record = np.load(RECORD)
    first = int(np.flatnonzero((record["task"] == 4) & (record["tick"] == 0))[0])
    env.reset(RECORDED_STATE)
    assert env.task.prompt == record["prompt"][first]
    np.testing.assert_allclose(env.state, record["state"][first], atol=1e-3)
    for ours, raw in zip(env.frames(), (record["agentview"][first], record["wrist"][first]), strict=True):
        # robosuite's own observation is a few milliseconds older, and a GPU draws edges differently.
        assert np.abs(ours.astype(int) - raw[::-1, ::-1]).mean() < 1.5
    for row, action in ((first, record["expert_action"][first]), (first + 1, None)):
        theirs = env.raw.env._get_observations()
        np.testing.assert_allclose(theirs["robot0_eef_pos"], record["state"][row, :3], atol=1e-6)
        np.testing.assert_allclose(theirs["robot0_gripper_qpos"], record["state"][row, 6:], atol=1e-6)
        if action is not None:
            env.step(action)


def test_observation(env: LiberoEnv) -> None:
    env.reset(0)
    seen = env.observe()
    agentview, wrist = env.frames()
    assert agentview.shape == wrist.shape == (256, 256, 3)
    np.testing.assert_array_equal(seen["observation/image"], resize_with_pad(agentview, 224))
    np.testing.assert_array_equal(seen["observation/wrist_image"], resize_with_pad(wrist, 224))
    assert seen["observation/state"].shape == (8,)
    assert seen["observation/state"].dtype == np.float64
    assert seen["prompt"] == env.task.prompt
    assert env.observe(112)["observation/image"].shape == (112, 112, 3)
    # Upright: the table, which is bright, is below; the wall above.
    assert agentview[-60:].mean() > agentview[:60].mean()


def test_same_seed_and_state_same_frames(env: LiberoEnv) -> None:
    runs = []
    for before in (None, 9):
        if before is not None:
            env.reset(seed=before)
            trajectory(env, 5)
        env.reset(2, seed=3)
        runs.append((*env.frames(), trajectory(env, 25), *env.frames()))
    for one, other in zip(*runs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_looking_changes_nothing(env: LiberoEnv) -> None:
    env.reset(seed=1)  # a new simulation, and no renderer yet
    blindly = trajectory(env, 25)
    env.reset(seed=1)
    np.testing.assert_array_equal(trajectory(env, 25, look=8), blindly)


def test_what_is_left_out_changes_no_bit(blind: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    """robosuite's own substeps, arm and gripper pressed against things; and half of the work is really left out."""
    blind.reset(2, seed=1)
    once = trajectory(blind, 40)
    whole, skipped = [], []
    forward, skip = blind._mujoco.mj_forward, blind._mujoco.mj_forwardSkip
    monkeypatch.setattr(blind._mujoco, "mj_forward", lambda *a: (whole.append(1), forward(*a)))
    monkeypatch.setattr(blind._mujoco, "mj_forwardSkip", lambda *a: (skipped.append(1), skip(*a)))
    blind.step(actions(1)[0])
    assert len(whole) == len(skipped) == 25
    monkeypatch.undo()
    for shortened in ("each_state_once", "only_what_is_read"):
        monkeypatch.setattr(libero, shortened, lambda *_: contextlib.nullcontext())
    blind.reset(2, seed=1)
    np.testing.assert_array_equal(trajectory(blind, 40), once)
    assert blind.raw.sim.data._data.ncon > 0


def test_a_stored_state_gives_its_frames_back(env: LiberoEnv) -> None:
    env.reset(1)
    trajectory(env, 12)
    stored, frames, state = env.raw.get_sim_state(), env.frames(), env.state
    trajectory(env, 3)
    env.raw.set_state(stored)
    np.testing.assert_array_equal(env.frames(), frames)
    np.testing.assert_array_equal(env.state, state)


def test_soft_resets_are_as_good_as_hard_ones(blind: LiberoEnv) -> None:
    blind.reset(6)
    soft = trajectory(blind, 30)
    blind._place(hard=True, seed=libero.FIXTURE_SEED)
    blind.raw.set_init_state(initial_states(blind.task)[6])
    for _ in range(10):
        blind.raw.step(libero.IDLE_ACTION)
    np.testing.assert_array_equal(trajectory(blind, 30), soft)


def test_random_resets(blind: LiberoEnv) -> None:
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    bowls = []
    for seed in (1, 2, 1):
        blind.reset(seed=seed)
        bowls.append(blind.poses()["akita_black_bowl_1"][0])
        assert not blind.success
    assert np.random.rand() == expected  # the caller's stream was left alone
    np.testing.assert_array_equal(bowls[0], bowls[2])
    assert np.abs(bowls[0] - bowls[1]).max() > 1e-3


def test_poses(blind: LiberoEnv) -> None:
    blind.reset(0)
    poses = blind.poses()
    assert {"akita_black_bowl_1", "plate_1", "wooden_cabinet_1", "wooden_cabinet_1_top_region", "gripper"} <= set(poses)
    for position, quaternion in poses.values():
        assert position.shape == (3,)
        assert np.linalg.norm(quaternion) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(poses["gripper"][0], blind.state[:3])
    np.testing.assert_allclose(axis_angle(poses["gripper"][1]), blind.state[3:6])


def test_the_robot_moves_as_told(blind: LiberoEnv) -> None:
    blind.reset(0)
    before = blind.state
    for _ in range(10):
        blind.step(np.array([0, 1, 0, 0, 0, 0, 1]))
    moved = blind.state - before
    assert moved[1] > 0.1
    assert np.abs(moved[[0, 2]]).max() < 0.03
    assert np.ptp(blind.state[6:]) < 0.02 < np.ptp(before[6:])
    assert blind.steps == 10


@pytest.mark.parametrize("action", [np.zeros(6), np.zeros((1, 7)), np.full(7, np.nan), np.array(["a"] * 7)])
def test_bad_actions(blind: LiberoEnv, action: np.ndarray) -> None:
    blind.reset(0, idle_steps=0)
    with pytest.raises(InputError, match="expected"):
        blind.step(action)
    assert blind.steps == 0


def test_bad_resets(blind: LiberoEnv) -> None:
    for number in (50, -1):
        with pytest.raises(ValueError, match=f"no initial state {number}; it has 0 to 49"):
            blind.reset(number)
    with pytest.raises(ValueError, match="needs a seed"):
        blind.reset()


def test_a_blind_environment_does_not_draw(blind: LiberoEnv) -> None:
    blind.reset(0, idle_steps=0)
    with pytest.raises(ValueError, match="cameras=False"):
        blind.observe()


class Reaching:
    """Moves the hand in +y; remembers when it looked."""

    def __init__(self, env: LiberoEnv) -> None:
        self.env = env
        self.looked: list[int] = []

    def reset(self) -> None:
        self.looked.clear()

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        self.looked.append(self.env.steps)
        return {"actions": np.tile([0, 0.3, 0, 0, 0, 0, -1], (10, 1))}


def test_an_episode(env: LiberoEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = SimpleNamespace(suite="libero_spatial", index=4, prompt=env.task.prompt, step_limit=12)
    monkeypatch.setattr(env, "task", task)
    drawn: list[str] = []
    render = type(env.raw.sim).render
    monkeypatch.setattr(
        type(env.raw.sim), "render", lambda sim, **k: drawn.append(k["camera_name"]) or render(sim, **k)
    )
    policy, spec = Reaching(env), EpisodeSpec("libero_spatial", 4, 0, seed=0)
    monkeypatch.setattr(env, "_states", initial_states(load_task("libero_spatial", 4)))
    result = run_episode(env, policy, spec, replan=5)
    assert (result.success, result.steps, result.inferences, result.error) == (False, 12, 3, None)
    assert policy.looked == [0, 5, 10]
    assert drawn == ["agentview", "robot0_eye_in_hand"] * 3
    reached = env.state
    with VideoRecorder(tmp_path / "episode") as video:
        run_episode(env, policy, spec, replan=5, video=video)
    np.testing.assert_array_equal(env.state, reached)
    assert video.path.stat().st_size > 1000
    assert len(video.frames) == 8


def test_axis_angle() -> None:
    half = np.sqrt(0.5)
    np.testing.assert_allclose(axis_angle(np.array([half, 0, 0, half])), [np.pi / 2, 0, 0])
    # As openpi: an angle above π stays above π, and a w out of range by rounding is clipped.
    np.testing.assert_allclose(axis_angle(np.array([0, half, 0, -half])), [0, 3 * np.pi / 2, 0])
    np.testing.assert_array_equal(axis_angle(np.array([0.0, 0, 0, 1 + 1e-9])), np.zeros(3))


def test_life_of_an_environment(blind: LiberoEnv) -> None:
    fresh = LiberoEnv.__new__(LiberoEnv)
    fresh.raw, fresh._ready = object(), False
    with pytest.raises(ValueError, match=r"call reset\(\) first"):
        fresh.step(np.zeros(7))
    fresh.raw = None
    fresh.close()
    with pytest.raises(ValueError, match="closed"):
        fresh.reset(0)
    with pytest.raises(ValueError, match="camera_px is 0"):
        LiberoEnv(blind.task, camera_px=0)


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        ("No module named 'libero'", ImportError, r"needs libero.*turbo-pi\[sim\]"),
        ("libGL.so.1: cannot open shared object file", RendererError, "libGL.so.1.*apt-get install"),
    ],
)
def test_missing_packages(monkeypatch: pytest.MonkeyPatch, failure: str, kind: type[Exception], message: str) -> None:
    def fail(name: str) -> Any:
        raise ImportError(failure)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(kind, match=message):
        load_task("libero_spatial", 0)


def test_another_mujoco(monkeypatch: pytest.MonkeyPatch, blind: LiberoEnv) -> None:
    monkeypatch.setattr(libero, "_require", lambda name: SimpleNamespace(__version__="3.17.0"))
    with pytest.raises(ImportError, match=r"MuJoCo 3\.17\.0.*pip install mujoco==3\.2\.3"):
        LiberoEnv(blind.task)


def test_a_renderer_that_fails(monkeypatch: pytest.MonkeyPatch, blind: LiberoEnv) -> None:
    blind.reset(0, idle_steps=0)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no EGL display")

    monkeypatch.setattr(blind, "cameras", True)
    monkeypatch.setattr(blind._binding, "MjRenderContextOffscreen", fail)
    with pytest.raises(RendererError, match=r"no EGL display.*apt-get install"):
        blind.frames()


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, turbopi.sim.libero, turbopi.sim.rollout; "
        "sys.exit(any(m in sys.modules for m in ('mujoco', 'robosuite', 'libero', 'OpenGL', 'imageio')))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
