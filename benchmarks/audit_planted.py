"""Does the audit find them? Each bug of `audit_bugs.py` in four candidates, and the place that the audit names.

    python benchmarks/audit_planted.py          # writes benchmarks/results/audit_planted.json
    python benchmarks/audit_docs.py --write     # puts the table into docs/audit.md

A small π0.5 with hash weights on the CPU: eager as edited source, turbo as its assembly over its twins; each in float32
and in bf16. Right candidates are audited too: nothing may be found in them. Exit status 1 if a bug is missed, misplaced
or found where there is none.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import tyro
from audit_bugs import BUGS, Bug, edited_model, with_heads
from rich.console import Console
from rich.table import Table

from turbopi import ModelConfig, Pi0, preset
from turbopi.audit.golden import hash_model
from turbopi.audit.graph import ReferenceGraph
from turbopi.audit.measure import Reading, Reordered, compare, first_over
from turbopi.audit.probe import ModuleSubject
from turbopi.audit.sample import Sample, Subject
from turbopi.audit.switches import coarse_switches, heal, healer, over_budget
from turbopi.audit.turbo import TurboSubject
from turbopi.bench import write_receipt
from turbopi.bench.workloads import Workload, observation
from turbopi.engine import EagerEngine, Precision, TurboEngine, precision_dtype
from turbopi.engine.turbo.ops import twin_ops

RESULTS = Path(__file__).parent / "results"
SEED = 7
SHAPE = Workload("planted", views=2, prompt_tokens=180, horizon=10)
"""Long enough for rounded rotary frequencies to be seen."""
SLOTS = 200
CANDIDATES: tuple[tuple[str, Precision], ...] = (
    ("eager", "fp32"),
    ("turbo-twins", "fp32"),
    ("eager", "bf16"),
    ("turbo-twins", "bf16"),
)


@dataclass(frozen=True)
class Options:
    """What to audit."""

    steps: int = 4
    """Flow-matching evaluations."""
    threads: int = 1
    """Of torch."""
    out: Path = RESULTS / "audit_planted.json"
    """The receipt."""


@dataclass(frozen=True, eq=False)
class Case:
    """A candidate with a bug, or without.

    Attributes:
        candidate, plain, graph: as `compare` takes them.
        place: the first tensor that is wrong; None where none is.
    """

    candidate: Subject
    plain: Subject
    graph: ReferenceGraph
    place: str | None

    def readings(self) -> list[Reading]:
        """Of every tensor."""
        with torch.no_grad():
            return compare(self.candidate, self.plain, [self.graph])


def sizes(bug: Bug | None, engine: str) -> ModelConfig:
    """A model in which the bug can exist."""
    config = dataclasses.replace(preset("pi05-tiny"), max_tokens=SLOTS)
    if bug is None:
        return config
    masked = bug.masked and engine == "eager"
    return dataclasses.replace(with_heads(config, bug), invalid_tokens="masked" if masked else "dropped")


@cache
def weights(config: ModelConfig, dtype: torch.dtype, whose: str) -> Pi0:
    """Hash weights; the reference's are its own."""
    return hash_model(config, SEED, dtype)


def make_case(bug: Bug | None, engine: str, precision: Precision, steps: int, directory: Path) -> Case:
    """One candidate; edited sources are written below `directory`."""
    config = sizes(bug, engine)
    reference = weights(config, torch.float32, "reference")
    model = weights(config, precision_dtype(precision), "candidate")
    right = EagerEngine(model, precision)
    plain: Subject = Reordered(right) if precision == "fp32" else ModuleSubject("eager:bf16", right)
    name, place = f"{engine}:{precision}", None
    if engine == "eager":
        wrong = model if bug is None else edited_model(model, bug.edit, directory)
        candidate: Subject = ModuleSubject(name, EagerEngine(wrong, precision))
        place = None if bug is None else bug.eager_place
    else:
        ops = twin_ops() if bug is None else bug.turbo(twin_ops())
        schedules = None if bug is None or bug.schedules is None else bug.schedules(model)
        candidate = TurboSubject(name, TurboEngine(model, precision, ops, None, schedules), reference)
        place = None if bug is None else bug.turbo_place
    frame, earlier = (Sample(*observation(config, SHAPE, 1, seed), steps) for seed in (0, 1))
    if bug is not None and bug.needs_earlier_frame:
        candidate.run(earlier, lambda *_: None)
    return Case(candidate, plain, ReferenceGraph(reference, frame), place)


def describe(case: Case) -> dict[str, Any]:
    """What the audit found, and which switch heals the actions."""
    readings = case.readings()
    found, actions = first_over(readings), readings[-1]
    result: dict[str, Any] = {
        "expected": case.place,
        "found": None if found is None else found.name,
        "right": (None if found is None else found.name) == case.place,
        "over": sum(reading.over for reading in readings),
        "tensors": len(readings),
        "largest_ratio": max(reading.ratio for reading in readings),
        "actions_error": actions.candidate["free"].rms,
        "plain_actions_error": actions.plain["free"].rms,
    }
    if found is not None:
        told = [reading.name for reading in readings]
        switches = [*over_budget(readings), *coarse_switches(told)]
        before, healed = heal(case.candidate, case.graph, switches)
        best = healer(healed, before, actions.plain["free"].rms)
        mine, budget = found.candidate["alone"], found.plain["alone"]
        result |= {"error": mine.rms, "budget": budget.rms, "ratio": found.ratio}
        result["healer"] = None if best is None else best.switch.name
    return result


def measure(options: Options, progress: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Every bug in every candidate; the right candidates first."""
    with tempfile.TemporaryDirectory() as directory:
        for bug in (None, *BUGS):
            for engine, precision in CANDIDATES:
                name = "none" if bug is None else bug.name
                progress(f"{name} in {engine}:{precision}")
                case = make_case(bug, engine, precision, options.steps, Path(directory))
                yield {"bug": name, "candidate": f"{engine}:{precision}", **describe(case)}


def main() -> int:
    """Measure, print, write the receipt."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    console = Console(width=170)
    with Console(stderr=True).status("") as status:
        rows = list(measure(options, status.update))
    table = Table("bug", "candidate", "found at", "error", "times the budget", "healed by", "actions off")
    for row in rows:
        style = None if row["right"] else "red"
        ratio = f"{row['ratio']:.3g}" if "ratio" in row else f"(largest {row['largest_ratio']:.2f})"
        error = f"{row['error']:.1e}" if "error" in row else ""
        cells = (row["bug"], row["candidate"], row["found"] or "nothing", error, ratio, row.get("healer") or "")
        table.add_row(*cells, f"{row['actions_error']:.1e}", style=style)
    console.print(table)
    wrong = [row for row in rows if not row["right"]]
    settings = {**dataclasses.asdict(options), "out": options.out.name, "shape": dataclasses.asdict(SHAPE)}
    write_receipt(options.out, "audit of planted bugs", {"rows": rows, "wrong": len(wrong)}, settings)
    console.print(f"{len(rows) - len(wrong)} of {len(rows)} right; wrote {options.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
