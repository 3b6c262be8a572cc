"""One audit from beginning to end: readings, first divergence, switches, checks, ranges; JSON values for a receipt."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..model import Pi0
from .checks import Check, not_finite, ranges, run_checks, run_tick_checks
from .closed_loop import NO_VERDICT
from .graph import ReferenceGraph
from .measure import (
    ALLOWED_MAX,
    ALLOWED_PROBS,
    FLOOR,
    FLOOR_MAX,
    MODES,
    Difference,
    Differences,
    Reading,
    compare,
    first_over,
    record,
)
from .names import place
from .plan import suggest_plan
from .sample import Sample
from .subjects import Pair, TickSubject
from .switches import coarse_switches, fine_switches, heal, healer, layers_that_matter, over_budget

Progress = Callable[[str], None]
FINE_LAYERS = 4
"""Layers that are taken apart into kinds of operations: those that move the actions most."""
DIGITS = 5
HINTS = {
    "embeddings": "patch embedding, or learned positions",
    "embs": "token embedding and its scale, the order of image and prompt tokens, or the action input projection",
    "norm1": "norm: its weight, the order of scale and shift, the modulation, or epsilon",
    "norm2": "norm: its weight, the order of scale and shift, the modulation, or epsilon",
    "norm": "final norm: its weight or modulation",
    "gate1": "the modulation's gate",
    "gate2": "the modulation's gate",
    "q_raw": "query projection",
    "k_raw": "key projection",
    "v": "value projection",
    "q": "rotary embedding: positions, frequencies or their precision (in vision: query projection)",
    "k": "rotary embedding: positions, frequencies or their precision (in vision: key projection)",
    "logits": "attention's scale, a mask, or the order of heads",
    "probs": "a mask, or softmax and its precision",
    "attended": "attention: mask, softmax, scale, or the order of heads",
    "out": "output projection",
    "mid": "output projection, or the residual and its gate",
    "gate": "gate projection",
    "up": "up projection",
    "fc1": "first projection of the MLP",
    "hidden": "activation function, or the projections before it",
    "down": "down projection",
    "fc2": "second projection of the MLP",
    "stream": "down projection, or the residual and its gate",
    "tokens": "projector",
    "cond": "time embedding or time MLP",
    "v_t": "action output projection",
    "x_t": "Euler step, action output projection, or the number format of x_t",
    "actions": "Euler step, action output projection, or the number format of x_t",
}


@dataclass(frozen=True)
class AuditOptions:
    """What an audit does beyond comparing.

    Attributes:
        switches: look for the switch that heals the actions.
        every_layer: take every layer apart, not only those that matter most.
        checks: ask what needs no reference.
        plan_share: where given, products whose quantisation makes at least this part of the actions' error go into a
            precision plan, to stay in bf16.
    """

    switches: bool = True
    every_layer: bool = False
    checks: bool = True
    plan_share: float | None = None


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 in full, in products and in the patch convolution, as the reference means it."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


def audit(
    pair: Pair,
    reference: Pi0,
    samples: Sequence[Sample],
    options: AuditOptions,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Compare a candidate with the reference on some frames.

    Args:
        pair: the candidate, and what sets its budget.
        reference: in float32, on the candidate's device.
        samples: one frame each; the first is taken apart.
        options: what else to do.
        progress: told what is going on.

    Returns:
        Results for `write_receipt`; "closed_loop" says that no verdict on tasks was made.

    Raises ValueError without a frame.
    """
    if not samples:
        raise ValueError("an audit needs at least one frame")
    with full_float32(), torch.no_grad():
        return _Audit(pair, reference, samples, options, progress).results()


class _Audit:
    def __init__(
        self, pair: Pair, reference: Pi0, samples: Sequence[Sample], options: AuditOptions, progress: Progress
    ) -> None:
        self.pair, self.samples, self.options, self.progress = pair, samples, options, progress
        self.graphs = [ReferenceGraph(reference, sample) for sample in samples]
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        self.progress(part)
        begin = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - begin, 2)

    def results(self) -> dict[str, Any]:
        """Everything, in the order in which it is found."""
        pair, graph = self.pair, self.graphs[0]
        with self._timed("compare"):
            readings = compare(pair.candidate, pair.plain, self.graphs)
        actions = readings[-1]
        found: dict[str, Any] = {
            "candidate": pair.candidate.name,
            "reference": "eager:fp32",
            "plain": pair.plain.name,
            "granularity": pair.candidate.granularity,
            "frames": [sample.label for sample in self.samples],
            "steps": graph.sample.steps,
            "budget": {
                "allowed_rms": pair.candidate.allowed,
                "allowed_rms_probs": ALLOWED_PROBS,
                "allowed_max": ALLOWED_MAX * pair.candidate.allowed,
                "floor_rms": FLOOR,
                "floor_max": FLOOR_MAX,
            },
            "tensors": columns(readings),
            "amplification": amplification(readings),
            "over_budget": sum(reading.over for reading in readings),
            "first_divergence": divergence(first_over(readings)),
            "actions": {
                "candidate": _number(actions.candidate["free"].rms),
                "plain": _number(actions.plain["free"].rms),
            },
        }
        if self.options.checks:
            with self._timed("checks"):
                found |= self._checks(actions.plain["free"])
        if pair.deployed is not None:
            with self._timed("deployed"):
                found["deployed"], checks = self._deployed(actions)
            found["checks"] = [*found.get("checks", []), *(check.to_dict() for check in checks)]
        if self.options.switches:
            with self._timed("switches"):
                found["sensitivity"] = self._sensitivity(readings)
        if self.options.plan_share is not None:
            with self._timed("plan"):
                told = [reading.name for reading in self._of_first_frame(readings)]
                found["plan"] = suggest_plan(pair.candidate, graph, told, self.options.plan_share, self.progress)
        found["closed_loop"] = {"played": False, "verdict": NO_VERDICT}
        return {**found, "seconds": self.seconds}

    def _deployed(self, audited: Reading) -> tuple[dict[str, Any], list[Check]]:
        """The whole tick as it runs outside an audit, held against the reference like the audited form."""
        engine, candidate = self.pair.deployed, self.pair.candidate
        assert engine is not None
        tick, off = TickSubject(candidate.name, engine, candidate.allowed), Differences()
        for graph in self.graphs:
            off.add("actions", tick.run(graph.sample, lambda *_: None), graph.truth.cpu())
        error, allowed = off.read()["actions"], max(FLOOR, candidate.allowed * audited.plain["free"].rms)
        passed = error.finite and error.rms <= allowed
        detail = f"actions' relative error {error.rms:.2e}, allowed {allowed:.2e}"
        checks = [Check("deployed, the whole tick", passed, detail)]
        if self.options.checks:
            other = self.samples[1] if len(self.samples) > 1 else None
            checks += run_tick_checks(tick, self.graphs[0].config, self.samples[0], other)
        figures = {
            "actions_error": _number(error.rms),
            "allowed_error": _number(allowed),
            "audited_actions_error": _number(audited.candidate["free"].rms),
        }
        return {**engine.describe(), **figures}, checks

    def _checks(self, precision: Difference) -> dict[str, Any]:
        candidate, graph = self.pair.candidate, self.graphs[0]
        told = record(candidate, graph.sample, graph)
        other = self.samples[1] if len(self.samples) > 1 else None
        checks = run_checks(candidate, graph.config, graph.sample, other, precision.rms)
        rows = [{k: _number(v) if isinstance(v, float) else v for k, v in row.items()} for row in ranges(told)]
        return {"checks": [check.to_dict() for check in [not_finite(told), *checks]], "ranges": rows}

    def _of_first_frame(self, readings: Sequence[Reading]) -> list[Reading]:
        """Those of tensors that the frame which is taken apart has: others may have more cameras."""
        return [reading for reading in readings if reading.name in self.graphs[0].known]

    def _sensitivity(self, readings: Sequence[Reading]) -> dict[str, Any]:
        candidate, graph = self.pair.candidate, self.graphs[0]
        readings = self._of_first_frame(readings)
        told = [reading.name for reading in readings]
        before, found = heal(candidate, graph, [*coarse_switches(told), *over_budget(readings)], self.progress)
        every = len(told) if self.options.every_layer else FINE_LAYERS
        found += heal(candidate, graph, fine_switches(layers_that_matter(found, every)), self.progress)[1]
        best = healer(found, before, readings[-1].plain["free"].rms)
        return {
            "frame": graph.sample.label,
            "actions_error": _number(before),
            "switches": [{**h.to_dict(), "error": _number(h.error), "healed": _number(h.healed)} for h in found],
            "healer": None if best is None else best.switch.name,
        }


def _number(value: float) -> float | None:
    """Rounded to what means something; None for what JSON has no number for."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def columns(readings: Sequence[Reading]) -> dict[str, list[Any]]:
    """The readings as columns: "name", "over", "ratio", and "<candidate|plain>_<mode>_<rms|max|cosine>"."""
    table: dict[str, list[Any]] = {
        "name": [r.name for r in readings],
        "over": [r.over for r in readings],
        "ratio": [_number(r.ratio) for r in readings],
    }
    for who in ("candidate", "plain"):
        for mode in MODES:
            values = [getattr(r, who)[mode] for r in readings]
            for figure in ("rms", "max"):
                table[f"{who}_{mode}_{figure}"] = [_number(getattr(v, figure)) for v in values]
            if who == "candidate":
                table[f"{who}_{mode}_cosine"] = [round(v.cosine, 9) for v in values]
    return table


def amplification(readings: Sequence[Reading]) -> dict[str, float | None]:
    """By name, how much larger the accumulated error is than a layer, or a step, before."""
    found: dict[str, float | None] = {}
    before: dict[str, float] = {}
    for reading in readings:
        where = place(reading.name)
        if where.tensor == "stream" or where.tensor in ("x_t", "actions"):
            chain = "steps" if where.tensor != "stream" else f"{where.tower}{where.index}"
            error = reading.candidate["free"].rms
            if before.get(chain, 0.0) > 0:
                found[reading.name] = _number(error / before[chain])
            before[chain] = error
    return found


def divergence(reading: Reading | None) -> dict[str, Any] | None:
    """Where the candidate first parts from correct arithmetic, in words and numbers."""
    if reading is None:
        return None
    where = place(reading.name)
    hint = "a cache of another frame or layer" if where.tower == "cache" else HINTS[where.tensor]
    return {
        "tensor": reading.name,
        "stage": where.stage,
        "layer": where.layer,
        "step": where.index if where.tower == "expert" else None,
        "error": _number(reading.candidate["alone"].rms),
        "budget": _number(reading.plain["alone"].rms),
        "ratio": _number(reading.ratio),
        "look_at": hint,
    }
