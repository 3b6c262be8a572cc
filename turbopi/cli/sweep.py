"""`turbo-pi sweep`: a grid of runtime settings, success beside latency."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from .eval import INTERRUPTED, EpisodeOptions, parse_tasks
from .options import PolicyOptions

if TYPE_CHECKING:
    from ..runtime import RuntimeConfig
    from ..sim.evaluate import EvalConfig

_ALL_EPISODES = EpisodeOptions()


def sweep(
    grid: Path,
    out: Path,
    policy: Annotated[PolicyOptions, tyro.conf.arg(name="")],
    episodes: Annotated[EpisodeOptions, tyro.conf.arg(name="")] = _ALL_EPISODES,
    workers: int | None = None,
    at_once: int = 1,
    threads: int = 1,
    minimum: int = 50,
    ray: bool = False,
    ray_address: str | None = None,
) -> int:
    """Evaluate a policy under every runtime of a grid, over the same episodes. The same command continues.

    Writes a run a setting, and sweep.json, which `turbo-pi report` draws. Exit status 1 if episodes ended in an error.

    Args:
        grid: JSON file, see docs/runtime.md.
        out: directory of the runs.
        policy: which policy; its runtime, steps included, is the grid's.
        episodes: which episodes of each setting.
        workers: processes over all runs. Default: one per core.
        at_once: runs at a time, each with its share of the workers.
        threads: of torch on the CPU in each worker.
        minimum: episodes below which no verdict is given.
        ray: run on a Ray cluster, whose machines must see `out` and the checkpoint where they are here; `workers` is
            then the share of each run, which has a GPU to itself where the cluster has any and --device is not cpu.
        ray_address: of the cluster. Default: Ray's own choice.
    """
    from ..sim.sweep import run_here, run_on_ray, write_sweep

    _check_asked(policy, at_once)
    if ray:
        out, policy = out.resolve(), wherever(policy)
    settings = _runtimes(grid)
    total = workers or os.cpu_count() or 1
    share = total if ray else max(1, total // at_once)
    keywords = policy.keywords()
    configs = {
        name: _run_of(out / name, policy, _under(keywords, runtime), episodes, share, threads, minimum)
        for name, runtime in settings.items()
    }
    console, summaries = Console(soft_wrap=True), {}
    written = {name: runtime.to_dict() for name, runtime in settings.items()}

    def done(name: str, summary: dict[str, Any]) -> None:
        summaries[name] = summary
        write_sweep(out, written, summaries)
        console.print(f"{len(summaries)}/{len(settings)} {name}: {summary['verdict']}", markup=False, highlight=False)

    try:
        if ray:
            run_on_ray(configs, ray_address, done, gpu=policy.device != "cpu")
        else:
            run_here(configs, at_once, done)
    except KeyboardInterrupt:
        console.print(f"stopped; the same command continues what is in {out}")
        os._exit(INTERRUPTED)  # runs go on in threads; their workers end with this process
    console.print(f"turbo-pi report --sweep {out} draws the Pareto front", markup=False, highlight=False)
    return 1 if any(summary["errors"] for summary in summaries.values()) else 0


def _runtimes(grid: Path) -> dict[str, RuntimeConfig]:
    """The settings of a grid by name. Raises ValueError for what is none, FileNotFoundError."""
    from ..runtime import RuntimeConfig
    from ..sim.sweep import read_grid

    settings = {name: RuntimeConfig.from_dict(values) for name, values in read_grid(grid).items()}
    seeded = [name for name, runtime in settings.items() if runtime.seed != RuntimeConfig.seed]
    if seeded:
        raise ValueError(f"{', '.join(seeded)}: an episode's noise comes from --seed alone; leave seed out of the grid")
    return settings


def _check_asked(policy: PolicyOptions, at_once: int) -> None:
    if policy.runtime is not None or policy.preset is not None:
        raise ValueError("the grid has the runtimes: leave --runtime and --preset away")
    if policy.steps is not None:
        raise ValueError('the grid has the steps: leave --steps away, and give the grid {"base": {"steps": N}}')
    if at_once < 1:
        raise ValueError(f"--at-once is {at_once}; at least one run must go on")


def wherever(policy: PolicyOptions) -> PolicyOptions:
    """The same with absolute paths: a cluster's workers have a directory of their own."""
    paths: dict[str, Any] = {name: value.resolve() for name, value in vars(policy).items() if isinstance(value, Path)}
    if policy.engine is not None:
        paths["engine"] = re.sub(r"(?<=:)[^,>]+", lambda directory: str(Path(directory[0]).resolve()), policy.engine)
    return dataclasses.replace(policy, **paths)


def _under(keywords: Mapping[str, Any], runtime: RuntimeConfig) -> dict[str, Any]:
    """The same policy under another runtime."""
    return {**keywords, "runtime": runtime, "steps": runtime.steps}


def _run_of(
    out: Path,
    policy: PolicyOptions,
    keywords: Mapping[str, Any],
    episodes: EpisodeOptions,
    workers: int,
    threads: int,
    minimum: int,
) -> EvalConfig:
    """The evaluation of one setting."""
    from ..sim.evaluate import EvalConfig
    from ..sim.simulations import LiberoScenes
    from ..sim.sources import CheckpointSource

    return EvalConfig(
        out=out,
        source=CheckpointSource(policy.checkpoint, keywords),
        scenes=LiberoScenes(camera_px=episodes.camera_px, prompts=episodes.prompts),
        suite=episodes.suite,
        tasks=parse_tasks(episodes.tasks),
        trials=episodes.trials,
        seed=policy.seed or 0,
        replan=episodes.replan,
        threads=threads,
        workers=workers,
        minimum=minimum,
    )
