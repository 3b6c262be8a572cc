"""Where an evaluation gets its policy from: a checkpoint, loaded in every worker, or a server behind a websocket.

A source is small, frozen and can be sent to another process; `open` makes the policy there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..quant import CALIBRATION_FILE

if TYPE_CHECKING:
    from ..policy import Policy as ModelPolicy
    from ..transforms import Robot

CAMERA_KEYS = ("observation/image", "observation/wrist_image")
STATE = {"observation/state": 8}
ACTION_DIM = 7
_SAMPLE_BYTES = 65_536


class EpisodePolicy(Protocol):
    """What one episode asks of a policy."""

    def infer(self, observation: dict[str, Any], /) -> dict[str, Any]:
        """Return {"actions": (H,7), …} for an observation in openpi's LIBERO keys."""

    def reset(self) -> None:
        """Start the episode."""


@runtime_checkable
class ActingPolicy(Protocol):
    """A policy that plays its chunks itself, one action a control tick."""

    def act(self, observe: Callable[[], Mapping[str, Any]]) -> Any:
        """The action of this tick, as `turbopi.runtime.controller.Act`; `observe` is called where it infers."""

    def reset(self) -> None:
        """Start the episode."""


class OpenPolicy(Protocol):
    """A policy that is ready to play episodes, in one process."""

    def describe(self) -> dict[str, Any]:
        """Everything that makes its actions what they are, as JSON values."""

    def episode(self, noise_seed: int) -> EpisodePolicy | ActingPolicy:
        """The policy for one episode, with its noise from that seed."""


class PolicySource(Protocol):
    """How to get a policy; picklable."""

    def describe(self) -> dict[str, Any]:
        """What identifies the policy, as JSON values, without loading it."""

    def open(self) -> OpenPolicy:
        """Make it ready. Raises ValueError or OSError that says why it cannot be."""


def noise_seed(seed: int, suite: str, task: int, initial_state: int) -> int:
    """The seed of one episode's noise, 0 to 2^63 - 1: a function of nothing else, so that runs can be paired."""
    text = f"{seed}/{suite}/{task}/{initial_state}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint in this process.

    Attributes:
        path: the checkpoint's directory.
        options: keyword arguments of `turbopi.load_policy`, but for the path and the seed.
    """

    path: Path
    options: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The path, what its files hold, and the options."""
        options = {k: _described(v) for k, v in self.options.items() if not (k == "runtime" and v is None)}
        return {"checkpoint": str(self.path.resolve()), "fingerprint": fingerprint(self.path), **options}

    def load(self) -> ModelPolicy:
        """Load the policy. Raises what `load_policy` does, and ValueError for a robot that LIBERO is not."""
        from ..policy import load_policy

        policy = load_policy(self.path, **self.options)
        check_robot(policy.transforms.robot, str(self.path))
        return policy

    def open(self) -> OpenPolicy:
        """The policy, ready to play; raises as `load`."""
        return LocalPolicy(self.load())


class LocalPolicy:
    """A policy of this process, as an `OpenPolicy`."""

    def __init__(self, policy: ModelPolicy) -> None:
        self._policy = policy

    def describe(self) -> dict[str, Any]:
        """See `OpenPolicy`."""
        return self._policy.describe()

    def episode(self, noise_seed: int) -> EpisodePolicy | ActingPolicy:
        """See `OpenPolicy`; the episodes share transforms and engine. With chunking, the runtime plays the chunks."""
        policy = self._policy
        own = type(policy)(policy.transforms, policy.engine, replace(policy.runtime, seed=noise_seed))
        return own if policy.runtime.chunking is None else own.controller()


def _described(option: Any) -> Any:
    if isinstance(option, Path):
        return str(option)
    return option.to_dict() if hasattr(option, "to_dict") else option


def check_robot(robot: Robot, name: str) -> None:
    """Raise ValueError unless LIBERO's observations and actions are those of the robot."""
    cameras = {robot.image_name(camera) for camera in robot.cameras if camera.required}
    state = {part.key: part.size for part in robot.state}
    if cameras <= set(CAMERA_KEYS) and state == STATE and robot.action_dim == ACTION_DIM:
        return
    raise ValueError(
        f"{name} is for robot {robot.name!r}, with cameras {', '.join(sorted(cameras)) or 'of any kind'}, "
        f"state {_sizes(state)} and {robot.action_dim} action numbers; LIBERO has cameras {', '.join(CAMERA_KEYS)}, "
        f"state {_sizes(STATE)} and {ACTION_DIM} action numbers: give a checkpoint trained for LIBERO, or --robot "
        "libero where this is one"
    )


def _sizes(state: Mapping[str, int]) -> str:
    return " + ".join(f"{key} ({size})" for key, size in state.items())


def fingerprint(directory: Path) -> str:
    """Tell checkpoints apart: a digest of every file's name and size, its first, middle and last 64 KiB.

    Without the calibration, which only quantised policies read, and describe.

    Raises FileNotFoundError if there is no such directory.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"no checkpoint directory at {directory}")
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / CALIBRATION_FILE):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in dict.fromkeys((0, size // 2, max(0, size - _SAMPLE_BYTES))):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
