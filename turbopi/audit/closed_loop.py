"""The only verdict on tasks: the candidate and the reference play the same episodes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..sim.compare import compare
from ..sim.episodes_file import EPISODES_FILE, write_json
from ..sim.evaluate import DEFAULT_MINIMUM, EvalConfig, evaluate
from ..sim.simulations import LiberoScenes
from ..sim.sources import PolicySource
from ..sim.workers import SceneSource

TASKS = 10
CODE_FILE = "code.json"
RUNS = ("reference", "candidate")
NO_VERDICT = (
    "No verdict on tasks was made: no episode was played. Small errors of tensors do not show that a policy still does "
    "its tasks; give --episodes to find out."
)


@dataclass(frozen=True)
class ClosedLoop:
    """Which episodes both policies play.

    Attributes:
        reference, candidate: the policies.
        out: directory for the two runs; what the same code has played there already is continued.
        suite: of LIBERO.
        episodes: of each policy, spread over ten tasks; a multiple of ten.
        workers: processes.
        minimum: pairs below which there is no verdict.
        scenes: of the simulations; None: LIBERO's.
    """

    reference: PolicySource
    candidate: PolicySource
    out: Path
    suite: str
    episodes: int
    workers: int = 1
    minimum: int = DEFAULT_MINIMUM
    scenes: SceneSource | None = None

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.episodes % TASKS:
            raise ValueError(f"--episodes {self.episodes}: give a multiple of {TASKS}, one or more for each task")


def code() -> dict[str, str]:
    """Which turbopi this is: its version, and a digest of all its files, which an edit changes."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(f"{file.relative_to(package)} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return {"turbopi": __version__, "files": digest.hexdigest()[:16]}


def check_code(out: Path) -> dict[str, str]:
    """Which code this is; ValueError if `out` holds episodes that other code played: they must be played again."""
    now = code()
    if not any((out / run / EPISODES_FILE).is_file() and (out / run / EPISODES_FILE).stat().st_size for run in RUNS):
        return now
    file = out / CODE_FILE
    before = json.loads(file.read_text()) if file.is_file() else None
    if before != now:
        raise ValueError(
            f"{out} holds episodes that other code of turbopi played ({before or 'unknown'}, now {now}), which say "
            f"nothing of this one; remove {out}, or give another --out"
        )
    return now


def play(loop: ClosedLoop, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Play the episodes with both and compare pair by pair; see `turbopi.sim.compare.compare`.

    Returns:
        What `compare` returns, and "continued": how many episodes had been played before.

    Raises what `check_code` and `evaluate` raise: missing packages, an unknown suite, a policy of another robot.
    """
    write_json(loop.out / CODE_FILE, check_code(loop.out))
    continued = 0
    for name, source in zip(RUNS, (loop.reference, loop.candidate), strict=True):
        done = 0

        def start(records: list[Any], name: str = name) -> None:
            nonlocal done, continued
            done, continued = len(records), continued + len(records)
            progress(f"{name}: continues {done} episodes played before")

        def count(_: Any, name: str = name) -> None:
            nonlocal done
            done += 1
            progress(f"{name}: episode {done} of {loop.episodes}")

        config = EvalConfig(
            out=loop.out / name,
            source=source,
            scenes=loop.scenes or LiberoScenes(),
            suite=loop.suite,
            tasks=tuple(range(TASKS)),
            trials=loop.episodes // TASKS,
            workers=loop.workers,
            minimum=loop.minimum,
        )
        evaluate(config, on_start=start, on_episode=count)
    reference, candidate = (loop.out / name for name in RUNS)
    return {"continued": continued, **compare(reference, candidate, loop.minimum)}
