"""What is audited: an engine in a precision, observed as finely as it lets itself be observed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ..engine import (
    EagerEngine,
    Engine,
    Precision,
    TickEngine,
    TurboEngine,
    create_engine,
    engines_for,
    precision_dtype,
)
from ..engine.turbo.ops import twin_ops
from ..errors import NonFiniteActionsError
from ..model import Pi0, PrefixCache
from ..quant import Quantisation
from .measure import Reordered
from .probe import ModuleSubject
from .sample import ALLOWED_STAGE, Sample, Subject, Visit
from .turbo import TurboSubject

TWINS = "turbo-twins"
"""Turbo's assembly over its plain-torch twins: runs anywhere, to tell a wrong assembly from a wrong kernel."""
ALIASES = {"float32": "fp32", "bfloat16": "bf16"}
REFERENCE = "eager:fp32"
FAMILY_MARKS = ":="
"""In names with parts, such as onnx:DIRECTORY and vision=A,prefill=B,denoise=C."""


@dataclass(frozen=True)
class SubjectName:
    """ENGINE:PRECISION."""

    engine: str
    precision: Precision

    def __str__(self) -> str:
        return f"{self.engine}:{self.precision}"


def parse_subject(text: str, device: str) -> SubjectName:
    """Read "turbo:fp8", "onnx:DIRECTORY:fp32", or "graphed", whose precision is then bf16 on a GPU and fp32 on a CPU.

    Raises ValueError for an unknown engine or precision, or a pair that does not exist; lists what there is.
    """
    engine, _, precision = text.rpartition(":")
    if not engine or "=" in precision or Path(precision).is_dir():
        engine, precision = text, ""
    precision = ALIASES.get(precision, precision) or ("fp32" if device == "cpu" else "bf16")
    precision_dtype(precision)
    chosen: Precision = precision  # type: ignore[assignment]
    if not any(mark in engine for mark in FAMILY_MARKS):
        _check_pair(text, engine, chosen)
    return SubjectName(engine, chosen)


def _check_pair(text: str, engine: str, precision: Precision) -> None:
    """Engines whose names have parts are checked when they are made."""
    known = sorted({name for each in get_args(Precision) for name in engines_for(each)} | {TWINS})
    if engine not in known:
        raise ValueError(
            f"unknown engine {engine!r} in {text!r}; write ENGINE:PRECISION with one of {', '.join(known)}"
        )
    runs = engines_for(precision)
    if ("turbo" if engine == TWINS else engine) not in runs:
        raise ValueError(f"engine {engine!r} does not run {precision!r}; {precision!r} is run by {', '.join(runs)}")


def check_reference(text: str) -> None:
    """Raise ValueError unless it is the float32 reference, which alone is a truth."""
    engine, _, precision = text.partition(":")
    if f"{engine}:{ALIASES.get(precision, precision or 'fp32')}" != REFERENCE:
        raise ValueError(f"--reference {text}: an audit compares with {REFERENCE}; give the other as --candidate")


class StageSubject:
    """Any engine: what goes from stage to stage.

    Args:
        name: ENGINE:PRECISION.
        engine: stage by stage.
    """

    granularity = "stages, and the keys and values of every layer"
    wide_logits = False
    allowed = ALLOWED_STAGE

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.engine = name, engine

    @torch.no_grad()
    def run(self, sample: Sample, visit: Visit) -> Tensor:
        """See `Subject`."""
        x, engine = sample.inputs, self.engine
        tokens = engine.encode_images(x.images, x.image_mask).clone()
        for camera in sample.cameras:
            given = visit(f"vision.cam{camera}.tokens", tokens[:, camera].clone())
            if given is not None:
                tokens[:, camera] = given.to(tokens)
        cache = engine.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
        actions = engine.denoise(self._told(cache, visit), x.state, sample.noise, sample.steps)
        given = visit("actions", actions.clone())
        return (actions if given is None else given).cpu()

    def _told(self, cache: PrefixCache, visit: Visit) -> PrefixCache:
        """The cache itself, so that its engine knows it again, or one with what was replaced."""
        slots = torch.nonzero(cache.visible[0]).flatten()
        held, replaced = {}, False
        for tensor in ("keys", "values"):
            layers = []
            for layer, value in enumerate(getattr(cache, tensor)):
                given = visit(f"cache.layers.{layer}.{tensor[0]}", value[:, :, slots].clone())
                changed = value.clone()
                if given is not None:
                    changed[:, :, slots], replaced = given.to(value), True
                layers.append(changed)
            held[tensor] = tuple(layers)
        return PrefixCache(held["keys"], held["values"], cache.lengths, cache.valid) if replaced else cache


class TickSubject:
    """A whole tick as it is deployed: it tells of nothing.

    Args:
        name: ENGINE:PRECISION.
        engine: that runs ticks.
        allowed: see `Subject`.
    """

    granularity = "actions"
    wide_logits = False

    def __init__(self, name: str, engine: TickEngine, allowed: float) -> None:
        self.name, self.engine, self.allowed = name, engine, allowed

    @torch.no_grad()
    def run(self, sample: Sample, visit: Visit) -> Tensor:
        """See `Subject`. Actions that the engine itself refuses for not being finite are NaN."""
        try:
            return self.engine.sample_actions(sample.inputs, sample.noise, sample.steps).cpu()
        except NonFiniteActionsError:
            return torch.full_like(sample.noise, float("nan"))


@dataclass(frozen=True, eq=False)
class Pair:
    """A candidate, and the reference in its precision, which says what that precision costs.

    Attributes:
        candidate: what is audited.
        plain: what sets the budget.
        deployed: the engine as it runs outside an audit, where it has whole ticks beside the stages.
    """

    candidate: Subject
    plain: Subject
    deployed: TickEngine | None = None


def make_pair(name: SubjectName, model: Pi0, reference: Pi0, quantisation: Quantisation | None = None) -> Pair:
    """Both subjects over one loaded model.

    Args:
        name: of the candidate.
        model: in `precision_dtype(name.precision)`, and not the reference's own.
        reference: in float32.
        quantisation: of a quantised precision, see `create_engine`.

    Raises ValueError for what `create_engine` cannot make, such as a GPU engine without a GPU.
    """
    plain_engine = create_engine("eager", model, name.precision, quantisation)
    assert isinstance(plain_engine, EagerEngine)
    plain: Subject = ModuleSubject(f"eager:{name.precision}", plain_engine)
    if name.precision == "fp32":
        plain = Reordered(plain_engine)
    if name.engine == "eager":
        return Pair(ModuleSubject(str(name), plain_engine), plain)
    if name.engine == TWINS:
        engine: Engine = TurboEngine(model, name.precision, twin_ops(), None, quantisation=quantisation)
    else:
        engine = create_engine(name.engine, model, name.precision, quantisation)
    if isinstance(engine, TurboEngine):
        return Pair(TurboSubject(str(name), engine, reference), plain, engine)
    return Pair(StageSubject(str(name), engine), plain, engine if isinstance(engine, TickEngine) else None)
