"""Switches: the candidate run with some operations computed by the reference, from what the candidate fed them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .graph import ReferenceGraph
from .measure import Reading
from .names import GROUPS, in_group, place
from .sample import Subject

TOWERS = ("vision", "prefix", "expert")
HEALED = 0.9
"""A switch heals if it takes this part of the actions' error away,"""
RESIDUE = 1.5
"""or leaves at most so many times what the precision costs anyway."""
SINGLE = 8
"""Tensors over budget that are switched one by one."""


@dataclass(frozen=True, eq=False)
class Switch:
    """A set of tensors that the reference computes instead of the candidate.

    Attributes:
        kind: "stage", "group", "tower and group", "layer", "layer and group" or "tensor".
        name: what is switched, in words.
        names: the tensors.
    """

    kind: str
    name: str
    names: frozenset[str]


@dataclass(frozen=True, eq=False)
class Healing:
    """What a switch does to the final actions.

    Attributes:
        error: of the actions with the switch, relative to the reference's; root mean square.
        healed: the part of the error that is gone; negative if the switch makes it larger.
    """

    switch: Switch
    error: float
    healed: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "kind": self.switch.kind,
            "name": self.switch.name,
            "tensors": len(self.switch.names),
            "error": self.error,
            "healed": self.healed,
        }


class Switching:
    """A visitor that answers with the reference's tensors where they are named.

    Args:
        told: what the candidate tells. None: not known yet, so it is told of everything.
    """

    def __init__(self, graph: ReferenceGraph, names: Collection[str], told: Collection[str] | None = None) -> None:
        self.graph, self.names = graph, names
        self._wanted = None if told is None else graph.sources(names, told).union(names)
        self.told: dict[str, Tensor] = {}
        self._made: dict[str, Tensor] = {}

    def wants(self, name: str) -> bool:
        """See `sample.wanted`."""
        return self._wanted is None or name in self._wanted

    def __call__(self, name: str, value: Tensor) -> Tensor | None:
        """See `sample.Visit`."""
        if name not in self.graph.known:
            return None
        if name not in self.names:
            self.told[name] = value
            return None
        self.told[name] = self.graph.value(name, self.told, self._made)
        return self.told[name]


def coarse_switches(told: Sequence[str]) -> list[Switch]:
    """Stages, kinds of operations, layers, of the tensors that a candidate tells."""
    places = {name: place(name) for name in told}
    found: list[Switch] = []

    def add(kind: str, name: str, names: Collection[str]) -> None:
        if names:
            found.append(Switch(kind, name, frozenset(names)))

    for stage in ("encode_images", "prefill", "denoise"):
        add("stage", stage, [n for n in told if places[n].stage == stage])
    for group in GROUPS:
        add("group", group, [n for n in told if in_group(n, group)])
    for tower in TOWERS:
        for group in GROUPS:
            names = [n for n in told if places[n].tower == tower and in_group(n, group)]
            add("tower and group", f"{tower} {group}", names)
    for tower in (*TOWERS, "cache"):
        for layer in sorted({p.layer for p in places.values() if p.tower == tower and p.layer is not None}):
            names = [n for n in told if places[n].tower == tower and places[n].layer == layer]
            add("layer", f"{tower} layer {layer}", names)
    return found


def fine_switches(layers: Sequence[Switch]) -> list[Switch]:
    """Every kind of operation of each of these layers."""
    return [
        Switch("layer and group", f"{layer.name} {group}", names)
        for layer in layers
        for group in GROUPS
        if (names := frozenset(n for n in layer.names if in_group(n, group)))
    ]


def layers_that_matter(found: Sequence[Healing], count: int) -> list[Switch]:
    """The layers whose switch moves the error most."""
    layers = [healing for healing in found if healing.switch.kind == "layer"]
    return [h.switch for h in sorted(layers, key=lambda h: -abs(h.healed))[:count]]


def over_budget(readings: Sequence[Reading]) -> list[Switch]:
    """One switch for each of the first tensors over budget; the same tensor of all steps is switched together."""
    keys = {reading.name: _in_every_step(reading.name) for reading in readings}
    wrong = list(dict.fromkeys(keys[reading.name] for reading in readings if reading.over))[:SINGLE]
    return [Switch("tensor", key, frozenset(name for name, of in keys.items() if of == key)) for key in wrong]


def _in_every_step(name: str) -> str:
    if name == "actions":
        name = "step0.x_t"  # the actions are the last x_t
    return f"{name.partition('.')[2]} of every step" if place(name).tower == "expert" else name


def heal(
    subject: Subject, graph: ReferenceGraph, switches: Sequence[Switch], progress: Any = lambda _: None
) -> tuple[float, list[Healing]]:
    """The actions' error of one frame as it is, and what each switch makes of it."""
    truth = graph.truth.cpu()

    def error(actions: Tensor) -> float:
        return float(torch.linalg.vector_norm(actions - truth) / torch.linalg.vector_norm(truth))

    def run(visit: Switching) -> float:
        return error(subject.run(graph.sample, visit).cpu().float())

    plain = Switching(graph, ())
    before = run(plain)
    found = []
    for number, switch in enumerate(switches, start=1):
        progress(f"switch {number} of {len(switches)}: {switch.name}")
        after = run(Switching(graph, switch.names, plain.told))
        found.append(Healing(switch, after, 1.0 - after / before if before > 0 else 0.0))
    return before, found


def healer(found: Sequence[Healing], before: float, plain: float) -> Healing | None:
    """Of the switches that heal, the one that replaces least.

    Args:
        found: what each switch does.
        before: the actions' error without any.
        plain: that of the reference in the candidate's precision. A switch heals if it leaves no more than `RESIDUE`
            times this, or less than a tenth of what there was.

    Returns:
        None if no switch heals, or if there is nothing to heal.
    """
    if before <= RESIDUE * plain:
        return None
    enough = [healing for healing in found if healing.error <= max((1.0 - HEALED) * before, RESIDUE * plain)]
    return min(enough, key=lambda healing: len(healing.switch.names), default=None)
