"""One worker process of an evaluation: it opens the policy once, then plays the episodes that it is sent.

A worker that is told nothing more, or whose parent is gone, ends. What it prints goes to a log file of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from .episodes_file import EpisodeRecord
from .gl import RendererError
from .rollout import EpisodeResult, EpisodeSpec, VideoRecorder, run_episode
from .sources import OpenPolicy, PolicySource, noise_seed

MEDIA_DIRECTORY = "media"
# Trying again cannot mend these. The user's: a wrong option, a missing package, a policy that breaks its contract.
USERS = (ValueError, ImportError, FileNotFoundError, PermissionError, RendererError)
# And ours.
OURS = (TypeError, AttributeError, LookupError, NameError, AssertionError)


class SceneSource(Protocol):
    """Where the simulations come from; picklable."""

    def prepare(self, suite: str, tasks: tuple[int, ...], trials: int) -> dict[str, Any]:
        """Check in the parent that these episodes exist; return what decides their outcome, as JSON values."""

    def open(self, suite: str, task: int) -> Any:
        """A simulation with the interface of `turbopi.sim.libero.LiberoEnv`."""


@dataclass(frozen=True)
class Job:
    """One episode to play, and whether to film it."""

    task: int
    initial_state: int
    film: bool = False


@dataclass(frozen=True)
class WorkerPlan:
    """What every worker of a run is told.

    Attributes:
        source: of the policy.
        scenes: of the simulations.
        suite: LIBERO suite.
        seed: of the run.
        replan: actions executed before the next inference.
        threads: of torch on the CPU; the bits of its sums depend on them.
        out: the run's directory.
    """

    source: PolicySource
    scenes: SceneSource
    suite: str
    seed: int
    replan: int
    threads: int
    out: Path


@dataclass(frozen=True)
class Ready:
    """The worker has its policy; `description` says what it turned out to be."""

    description: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """The episode could not be played; `hopeless` if trying again cannot help."""

    message: str
    hopeless: bool


Message = Ready | EpisodeRecord | Failed


def work(plan: WorkerPlan, connection: Connection, log: Path) -> None:
    """Run a worker until it receives None. Sends a `Message` for everything that happens."""
    _settle_process(plan.threads, log)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        policy = _opened(plan.source, connection)
        if policy is not None:
            _play_jobs(_Player(plan, policy), connection)


def _opened(source: PolicySource, connection: Connection) -> OpenPolicy | None:
    try:
        policy = source.open()
        message: Message = Ready(policy.describe())
    except Exception as error:
        connection.send(_failure(error))
        return None
    connection.send(message)
    return policy


def _play_jobs(player: _Player, connection: Connection) -> None:
    try:
        while (job := connection.recv()) is not None:
            try:
                message: Message = player.play(job)
            except Exception as error:
                place = f"{player.plan.suite} task {job.task}, initial state {job.initial_state}"
                message = _failure(error, f"{place}: ")
            connection.send(message)
    finally:
        player.close()


def _settle_process(threads: int, log: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _failure(error: Exception, place: str = "") -> Failed:
    traceback.print_exc()
    kind = "" if isinstance(error, USERS) else f"{type(error).__name__}: "
    return Failed(f"{place}{kind}{error}", isinstance(error, USERS + OURS))


class _Player:
    """A policy and the simulation of the task that was played last; a simulation takes seconds and 1-2 GB."""

    def __init__(self, plan: WorkerPlan, policy: OpenPolicy) -> None:
        self.plan = plan
        self.policy = policy
        self._task: int | None = None
        self._env: Any = None

    def play(self, job: Job) -> EpisodeRecord:
        """Play one episode from its official initial state."""
        plan, start = self.plan, time.perf_counter()
        spec = EpisodeSpec(plan.suite, job.task, job.initial_state, plan.seed)
        policy = self.policy.episode(noise_seed(plan.seed, plan.suite, job.task, job.initial_state))
        env = self._scene(job.task)
        name = f"task{job.task:02d}_state{job.initial_state:02d}"
        video = VideoRecorder(plan.out / MEDIA_DIRECTORY / name) if job.film else None
        result = run_episode(env, policy, spec, replan=plan.replan, video=video)
        media = {} if video is None else _relative(video, plan.out)
        return _record(result, env, media, time.perf_counter() - start)

    def close(self) -> None:
        """Free the simulation."""
        if self._env is not None:
            self._env.close()
            self._env = self._task = None

    def _scene(self, task: int) -> Any:
        if task != self._task:
            self.close()
            self._env, self._task = self.plan.scenes.open(self.plan.suite, task), task
        return self._env


def _record(result: EpisodeResult, env: Any, media: dict[str, Any], wall_s: float) -> EpisodeRecord:
    spec = result.spec
    return EpisodeRecord(
        suite=spec.suite,
        task=spec.task,
        initial_state=spec.initial_state,
        seed=spec.seed,
        prompt=env.task.prompt,
        success=result.success,
        steps=result.steps,
        inferences=result.inferences,
        infer_ms=[round(ms, 3) for ms in result.infer_ms],
        note=result.error,
        error=None,
        attempts=1,
        wall_s=round(wall_s, 3),
        media=media,
        asked=env.asked,
        jerk=result.jerk,
        runtime=result.runtime,
    )


def _relative(video: VideoRecorder, root: Path) -> dict[str, Any]:
    """The files of a film, as paths below the run's directory."""
    frames = [path.relative_to(root).as_posix() for path in video.frames]
    return {"video": video.path.relative_to(root).as_posix(), "frames": frames}
