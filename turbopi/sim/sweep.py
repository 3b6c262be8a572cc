"""A grid of runtime settings over the same episodes: success beside latency, a resumable run a setting.

The grid is a JSON file: {"base": a runtime, "grid": {"reuse.every": [1, 2], "steps": [5, 10]}, "settings": {name: a
runtime's changes}}. Every combination of the grid, laid over the base, is a setting, and so is every one that is named.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .episodes_file import write_json
from .evaluate import EvalConfig, evaluate
from .workers import SceneSource

SWEEP_FILE = "sweep.json"
Done = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class PreparedScenes:
    """Simulations whose facts have been looked up: looking them up is not for several threads at once."""

    scenes: SceneSource
    facts: Mapping[str, Any]

    def prepare(self, suite: str, tasks: tuple[int, ...], trials: int) -> dict[str, Any]:
        """The facts."""
        return dict(self.facts)

    def open(self, suite: str, task: int) -> Any:
        """A simulation of one task."""
        return self.scenes.open(suite, task)


def prepared(config: EvalConfig) -> EvalConfig:
    """The same run, its scenes prepared."""
    facts = config.scenes.prepare(config.suite, config.tasks, config.trials)
    return replace(config, scenes=PreparedScenes(config.scenes, facts))


def read_grid(path: Path) -> dict[str, dict[str, Any]]:
    """Settings by name, each a runtime as JSON values, not yet checked.

    Raises FileNotFoundError, or ValueError that says what of the file is no grid.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no grid at {path}; docs/runtime.md shows one")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    known = {"base", "grid", "settings"}
    if (
        not isinstance(values, dict)
        or not values.keys() <= known
        or not all(isinstance(v, dict) for v in values.values())
    ):
        raise ValueError(f"{path} is no grid: expected maps named {', '.join(sorted(known))}, and nothing else")
    base = values.get("base", {})
    settings: dict[str, dict[str, Any]] = {}
    named = ((name, _laid(base, changes)) for name, changes in values.get("settings", {}).items())
    for name, setting in itertools.chain(_combinations(base, values.get("grid", {}), path), named):
        if name in settings:
            raise ValueError(
                f"{path}: two settings are called {name!r}; a name is a directory, so each must be its own"
            )
        settings[name] = setting
    if not settings:
        raise ValueError(f"{path} names no settings: give a grid or settings")
    strange = [name for name in settings if "/" in name or name in ("", ".", "..")]
    if strange:
        raise ValueError(f"{path}: a setting's name becomes a directory; {strange[0]!r} cannot be one")
    return settings


def _combinations(base: Mapping[str, Any], grid: Mapping[str, Any], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: grid.{name} is {values!r}, expected a list of values")
    for chosen in itertools.product(*grid.values()) if grid else ():
        changes: dict[str, Any] = {}
        for name, value in zip(grid, chosen, strict=True):
            *parts, last = name.split(".")
            place = changes
            for part in parts:
                place = place.setdefault(part, {})
                if not isinstance(place, dict):
                    raise ValueError(f"{path}: grid.{name} lies within a field that the grid sets to {place!r}, no map")
            if last in place:
                raise ValueError(f"{path}: grid.{name} is set by another field of the grid too")
            place[last] = copy.deepcopy(value)  # the next combination has a map of its own
        label = ",".join(f"{name}={json.dumps(value)}" for name, value in zip(grid, chosen, strict=True))
        yield label.replace("/", "_").replace('"', "").replace(" ", ""), _laid(base, changes)


def _laid(base: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """The changes over the base, maps within maps merged."""
    if not isinstance(changes, Mapping):
        raise ValueError(f"a setting is {changes!r}, expected a map of a runtime's fields")
    laid = copy.deepcopy(dict(base))
    for name, value in changes.items():
        inner = laid.get(name)
        laid[name] = _laid(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return laid


def run_here(configs: Mapping[str, EvalConfig], at_once: int, done: Done) -> None:
    """Evaluate all on this machine, `at_once` runs at a time, each with its own pool of processes.

    Raises what `evaluate` does, when the runs that had begun have ended. KeyboardInterrupt does not wait for them: end
    the process, and their workers end with it; what was played is on the disk.
    """
    ready = {name: prepared(config) for name, config in configs.items()}
    threads = ThreadPoolExecutor(at_once)
    pending = {threads.submit(evaluate, config): name for name, config in ready.items()}
    try:
        for future in as_completed(pending):
            done(pending[future], future.result())
    except KeyboardInterrupt:
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    except BaseException:
        threads.shutdown(cancel_futures=True)
        raise
    threads.shutdown()


def run_on_ray(configs: Mapping[str, EvalConfig], address: str | None, done: Done, gpu: bool) -> None:
    """Evaluate all on a Ray cluster, a task a run; every machine must see `out` and the checkpoint, by absolute paths.

    With `gpu` each run asks for one where the cluster has any; Ray hides GPUs from those that do not ask.

    Raises ImportError that names the extra where Ray is not installed, and what `evaluate` does.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs Ray, which is not installed; install turbo-pi with its extra [ray]") from error
    ray.init(address=address, ignore_reinit_error=True)
    gpus = min(1, int(ray.cluster_resources().get("GPU", 0))) if gpu else 0
    task = ray.remote(num_gpus=gpus)(evaluate)
    waiting = {
        task.options(num_cpus=max(1, config.workers)).remote(prepared(config)): name for name, config in configs.items()
    }
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            for reference in ready:
                done(waiting.pop(reference), ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        for reference in waiting:
            ray.cancel(reference)


def write_sweep(out: Path, settings: Mapping[str, Any], summaries: Mapping[str, dict[str, Any]]) -> Path:
    """Write what is known so far: a row a setting that has a summary, success beside latency."""
    rows = [
        {
            "name": name,
            "runtime": settings[name],
            "total": summary["total"],
            "latency": summary["latency"],
            "control": summary["control"],
            "verdict": summary["verdict"],
            "enough": summary["enough"],
        }
        for name, summary in summaries.items()
    ]
    out.mkdir(parents=True, exist_ok=True)
    values = {"when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "settings": len(settings), "rows": rows}
    write_json(out / SWEEP_FILE, values)
    return out / SWEEP_FILE
