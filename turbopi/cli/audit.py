"""`turbo-pi audit`: where an engine first parts from the reference, and what that does to the actions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from ..audit.closed_loop import ClosedLoop
    from ..audit.load import Checkpointed
    from ..audit.sample import Sample
    from ..audit.subjects import SubjectName
    from ..policy import Policy

SHOWN = 8
"""Rows of the printed tables; the receipt has all."""


@dataclass(frozen=True)
class SubjectOptions:
    """What is held against what.

    Attributes:
        checkpoint: directory of an openpi, lerobot or JAX checkpoint.
        candidate: ENGINE:PRECISION, such as turbo:bf16, turbo:fp8, eager:nvfp4, compiled:bf16, graphed, or
            turbo-twins:fp32 (turbo's assembly in plain torch, on any device).
        reference: eager:fp32.
        robot: libero, droid, aloha or lerobot. Default: what the checkpoint says.
        steps: flow-matching evaluations.
        device: auto, cpu, cuda, cuda:1, ...
        plan: JSON file that says which products a quantised candidate leaves in another format.
        calibration: JSON file of `turbo-pi calibrate`. Default: calibration.json in the checkpoint.
        numerics: named numerics profile of both. Default: the checkpoint's, else exact.
        invalid_tokens: dropped or masked, for both. Default: the checkpoint's, else dropped.
        tokenizer: a .model or tokenizer.json file. Default: the checkpoint's.
    """

    checkpoint: Path
    candidate: str
    reference: str = "eager:fp32"
    robot: str | None = None
    steps: int = 10
    device: str = "auto"
    plan: Path | None = None
    calibration: Path | None = None
    numerics: Literal["exact", "openpi", "lerobot", "jax"] | None = None
    invalid_tokens: Literal["dropped", "masked"] | None = None
    tokenizer: Path | None = None

    def checkpointed(self) -> Checkpointed:
        """For `turbopi.audit`. Raises ValueError for an unknown engine or precision, or another reference."""
        from ..audit.load import Checkpointed
        from ..audit.subjects import check_reference, parse_subject
        from ..policy import choose_device

        device = choose_device(self.device)
        check_reference(self.reference)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["reference"]
        return Checkpointed(**{**values, "device": device, "candidate": parse_subject(self.candidate, device)})


@dataclass(frozen=True)
class FrameOptions:
    """On which frames.

    Attributes:
        frames: an .npz file of observations, or a directory of them, such as `turbo-pi serve --record` makes.
        suite: LIBERO suite: frames of an episode of the reference if --frames is not given; and for --episodes.
        count: frames to compare, evenly spread; the first is taken apart.
        seed: of the noise.
    """

    frames: Path | None = None
    suite: str | None = None
    count: int = 2
    seed: int = 0

    def samples(self, policy: Policy, steps: int) -> list[Sample]:
        """Read or record them. Raises ValueError without a source, InputError for frames of another robot."""
        from ..audit.load import make_samples
        from ..frames import read_frames

        if self.frames is None and self.suite is None:
            raise ValueError("give --frames with real observations, or --suite to record some in LIBERO")
        if self.frames is not None:
            return make_samples(policy, read_frames(self.frames, policy.transforms.robot), self.count, steps, self.seed)
        from ..frames.rollouts import Rollouts, rollout_frames

        assert self.suite is not None
        looks = list(rollout_frames(policy, Rollouts(self.suite, episodes=1, looks=max(self.count, 2))))
        return make_samples(policy, looks, self.count, steps, self.seed)


_FROM_NOWHERE = FrameOptions()


def audit(
    subjects: Annotated[SubjectOptions, tyro.conf.arg(name="")],
    frames: Annotated[FrameOptions, tyro.conf.arg(name="")] = _FROM_NOWHERE,
    switches: bool = True,
    every_layer: bool = False,
    checks: bool = True,
    episodes: int = 0,
    workers: int = 1,
    write_plan: Path | None = None,
    plan_share: float = 0.02,
    out: Path = Path("audit.json"),
) -> int:
    """Run the same frames and noise through an engine and the reference; find the first operation that is off.

    Writes a receipt, and an HTML page beside it. Exit status 1 if an operation is over budget or a check fails.

    Args:
        subjects: what is held against what.
        frames: on which frames.
        switches: look for the operations, layers or stages whose exchange for the reference's heals the actions.
        every_layer: take every layer apart for that, not only those that matter most.
        checks: also check what needs no reference: masks, cameras, positions, determinism, ranges.
        episodes: play so many episodes of --suite with both; the only verdict on tasks. A multiple of ten.
        workers: processes for that.
        write_plan: JSON file for a precision plan that keeps products in bf16 which cost much.
        plan_share: part of the actions' squared error from which a product is kept.
        out: receipt to write.
    """
    from ..audit.closed_loop import play
    from ..audit.load import reference_model
    from ..audit.plan import check_share
    from ..audit.session import AuditOptions
    from ..audit.session import audit as run_audit
    from ..bench import write_receipt
    from ..report import write_audit_report

    loaded = subjects.checkpointed()
    loop = _loop(loaded, frames.suite, episodes, workers, out) if episodes else None
    if write_plan is not None:
        check_share(loaded.candidate.precision, plan_share)
    with Console(stderr=True).status("loading") as status:
        policy = loaded.reference()
        samples = frames.samples(policy, loaded.steps)
        pair = loaded.pair(reference_model(policy))
        begin, worked = time.perf_counter(), time.process_time()
        options = AuditOptions(switches, every_layer, checks, None if write_plan is None else plan_share)
        results = run_audit(pair, reference_model(policy), samples, options, status.update)
        took = {"all": time.perf_counter() - begin, "processor": time.process_time() - worked}
        results["seconds"] |= {part: round(seconds, 2) for part, seconds in took.items()}
        settings = {"subjects": _plain(subjects), "frames": _plain(frames), "model": _plain(policy.engine.config)}
        path = write_receipt(out, "audit", results, settings)
        if loop is not None:  # for hours, perhaps: what was found until then is on the disk
            results["closed_loop"] = {"played": True, **play(loop, status.update)}
            write_receipt(out, "audit", results, settings)
    lines = [*summary(results), f"wrote {path} and {write_audit_report(path)}"]
    if write_plan is not None:
        lines.append(f"wrote {_save_plan(results, write_plan)}")
    Console(soft_wrap=True).print(*lines, sep="\n", highlight=False)
    return 0 if is_clean(results) else 1


def _save_plan(results: dict[str, Any], path: Path) -> Path:
    from ..quant import PrecisionPlan

    return PrecisionPlan.from_dict(results["plan"]["plan"]).save(path)


def _plain(options: Any) -> dict[str, Any]:
    values = dataclasses.asdict(options)
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def _loop(loaded: Checkpointed, suite: str | None, episodes: int, workers: int, out: Path) -> ClosedLoop:
    """What is to be played. Raises ValueError that says why it cannot be, before anything runs."""
    from ..audit.closed_loop import ClosedLoop, check_code
    from ..audit.subjects import TWINS, SubjectName
    from ..sim.sources import CheckpointSource

    if suite is None or loaded.candidate.engine == TWINS:
        raise ValueError(f"--episodes needs --suite and an engine that a policy can run on ({TWINS} is none)")

    def source(name: SubjectName) -> CheckpointSource:
        return CheckpointSource(loaded.checkpoint, loaded.policy_options(name))

    runs = out.with_suffix(".episodes")
    check_code(runs)
    return ClosedLoop(source(SubjectName("eager", "fp32")), source(loaded.candidate), runs, suite, episodes, workers)


def is_clean(results: dict[str, Any]) -> bool:
    """Whether nothing is over budget and no check failed."""
    return not results["over_budget"] and all(check["passed"] is not False for check in results.get("checks", []))


def summary(results: dict[str, Any]) -> Iterator[Any]:
    """What an audit found, for a terminal."""
    found, names = results["first_divergence"], results["tensors"]["name"]
    title = f"{results['candidate']} against {results['reference']}: {len(names)} tensors, {results['granularity']}"
    yield f"[bold]{title}[/]"
    if found is None:
        yield f"[green]every operation is within what {results['plain']} costs[/]"
    else:
        yield (
            f"[red]first divergence: {found['tensor']}[/] (stage {found['stage']}): error {_figure(found['error'])}, "
            f"budget {_figure(found['budget'])}; look at: {found['look_at']}; {results['over_budget']} tensors over"
        )
    errors = results["actions"]
    yield (f"actions: relative error {_figure(errors['candidate'])}; {results['plain']} has {_figure(errors['plain'])}")
    if "deployed" in results:
        tick = results["deployed"]
        error, allowed = _figure(tick["actions_error"]), _figure(tick["allowed_error"])
        yield f"deployed: the whole tick's actions have {error}, allowed {allowed}"
    yield worst_table(results["tensors"])
    if "sensitivity" in results:
        yield switch_table(results["sensitivity"])
        healer = results["sensitivity"]["healer"]
        yield f"smallest switch that heals the actions: {healer or 'none; or there is nothing to heal'}"
    if "checks" in results:
        yield check_table(results["checks"])
    loop = results["closed_loop"]
    if loop.get("continued"):
        yield f"closed loop: continues {loop['continued']} episodes played before, by the same code"
    yield f"closed loop: {loop['verdict']}"


def _figure(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.2e}"


def worst_table(tensors: dict[str, list[Any]]) -> Table:
    """The tensors whose own error is largest beside the budget."""
    table = Table(
        Column("tensor", no_wrap=True), "error alone", "budget", "times", "free", title="nearest to the budget, or over"
    )
    order = sorted(range(len(tensors["name"])), key=lambda i: -_rank(tensors["ratio"][i]))
    for i in order[:SHOWN]:
        figures = (tensors[key][i] for key in ("candidate_alone_rms", "plain_alone_rms"))
        table.add_row(
            tensors["name"][i],
            *(_figure(value) for value in figures),
            _times(tensors["ratio"][i]),
            _figure(tensors["candidate_free_rms"][i]),
            style="red" if tensors["over"][i] else None,
        )
    return table


def _rank(ratio: float | None) -> float:
    return float("inf") if ratio is None else ratio


def _times(ratio: float | None) -> str:
    return "not finite" if ratio is None else f"{ratio:.2f}"


def switch_table(sensitivity: dict[str, Any]) -> Table:
    """The switches that heal most."""
    table = Table(Column("switched to the reference", no_wrap=True), "tensors", "actions' error", "healed")
    table.title = f"switches on {sensitivity['frame']}: error as it is {_figure(sensitivity['actions_error'])}"
    ranked = sorted(sensitivity["switches"], key=lambda s: -_rank(s["healed"]))
    for switch in ranked[:SHOWN]:
        healed = "" if switch["healed"] is None else f"{100 * switch['healed']:.1f} %"
        table.add_row(switch["name"], str(switch["tensors"]), _figure(switch["error"]), healed)
    return table


def check_table(checks: list[dict[str, Any]]) -> Table:
    """What needs no reference."""
    table = Table("check", "", "seen", title="checks")
    words = {True: "[green]passed[/]", False: "[red]failed[/]", None: "not asked"}
    for check in checks:
        table.add_row(check["name"], words[check["passed"]], check["detail"])
    return table
