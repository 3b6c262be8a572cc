"""How far a candidate's tensors are from the reference's, and how far correct arithmetic of its precision would be.

Three readings of every tensor. "free": the candidate's own run against the reference's, errors accumulated. "forced":
the candidate's run with every layer fed the reference's input. "alone": each operation against what the reference
computes from the very tensors that the candidate's operation read; nothing accumulates, so this one is judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine import EagerEngine
from .graph import ReferenceGraph
from .names import place, tensor_names
from .probe import ModuleSubject
from .sample import ALLOWED, Sample, Subject, Visit

Mode = Literal["alone", "forced", "free"]
MODES: tuple[Mode, ...] = ("alone", "forced", "free")
ALLOWED_PROBS = 1.25
"""`ALLOWED` of attention weights, which are rounded once and have nothing folded into them."""
ALLOWED_MAX = 3.0
"""How many times more the largest error may be, which is one number of thousands and varies more."""
FLOOR, FLOOR_MAX = 2e-6, 2e-5
"""Relative errors of float32 arithmetic itself, below which nothing is judged."""
HIDDEN = -1e30
"""Logits below are hidden by a mask."""
BOUNDARIES = ("embeddings", "stream", "tokens", "embs", "x_t")
Recording = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """Of one tensor, over all frames. `rms` and `max` are relative to the reference's norm and largest magnitude."""

    rms: float
    max: float
    cosine: float

    @property
    def finite(self) -> bool:
        """Whether the candidate's tensor is all numbers."""
        return math.isfinite(self.rms) and math.isfinite(self.max)


class Differences:
    """Sums by tensor, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def add(self, name: str, got: Tensor, expected: Tensor) -> None:
        """One frame's tensor. Raises ValueError if the shapes differ."""
        if got.shape != expected.shape:
            raise ValueError(f"{name} is {tuple(got.shape)}, the reference's {tuple(expected.shape)}")
        got = got.float()
        if name.endswith(".logits"):
            # What is hidden in both is equal, and so large that nothing else would count.
            shown = (expected > HIDDEN) | (got > HIDDEN)
            got, expected = (torch.where(shown, t, 0.0) for t in (got, expected))
        off = (got - expected).flatten()
        a, b = got.flatten(), expected.flatten()
        norms = [torch.linalg.vector_norm(t, dtype=torch.float64) ** 2 for t in (off, a, b)]
        sums = torch.stack([*norms, torch.dot(a, b).double()])
        # amax of a NaN is NaN: nothing is lost.
        largest = torch.stack([off.abs().amax(), b.abs().amax()])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._largest[name] = torch.maximum(self._largest[name], largest) if name in self._largest else largest

    def read(self) -> dict[str, Difference]:
        """All of them, in the order in which they came."""
        if not self._sums:
            return {}
        sums, largest = (torch.stack(list(t.values())).cpu().tolist() for t in (self._sums, self._largest))
        found = {}
        for name, (off, a, b, dot), (top, most) in zip(self._sums, sums, largest, strict=True):
            cosine = dot / math.sqrt(a * b) if a > 0 and b > 0 else 1.0 if a == b else 0.0
            cosine = min(cosine, 1.0) if math.isfinite(cosine) else 0.0  # an infinity has no direction, as a NaN
            found[name] = Difference(_ratio(math.sqrt(off), math.sqrt(b)), _ratio(top, most), cosine)
        return found


def _ratio(error: float, whole: float) -> float:
    if error == 0:
        return 0.0
    return error / whole if whole > 0 else math.inf


def record(
    subject: Subject,
    sample: Sample,
    graph: ReferenceGraph,
    forced: Mapping[str, Tensor] | None = None,
    wide_logits: bool = False,
) -> Recording:
    """What a subject tells in one run.

    Args:
        subject: what runs.
        sample: what it runs on.
        graph: the reference for that.
        forced: what each layer is fed instead of what the layer before made.
        wide_logits: attention weights as from float32 logits, as fused attentions keep them; logits are not recorded.
    """
    told: Recording = {}
    made: Recording = {}

    def visit(name: str, value: Tensor) -> Tensor | None:
        if name not in graph.known or (wide_logits and name.endswith(".logits")):
            return None
        if wide_logits and name.endswith(".probs"):
            told[name] = graph.value(name, told, made).to(value.dtype)
            return told[name]
        told[name] = value
        return forced.get(name) if forced is not None and is_boundary(name) else None

    subject.run(sample, visit)
    return told


def is_boundary(name: str) -> bool:
    """Whether layers, steps or stages meet at this tensor."""
    where = place(name)
    return where.tower == "cache" or where.tensor in BOUNDARIES


class Reordered:
    """The eager engine with every product summed in another order: what correct arithmetic in float32 may differ by."""

    name = "eager:fp32, sums reordered"
    granularity = "every operation"
    wide_logits = False
    allowed = ALLOWED

    def __init__(self, engine: EagerEngine) -> None:
        self.engine = engine

    def run(self, sample: Sample, visit: Visit) -> Tensor:
        """See `Subject`."""
        with reordered(self.engine.model):
            return ModuleSubject(self.name, self.engine).run(sample, visit)


@contextmanager
def reordered(model: nn.Module) -> Iterator[None]:
    """Within, every linear adds up its inputs in a shuffled order."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    orders: dict[int, Tensor] = {}

    def shuffled(linear: nn.Linear) -> Any:
        width = linear.in_features
        if width not in orders:
            generator = torch.Generator().manual_seed(width)
            orders[width] = torch.randperm(width, generator=generator).to(linear.weight.device)
        order = orders[width]
        return lambda x: F.linear(x[..., order], linear.weight[:, order], linear.bias)

    for linear in linears:
        linear.forward = shuffled(linear)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


@dataclass(frozen=True, eq=False)
class Reading:
    """One tensor's differences in the three modes, and the plain run's beside them.

    `allowed` is how many times the plain run's error the candidate's may be.
    """

    name: str
    candidate: Mapping[Mode, Difference]
    plain: Mapping[Mode, Difference]
    allowed: float = ALLOWED

    @property
    def ratio(self) -> float:
        """The candidate's error alone over the larger of what is plain and what is judged at all."""
        return self.candidate["alone"].rms / max(self.plain["alone"].rms, FLOOR / ALLOWED)

    @property
    def over(self) -> bool:
        """Whether the operation is off by more than correct arithmetic of this precision costs."""
        mine, plain = self.candidate["alone"], self.plain["alone"]
        if not mine.finite:
            return True
        over = mine.rms > max(FLOOR, self.allowed * plain.rms)
        return over or mine.max > max(FLOOR_MAX, ALLOWED_MAX * self.allowed * plain.max)


def compare(candidate: Subject, plain: Subject, graphs: list[ReferenceGraph]) -> list[Reading]:
    """Every tensor that the candidate tells, over all frames, in the order of computation.

    Args:
        candidate: what is audited.
        plain: the reference in the candidate's precision, which sets the budget.
        graphs: the float32 reference, one for each frame.
    """
    sums = {(who, mode): Differences() for who in ("candidate", "plain") for mode in MODES}
    for graph in graphs:
        truth = graph.recording()
        names: tuple[str, ...] = ()
        for who, subject in (("candidate", candidate), ("plain", plain)):
            wide = who == "plain" and candidate.wide_logits
            own = record(subject, graph.sample, graph, wide_logits=wide)
            names = names or tuple(own)
            # The plain run is judged by the same stretches between tensors that the candidate tells.
            own = {name: own[name] for name in names}
            forced = record(subject, graph.sample, graph, truth, wide)
            for name, expected in graph.sweep(own):
                if name in own:
                    sums[who, "alone"].add(name, own[name], expected)
                    sums[who, "free"].add(name, own[name], truth[name])
                    sums[who, "forced"].add(name, forced[name], truth[name])
    read = {key: found.read() for key, found in sums.items()}
    # Frames may have different cameras: a tensor that only a later frame has is judged like the first one's.
    cameras = sorted({camera for graph in graphs for camera in graph.sample.cameras})
    known = tensor_names(graphs[0].config, cameras, max(graph.sample.steps for graph in graphs))
    order = [name for name in known if name in read["candidate", "alone"]]
    return [
        Reading(
            name,
            {mode: read["candidate", mode][name] for mode in MODES},
            {mode: read["plain", mode][name] for mode in MODES},
            ALLOWED_PROBS if name.endswith(".probs") else candidate.allowed,
        )
        for name in order
    ]


def first_over(readings: list[Reading]) -> Reading | None:
    """Where the candidate first parts from correct arithmetic, None if it does not."""
    return next((reading for reading in readings if reading.over), None)
