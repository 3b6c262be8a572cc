"""Built engines on disk, each beside a note of what it is good for."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...files import write_whole
from .api import PlanKey

_log = logging.getLogger(__name__)

PLAN, NOTE = ".plan", ".json"


class PlanCache:
    """Engines in a directory, by GPU, TensorRT version, graph and weights.

    Args:
        directory: of the plans; made when the first is kept.
        may_build: whether a missing engine is built. A robot without minutes to spare says no and gets an error.
    """

    def __init__(self, directory: Path, may_build: bool = True) -> None:
        self.directory = directory
        self.may_build = may_build

    @property
    def timing_cache(self) -> Path:
        """The file that all builds of this directory share."""
        return self.directory / "timing.cache"

    def get(self, key: PlanKey, build: Callable[[], bytes]) -> bytes:
        """The engine of a key, built and kept if it is not there, or not what its note says.

        Raises:
            ValueError: it is not there and may not be built; tells what the engines that are there were built for.
            CheckpointError: it is not what its note says and may not be built.
        """
        name = hashlib.sha256(json.dumps(key.to_dict(), sort_keys=True).encode()).hexdigest()[:24]
        plan, note = self.directory / f"{name}{PLAN}", self.directory / f"{name}{NOTE}"
        if plan.is_file() and note.is_file():
            try:
                return self._read(plan, note, key)
            except CheckpointError as error:
                # Also what two processes leave that build the same engine at once: one's plan, the other's note.
                if not self.may_build:
                    raise
                _log.warning("%s; it is built anew now", error)
        if not self.may_build:
            raise ValueError(self._missing(key))
        built = build()
        write_whole(plan, built)
        # The note last: a plan without one was cut off while it was written.
        facts = {**key.to_dict(), "bytes": len(built), "sha256": hashlib.sha256(built).hexdigest()}
        write_whole(note, (json.dumps(facts, indent=1) + "\n").encode())
        return built

    def _read(self, plan: Path, note: Path, key: PlanKey) -> bytes:
        facts = _note(note)
        if different := key.differences(facts):
            raise CheckpointError(
                f"{plan} was built for something else: {'; '.join(different)}; remove it to build anew"
            )
        data = plan.read_bytes()
        if hashlib.sha256(data).hexdigest() != facts.get("sha256"):
            raise CheckpointError(
                f"{plan} is damaged: {len(data)} bytes, its note says {facts.get('bytes')}; remove it to build anew"
            )
        return data

    def _missing(self, key: PlanKey) -> str:
        """Why there is no engine: for each that is there of the same graph, what it was built for."""
        notes = [_note(path) for path in sorted(self.directory.glob(f"*{NOTE}"))]
        same = [facts for facts in notes if facts.get("graph") == key.graph] or notes
        others = "; ".join("one whose " + ", ".join(key.differences(facts)) for facts in same[:3])
        return (
            f"{self.directory} has no TensorRT engine for this graph on {key.gpu} (compute capability "
            f"{key.capability}, TensorRT {key.tensorrt}); it has {others or 'none at all'}. Engines run only on the "
            "GPU that they were built for: build here, with may_build=True"
        )


def _note(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); remove it and its plan to build anew") from error
    return facts if isinstance(facts, dict) else {}
