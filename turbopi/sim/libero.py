"""LIBERO tasks in MuJoCo, in openpi's conventions, drawn only when somebody looks."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..transforms import resize_with_pad
from .gl import APT_COMMAND, RendererError, choose_gl
from .substeps import each_state_once, only_what_is_read

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
# openpi's: the longest training demonstration of each suite, with some room.
STEP_LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
CONTROL_HZ = 20
# openpi's seed; beside an official initial state it decides where the fixtures stand.
FIXTURE_SEED = 7
ACTION_DIM = 7
IDLE_ACTION = np.array([0.0] * 6 + [-1.0])
CAMERAS = ("agentview", "robot0_eye_in_hand")
# Newer releases settle objects differently: a bowl slides off its ramekin, and a task becomes another one.
MUJOCO_VERSIONS = ("3.2.3", "3.3.2")
_INSTALL = "pip install 'turbo-pi[sim]'"
_MAX_PLACEMENTS = 100

Pose = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Task:
    """One of a suite's tasks; `prompt` is what the policy is told, `step_limit` excludes the idle steps."""

    suite: str
    index: int
    name: str
    prompt: str
    step_limit: int
    bddl_file: Path


def load_task(suite: str, index: int) -> Task:
    """A task by suite and number, in the benchmark's own order.

    Raises:
        ValueError: no such suite or task.
        ImportError: the simulator's packages are missing.
    """
    benchmark, entry = _entry(suite, index)
    return Task(
        suite=suite,
        index=index,
        name=entry.name,
        prompt=entry.language,
        step_limit=STEP_LIMITS[suite],
        bddl_file=Path(benchmark.get_task_bddl_file_path(index)).resolve(),
    )


def initial_states(task: Task) -> np.ndarray:
    """The official initial states: (50, D) float64, each a flat MuJoCo state (time, positions, velocities)."""
    benchmark, _ = _entry(task.suite, task.index)
    return np.asarray(benchmark.get_task_init_states(task.index), dtype=np.float64)


def _entry(suite: str, index: int) -> tuple[Any, Any]:
    if suite not in SUITES:
        raise ValueError(f"unknown LIBERO suite {suite!r}; known: {', '.join(SUITES)}")
    module = _require("libero.libero.benchmark")
    with contextlib.redirect_stdout(io.StringIO()):
        benchmark = module.get_benchmark_dict()[suite]()
    if not 0 <= index < benchmark.n_tasks:
        raise ValueError(f"{suite} has no task {index}; its tasks are 0 to {benchmark.n_tasks - 1}")
    return benchmark, benchmark.get_task(index)


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if "cannot open shared object file" in str(error):
            raise RendererError(f"the simulator lacks a system library ({error}); install it: {APT_COMMAND}") from error
        raise ImportError(
            f"the LIBERO simulator needs {module.partition('.')[0]}, which cannot be imported ({error}); "
            f"install the extra: {_INSTALL}"
        ) from error


def _require_simulator() -> Any:
    """LIBERO's environments, imported after OpenGL was chosen."""
    version = _require("mujoco").__version__
    if version not in MUJOCO_VERSIONS:
        raise ImportError(
            f"MuJoCo {version} is installed; LIBERO's scenes settle as intended with {' or '.join(MUJOCO_VERSIONS)}: "
            f"pip install mujoco=={MUJOCO_VERSIONS[0]}"
        )
    choose_gl()
    # Its advice about a macro file is of no use to anybody here.
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    return _require("libero.libero.envs")


class LiberoEnv:
    """One MuJoCo simulation of one task, as openpi evaluates it.

    `step` never draws. What is observed is a function of the simulator's present positions alone, so looking, or not
    looking, changes nothing that happens later, and a stored state gives its frames back. robosuite's own observations
    are up to two of its substeps (4 ms, about 1 mm) older.

    `asked` is None: the prompt asks for the task's own goal; see `turbopi.sim.other_bowl`.
    """

    def __init__(self, task: Task, *, camera_px: int = 256, cameras: bool = True) -> None:
        """Load the scene; call `reset` before anything else.

        Args:
            task: from `load_task`.
            camera_px: side of the frames that are drawn, in pixels. openpi draws 256 and sends 224.
            cameras: whether frames may be asked for.

        Raises:
            ImportError: packages are missing, or MuJoCo is a release that changes the tasks.
            RendererError: no off-screen OpenGL.
        """
        if camera_px < 1:
            raise ValueError(f"camera_px is {camera_px}; expected a positive number of pixels")
        self.task = task
        self.camera_px = camera_px
        self.cameras = cameras
        self.asked: bool | None = None
        self.steps = 0
        self._success = False
        self._ready = False
        self._states: np.ndarray | None = None
        envs = _require_simulator()
        self._mujoco = _require("mujoco")
        self._binding = _require("robosuite.utils.binding_utils")
        self._placement_error: type[Exception] = _require("robosuite.utils.errors").RandomizationError
        # Without a renderer of its own robosuite never draws; ours is made when a frame is first wanted.
        with _seeded(FIXTURE_SEED):
            self.raw: Any = self._retry(
                lambda: envs.env_wrapper.ControlEnv(
                    bddl_file_name=str(task.bddl_file),
                    use_camera_obs=False,
                    has_renderer=False,
                    has_offscreen_renderer=False,
                    control_freq=CONTROL_HZ,
                    ignore_done=True,
                )
            )

    def __enter__(self) -> LiberoEnv:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the simulation and its renderer; closing twice is harmless."""
        if self.raw is not None:
            self._ready = False
            self.raw.close()
            self.raw = None

    def reset(self, initial_state: int | None = None, *, seed: int | None = None, idle_steps: int = 10) -> None:
        """Start an episode, and let the objects settle for `idle_steps` steps (an open gripper, no motion).

        Args:
            initial_state: number of an official initial state. None: objects are placed at random in their regions.
            seed: of the random placement. Official states leave open where the fixtures stand (within 1 cm), which the
                seed decides too; there None means `FIXTURE_SEED`.
            idle_steps: openpi waits 10.

        Raises:
            ValueError: no such initial state, or a random placement without a seed.
        """
        self._check_open()
        if initial_state is None and seed is None:
            raise ValueError("a random reset needs a seed; give seed=, or the number of an official initial state")
        state = None if initial_state is None else self._official(initial_state)
        self._place(hard=state is None, seed=FIXTURE_SEED if seed is None else seed)
        if state is not None:
            self.raw.set_init_state(state)
        self._ready = True
        for _ in range(idle_steps):
            self._advance(IDLE_ACTION)
        self.steps = 0
        self._success = bool(self.raw.check_success())

    def step(self, action: np.ndarray) -> bool:
        """Carry out one action for 1/20 s.

        Args:
            action: (7,) end-effector motion (3, in 5 cm), rotation (3, in 0.5 rad), gripper (-1 open, 1 close); the
                controller clips it to [-1, 1].

        Returns:
            Whether the goal holds now.

        Raises:
            InputError: another shape, or values that are not finite.
        """
        self._check_ready()
        values = np.asarray(action)
        if values.shape != (ACTION_DIM,) or values.dtype.kind not in "fiu":
            raise InputError(f"action is {values.shape} {values.dtype}, expected ({ACTION_DIM},) numbers in [-1, 1]")
        if not np.isfinite(values).all():
            raise InputError(f"action has NaN or infinite values ({values}); expected {ACTION_DIM} numbers in [-1, 1]")
        self._success = self._advance(values.astype(np.float64))
        self.steps += 1
        return self._success

    def observe(self, image_size: int = 224) -> dict[str, Any]:
        """Draw both cameras now.

        Returns:
            openpi's LIBERO observation: "observation/image" and "observation/wrist_image" (image_size, image_size, 3)
            uint8, rotated by 180° and resized; "observation/state" (8,) float64; "prompt".
        """
        agentview, wrist = self.frames()
        return {
            "observation/image": resize_with_pad(agentview, image_size),
            "observation/wrist_image": resize_with_pad(wrist, image_size),
            "observation/state": self.state,
            "prompt": self.task.prompt,
        }

    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        """Agent view and wrist view now, (camera_px, camera_px, 3) uint8, rotated by 180° as policies see them.

        Raises:
            ValueError: the environment was made without cameras.
            RendererError: OpenGL fails.
        """
        self._check_ready()
        if not self.cameras:
            raise ValueError("this environment was made with cameras=False and cannot draw; make it with cameras=True")
        self._update_positions()
        sim = self.raw.sim
        if sim._render_context_offscreen is None:
            self._make_renderer()
        # Another environment of this process may have drawn since.
        sim._render_context_offscreen.gl_ctx.make_current()
        agentview, wrist = (
            np.ascontiguousarray(sim.render(width=self.camera_px, height=self.camera_px, camera_name=name)[::-1, ::-1])
            for name in CAMERAS
        )
        return agentview, wrist

    @property
    def state(self) -> np.ndarray:
        """(8,) float64: end-effector position (m), rotation (axis-angle, rad), the two gripper joints (m)."""
        self._check_ready()
        self._update_positions()
        robot, data = self.raw.robots[0], self.raw.sim.data
        w, x, y, z = data.get_body_xquat(robot.robot_model.eef_name)
        gripper = [data.qpos[i] for i in robot._ref_gripper_joint_pos_indexes]
        rotation = axis_angle(np.array([x, y, z, w]))
        return np.concatenate([data.site_xpos[robot.eef_site_id], rotation, gripper])

    @property
    def success(self) -> bool:
        """Whether the goal held after the last step."""
        return self._success

    def holds(self, predicate: str, thing: str, place: str) -> bool:
        """Whether one of LIBERO's predicates holds now, such as `holds("on", "akita_black_bowl_1", "plate_1")`."""
        self._check_ready()
        return bool(self.raw.env._eval_predicate([predicate, thing, place]))

    def poses(self) -> dict[str, Pose]:
        """Where everything is, which no policy may know.

        Returns:
            Position (3,) in metres and quaternion (4,) xyzw in the world, by name: every object, fixture and site of
            the task, and "gripper" (the point between the finger tips).
        """
        self._check_ready()
        self._update_positions()
        domain, data = self.raw.env, self.raw.sim.data
        poses = {
            name: (data.body_xpos[body].copy(), np.roll(data.body_xquat[body], -1))
            for name, body in domain.obj_body_id.items()
        }
        for name in domain.object_sites_dict:
            poses[name] = (data.get_site_xpos(name).copy(), self._matrix_to_quaternion(data.get_site_xmat(name)))
        robot = self.raw.robots[0]
        eef_quat = np.roll(data.get_body_xquat(robot.robot_model.eef_name), -1)
        poses["gripper"] = (data.site_xpos[robot.eef_site_id].copy(), eef_quat)
        return poses

    def _matrix_to_quaternion(self, matrix: np.ndarray) -> np.ndarray:
        quaternion = np.empty(4)
        self._mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(matrix).reshape(9))
        return np.roll(quaternion, -1)

    def _advance(self, action: Any) -> bool:
        with each_state_once(self._mujoco, self.raw.sim), only_what_is_read(self.raw.env):
            _, _, done, _ = self.raw.step(action)
        return bool(done)

    def _official(self, number: int) -> np.ndarray:
        if self._states is None:
            self._states = initial_states(self.task)
        if not 0 <= number < len(self._states):
            raise ValueError(
                f"{self.task.suite} task {self.task.index} has no initial state {number}; "
                f"it has 0 to {len(self._states) - 1}"
            )
        return self._states[number]

    def _update_positions(self) -> None:
        """Bring bodies, cameras and lights to the present joint positions; a step leaves them one substep behind.

        Only what follows from positions: a full forward pass would also move the contact solver's warm start, and
        looking would then change the physics.
        """
        model, data = self.raw.sim.model._model, self.raw.sim.data._data
        self._mujoco.mj_kinematics(model, data)
        self._mujoco.mj_comPos(model, data)
        self._mujoco.mj_camlight(model, data)

    def _place(self, *, hard: bool, seed: int) -> None:
        """robosuite's reset, made to depend on nothing but its arguments.

        A soft reset (50 times as fast) leaves fixtures where it placed objects for new ones: enough for official
        states, which place every object themselves.
        """
        domain = self.raw.env
        domain.hard_reset = hard
        if hard:
            # Loading the scene appends its samplers to this list again, and each draws from the generator.
            domain.object_property_initializers.clear()
        else:
            # The fingers' command is remembered over a soft reset.
            gripper = self.raw.robots[0].gripper
            gripper.current_action = np.zeros_like(gripper.current_action)
        with _seeded(seed):
            self._retry(domain.reset)

    def _make_renderer(self) -> None:
        data = self.raw.sim.data
        warm_start = data.qacc_warmstart.copy()
        try:
            context = self._binding.MjRenderContextOffscreen(self.raw.sim, device_id=-1)
        except Exception as error:
            raise RendererError(
                f"OpenGL cannot draw off-screen here ({type(error).__name__}: {error}); "
                f"set MUJOCO_GL to egl or osmesa, or install it: {APT_COMMAND}"
            ) from error
        # It ran a full forward pass.
        data.qacc_warmstart[:] = warm_start
        # Collision shapes hidden, visual ones shown, as robosuite does for its own.
        context.vopt.geomgroup[0], context.vopt.geomgroup[1] = 0, 1

    def _retry(self, place: Any) -> Any:
        """Call `place` until the sampler finds room for every object, which it gives up on now and then."""
        for _ in range(_MAX_PLACEMENTS - 1):
            with contextlib.suppress(self._placement_error):
                return place()
        return place()

    def _check_open(self) -> None:
        if self.raw is None:
            raise ValueError("this environment is closed; make another")

    def _check_ready(self) -> None:
        self._check_open()
        if not self._ready:
            raise ValueError("this environment has no episode yet; call reset() first")


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """openpi's axis-angle (3,) float64 of a quaternion (4,) xyzw: the rotation's angle, 0 to 2π, times its axis."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    length = np.sqrt(1.0 - w * w)
    if np.isclose(length, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3] * 2.0 * np.arccos(w) / length, dtype=np.float64)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Run with NumPy's global generator, from which LIBERO draws, at a seed; then give it back as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
