"""Many evaluations over the same episodes: several side by side, so that fewer processes wait to start or to end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from doc_tables import ROOT
from rich.console import Console

from turbopi.sim.compare import compare
from turbopi.sim.episodes_file import EPISODES_FILE, read_config, read_records
from turbopi.sim.evaluate import EvalConfig, evaluate
from turbopi.sim.sources import CheckpointSource, PolicySource
from turbopi.sim.summary import summarize
from turbopi.sim.sweep import prepared
from turbopi.sim.workers import SceneSource

INTERRUPTED = 130
TABLE_WIDTH = 150


@dataclass(frozen=True)
class RunOptions:
    """What all runs of a benchmark share."""

    out: Path
    """Directory of the runs, one each; the same command continues what is there."""
    checkpoint: Path = ROOT / "checkpoints" / "pi05-libero-small"
    """The policy."""
    suite: str = "libero_spatial"
    """LIBERO suite."""
    tasks: tuple[int, ...] = tuple(range(10))
    """Indices in the suite."""
    trials: int = 20
    """Episodes per task, from the official initial states 0 to trials - 1."""
    seed: int = 7
    """Of the episodes; 7 is openpi's."""
    workers: int = 2
    """Simulations at a time, over all runs."""
    at_once: int = 1
    """Runs at a time; each gets its share of the workers."""
    engine: str = "eager"
    """Way to run the stages."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the policy."""
    device: str = "auto"
    """Of the policy: auto, cpu, cuda, ..."""
    threads: int = 1
    """Of torch on the CPU in each worker."""
    minimum: int = 50
    """Pairs below which no verdict is given."""
    play: bool = True
    """Play what is missing; otherwise only write down what is complete, also what was played on another machine."""

    def __post_init__(self) -> None:
        if self.at_once < 1 or self.workers < 1:
            raise ValueError(f"need at least one worker and one run at once, got {self.workers} and {self.at_once}")

    @property
    def policy(self) -> dict[str, Any]:
        """Options of `turbopi.load_policy`."""
        return {"engine": self.engine, "precision": self.precision, "device": self.device}

    @property
    def source(self) -> CheckpointSource:
        """The policy as it is."""
        return CheckpointSource(self.checkpoint, self.policy)

    @property
    def episodes(self) -> int:
        """Of each run."""
        return len(self.tasks) * self.trials

    def run(self, name: str, source: PolicySource, scenes: SceneSource, replan: int) -> EvalConfig:
        """One run of the benchmark, with its share of the workers."""
        return EvalConfig(
            out=self.out / name,
            source=source,
            scenes=scenes,
            suite=self.suite,
            tasks=self.tasks,
            trials=self.trials,
            seed=self.seed,
            replan=replan,
            threads=self.threads,
            workers=max(1, self.workers // self.at_once),
            minimum=self.minimum,
        )


def run_all(configs: Mapping[str, EvalConfig], at_once: int, console: Console) -> None:
    """Evaluate all, `at_once` at a time, saying so as each ends.

    A run that fails, such as one begun by another engine, does not keep the others from being played: raises an
    ExceptionGroup of the failures at the end. Ctrl-C ends the process at once: what was played is on the disk, and
    workers end with their parent.
    """
    ready = {name: prepared(config) for name, config in configs.items()}
    begin = time.monotonic()
    failures: list[Exception] = []
    with ThreadPoolExecutor(at_once) as threads:
        pending = {threads.submit(evaluate, config): name for name, config in ready.items()}
        try:
            for future in as_completed(pending):
                try:
                    outcome = future.result()["verdict"]
                except Exception as error:
                    error.add_note(f"in the run {pending[future]}")
                    failures.append(error)
                    outcome = f"failed: {error}"
                console.print(f"{time.monotonic() - begin:6.0f} s  {pending[future]}: {outcome}", highlight=False)
        except KeyboardInterrupt:
            console.print("stopped; the same command continues")
            os._exit(INTERRUPTED)
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(ready)} runs failed", failures)


def is_complete(directory: Path, episodes: int) -> bool:
    """Whether a run has an outcome for every one of its episodes."""
    if not (directory / EPISODES_FILE).is_file():
        return False
    return sum(record.error is None for record in read_records(directory)) >= episodes


def row(reference: Path, directory: Path, minimum: int) -> dict[str, Any]:
    """A run in numbers, beside the reference: success, interval, McNemar's test, latency.

    "only_reference" and "only_this" count the discordant pairs.
    """
    summary = summarize(read_records(directory), minimum)
    total, pairs = summary["total"], compare(reference, directory, minimum)
    difference = pairs["total"]
    policy = read_config(directory)["policy"]
    return {
        "episodes": total["episodes"],
        "successes": total["successes"],
        "rate": total["rate"],
        "interval": total["interval"],
        "per_task": [[task["successes"], task["episodes"]] for task in summary["tasks"]],
        "median_steps_of_successes": total["median_steps_of_successes"],
        "only_reference": difference["only_a"],
        "only_this": difference["only_b"],
        "difference": difference["difference"],
        "difference_interval": difference["difference_interval"],
        "p_value": difference["p_value"],
        "verdict": pairs["verdict"],
        "latency": summary["latency"],
        "errors": summary["errors"],
        "engine": policy["engine"],
        "device": policy["device"],
    }


def joined(receipt: Path, part: str, key: str, reference: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows found now, and behind them those of an earlier receipt whose runs were elsewhere.

    Each row counts pairs with the reference, so both must be of the same one: it has to have ended alike.

    Args:
        receipt: where the earlier rows are, and where all will be.
        part: name of the rows in the receipt's results.
        key: name of a row's name.
        reference: the reference's name.
        found: rows found now.

    Returns:
        The rows. Each that is not of this call has "kept_from": when, at which commit and by which command it was
        counted.

    Raises:
        ValueError: the reference is not among the rows found, or ended otherwise than the earlier one.
    """
    if not receipt.is_file():
        return found
    earlier = json.loads(receipt.read_text())
    before, now = ({result[key]: result for result in results} for results in (earlier["results"][part], found))
    kept = [result for name, result in before.items() if name not in now]
    if not kept:
        return found
    ends = _ended(before.get(reference)), _ended(now.get(reference))
    if ends[0] != ends[1]:
        raise ValueError(
            f"{receipt} has {len(kept)} rows that are pairs with a {reference} of other episodes ({ends[0]}; here "
            f"{ends[1]}): play them too, or name another --receipt"
        )
    source = {name: earlier[name] for name in ("when", "commit", "command")}
    return found + [{**result, "kept_from": result.get("kept_from", source)} for result in kept]


def _ended(result: Mapping[str, Any] | None) -> str:
    """What two runs of the same policy from the same noise have in common, to the last inference."""
    if result is None:
        return "it is not complete"
    successes = " ".join(f"{won}/{played}" for won, played in result["per_task"])
    return f"{successes} in {result['latency']['inferences']} inferences"


def wide_console() -> Console:
    """A console in which a table's rows fit, also where the output is a file."""
    console = Console(soft_wrap=True)
    console.width = max(console.width, TABLE_WIDTH)
    return console


def percent(value: float) -> str:
    """A rate as text."""
    return f"{100 * value:.1f} %"


def success_cells(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """Successes, interval, and p-value, for tables."""
    low, high = result["interval"]
    return f"{result['successes']}/{result['episodes']}", f"{100 * low:.1f}-{percent(high)}", f"{result['p_value']:.2g}"
