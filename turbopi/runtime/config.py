"""What a control tick does with a model: frozen dataclasses that check themselves and are written into every receipt.

docs/runtime.md says what each setting means. Settings that are left at their default are not written out, so that a
receipt of a plain policy stays what it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from ..engine.integrate import steps_at
from .as_json import read, written
from .guidance import WeightSchedule

ReuseMode = Literal["full", "vision_only", "state_only", "text_fixed", "layer_wise"]
Signal = Literal["tokens", "images", "state"]
Blend = Literal["replace", "ensemble", "overlap"]
RtcMethod = Literal["guided", "guided_vjp", "conditioned"]
Measure = Literal["steps", "reuse", "hold"]


def _integer(config: object, name: str, least: int) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = {0: "a non-negative integer", 1: "an integer of at least 1"}.get(
            least, f"an integer of at least {least}"
        )
        raise ValueError(f"{type(config).__name__}.{name} must be {kind}, got {value!r}")


def _number(config: object, name: str, low: float, high: float = math.inf, *, above: bool = False) -> None:
    value = getattr(config, name)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (above and value == low):
        span = f"above {low:g}" if above else f"{low:g} or more"
        until = "" if high == math.inf else f", at most {high:g}"
        raise ValueError(f"{type(config).__name__}.{name} must be a number {span}{until}, got {value!r}")


def _flag(config: object, name: str) -> None:
    if not isinstance(getattr(config, name), bool):
        raise ValueError(f"{type(config).__name__}.{name} must be true or false, got {getattr(config, name)!r}")


def _numbers(config: object, name: str, *, whole: bool = False, gaps: bool = False) -> None:
    """A tuple of finite numbers; `whole`: of integers; `gaps`: None may stand for one."""
    value, kinds = getattr(config, name), (int,) if whole else (int, float)
    given = [v for v in value if not (gaps and v is None)] if isinstance(value, tuple) else [value]
    if isinstance(value, tuple) and all(type(v) in kinds and math.isfinite(v) for v in given):
        return
    kind = "integers" if whole else f"finite numbers{' or null' if gaps else ''}"
    raise ValueError(f"{type(config).__name__}.{name} must be a list of {kind}, got {value!r}")


def _choice(config: object, name: str, choices: object) -> None:
    if getattr(config, name) not in get_args(choices):
        known = ", ".join(map(repr, get_args(choices)))
        raise ValueError(f"{type(config).__name__}.{name} must be one of {known}, got {getattr(config, name)!r}")


@dataclass(frozen=True)
class SimilarityGate:
    """Reuse while what is seen is like what the snapshot saw.

    Attributes:
        threshold: similarity from which on the snapshot is reused; 1 reuses only what is identical.
        signal: "tokens" compares image tokens (stage 1 runs at every tick), "images" every fourth row of the
            frames, "state" the state.
        state_threshold: where given, the state must be as similar as that, too: the cross-modal gate.
    """

    threshold: float
    signal: Signal = "tokens"
    state_threshold: float | None = None

    def __post_init__(self) -> None:
        _number(self, "threshold", 0.0, 1.0, above=True)
        _choice(self, "signal", Signal)
        if self.state_threshold is not None:
            _number(self, "state_threshold", 0.0, 1.0, above=True)
            if self.signal == "state":
                raise ValueError("SimilarityGate.signal is 'state' already: leave state_threshold out")


@dataclass(frozen=True)
class PhaseGate:
    """A tighter gate where the last chunk says that something delicate is going on.

    Attributes:
        threshold: instead of the similarity gate's, near an event; 1 recomputes. With a fixed frequency, an event
            recomputes, whatever this is.
        gripper: the robot's action dimension that opens and closes; a change of sign in the last chunk is an event.
        window: actions of the last chunk, from the first on, that are looked at.
        curvature: root-mean-square second difference of the other, normalised actions there that is an event.
    """

    threshold: float = 1.0
    gripper: int = 6
    window: int = 10
    curvature: float = math.inf

    def __post_init__(self) -> None:
        _number(self, "threshold", 0.0, 1.0, above=True)
        _integer(self, "gripper", 0)
        _integer(self, "window", 2)
        _number(self, "curvature", 0.0, above=True)


@dataclass(frozen=True)
class ReuseConfig:
    """When, and of which parts, the prefix of an earlier tick is used again.

    Attributes:
        mode: which parts a fast tick takes from the snapshot; see docs/runtime.md.
        every: recompute at every n-th tick.
        gate: recompute when what is seen has changed.
        max_age: ticks after which a gated snapshot is recomputed in any case.
        layers: of "layer_wise": how many early layers keep the old image rows.
        phase: a tighter gate near events.
        synchronised: whether all reused parts come from one tick. If not, each camera and the prompt are recomputed
            at ticks of their own, spread over the `every` ticks: the same ages, mixed snapshots ("full" only).
    """

    mode: ReuseMode = "full"
    every: int | None = None
    gate: SimilarityGate | None = None
    max_age: int = 20
    layers: int | None = None
    phase: PhaseGate | None = None
    synchronised: bool = True

    def __post_init__(self) -> None:
        _choice(self, "mode", ReuseMode)
        _integer(self, "max_age", 1)
        if self.every is not None:
            _integer(self, "every", 1)
        if (self.every is None) == (self.gate is None) and not (self.mode == "text_fixed" and self.every is None):
            raise ValueError(
                "ReuseConfig needs either every (a fixed frequency) or gate (a similarity), and not both; only "
                "mode 'text_fixed' goes without, until the prompt changes"
            )
        if (self.layers is None) == (self.mode == "layer_wise"):
            raise ValueError(f"ReuseConfig.layers belongs to mode 'layer_wise' and only to that, mode is {self.mode!r}")
        if self.layers is not None:
            _integer(self, "layers", 0)
        _flag(self, "synchronised")
        if not self.synchronised and self.phase is not None:
            raise ValueError(
                "ReuseConfig.phase does not go with synchronised=False, whose parts have ticks of their own"
            )
        if not self.synchronised and (self.mode != "full" or self.every is None or self.every < 2):
            raise ValueError("ReuseConfig.synchronised=False needs mode 'full' and every of at least 2")


@dataclass(frozen=True)
class ChunkingConfig:
    """How chunks are played, action by action.

    Attributes:
        replan: actions of a chunk after which the next inference begins.
        blend: where chunks overlap: "replace" takes the newest, "ensemble" averages all of them, "overlap" merges each
            new one into what was planned.
        decay: of "ensemble": a chunk that is i chunks younger than the oldest weighs exp(-decay·i).
        newest: of "overlap": weight of the new chunk, 1 - newest that of the plan.
        delay: simulated ticks between the beginning of an inference and its chunk, the episode's first one excepted.
        hold: what is done when the plan has run out: a number a dimension, None keeps the last action's. Empty: the
            last action again.
        max_hold: ticks in a row that may be held before it is an error; None for any number.
    """

    replan: int = 5
    blend: Blend = "replace"
    decay: float = 0.01
    newest: float = 0.7
    delay: int = 0
    hold: tuple[float | None, ...] = ()
    max_hold: int | None = None

    def __post_init__(self) -> None:
        _integer(self, "replan", 1)
        _choice(self, "blend", Blend)
        _number(self, "decay", 0.0)
        _number(self, "newest", 0.0, 1.0, above=True)
        _integer(self, "delay", 0)
        _numbers(self, "hold", gaps=True)
        if self.max_hold is not None:
            _integer(self, "max_hold", 0)


@dataclass(frozen=True)
class RtcConfig:
    """Real-time chunking: the next chunk continues the one that is being executed.

    Attributes:
        method: "guided" as LeRobot computes it, "guided_vjp" with the true vector-Jacobian product, "conditioned" for
            models that were trained with given first actions.
        executed: actions of a chunk that have been executed when the next inference begins, where the caller does not
            say; usually the client's replan interval.
        delay: actions that are executed during an inference, where the caller does not say.
        horizon: actions of what is left over from which on nothing is pulled; None for all that are left.
        schedule: how the pull falls between delay and horizon.
        limit: of the guidance strength.
    """

    method: RtcMethod = "guided"
    executed: int = 5
    delay: int = 0
    horizon: int | None = None
    schedule: WeightSchedule = "LINEAR"
    limit: float = 10.0

    def __post_init__(self) -> None:
        _choice(self, "method", RtcMethod)
        _choice(self, "schedule", WeightSchedule)
        _integer(self, "executed", 1)
        _integer(self, "delay", 0)
        _number(self, "limit", 0.0, above=True)
        if self.horizon is not None:
            _integer(self, "horizon", 1)
            if self.horizon < self.delay:
                raise ValueError(
                    f"RtcConfig.horizon {self.horizon} is shorter than delay {self.delay}: actions that will have been "
                    "executed must be followed; give a horizon of at least the delay"
                )


@dataclass(frozen=True)
class DeadlineConfig:
    """Keep ticks within a budget by computing less, in a declared order.

    Attributes:
        period_ms: of the control loop.
        p99_ms: budget: at most 1 % of the ticks of a window may take longer.
        order: what is given up, first to last: "steps" (each of `fewer_steps` in turn), "reuse", "hold" the chunk.
        fewer_steps: step counts, falling.
        reuse_every: under "reuse", the prefix is computed at every n-th tick.
        window: ticks.
        recover: ticks in a row within `margin` of the budget after which the last measure is taken back.
        margin: part of the budget.
    """

    period_ms: float
    p99_ms: float
    order: tuple[Measure, ...] = ("steps", "reuse", "hold")
    fewer_steps: tuple[int, ...] = (5, 3)
    reuse_every: int = 2
    window: int = 100
    recover: int = 200
    margin: float = 0.8

    def __post_init__(self) -> None:
        _number(self, "period_ms", 0.0, above=True)
        _number(self, "p99_ms", 0.0, self.period_ms, above=True)
        _integer(self, "reuse_every", 2)
        _integer(self, "window", 10)
        _integer(self, "recover", 1)
        _number(self, "margin", 0.0, 1.0, above=True)
        _numbers(self, "fewer_steps", whole=True)
        known = isinstance(self.order, tuple) and all(measure in get_args(Measure) for measure in self.order)
        if not known or not self.order or len(set(self.order)) != len(self.order):
            raise ValueError(f"DeadlineConfig.order must name some of {get_args(Measure)}, each once, got {self.order}")
        if "steps" in self.order:
            falling = all(a > b for a, b in pairwise(self.fewer_steps))
            if not self.fewer_steps or not falling or min(self.fewer_steps) < 1:
                raise ValueError(f"DeadlineConfig.fewer_steps must fall and stay above 0, got {self.fewer_steps}")


@dataclass(frozen=True)
class StreamConfig:
    """What counts as a broken stream of observations.

    Attributes:
        frozen_after: ticks at which something else moves after which a camera that shows the same frame is reported.
        max_gap_s: seconds between two frames above which a gap is reported.
    """

    frozen_after: int = 10
    max_gap_s: float = 1.0

    def __post_init__(self) -> None:
        _integer(self, "frozen_after", 2)
        _number(self, "max_gap_s", 0.0, above=True)


@dataclass(frozen=True)
class RuntimeConfig:
    """What one control tick computes.

    Attributes:
        steps: flow-matching (Euler) evaluations.
        seed: of the noise; the same seed and the same observations give the same actions.
        times: of the evaluations, from 1 downwards, as many as `steps`. None: uniform.
        prompt_cache: keep the embedded prompt.
        reuse: of the prefix. None: only where nothing at all has changed.
        chunking: play chunks action by action. None: the client plays them.
        rtc: real-time chunking.
        deadline: compute less when ticks take too long.
        stream: watch the observations.
    """

    steps: int = 10
    seed: int = 0
    times: tuple[float, ...] | None = None
    prompt_cache: bool = False
    reuse: ReuseConfig | None = None
    chunking: ChunkingConfig | None = None
    rtc: RtcConfig | None = None
    deadline: DeadlineConfig | None = None
    stream: StreamConfig | None = None

    def __post_init__(self) -> None:
        _integer(self, "steps", 1)
        _integer(self, "seed", 0)
        _flag(self, "prompt_cache")
        if self.times is not None:
            _numbers(self, "times")
        if self.times is not None and len(steps_at(self.times)) != self.steps:
            raise ValueError(f"RuntimeConfig.times has {len(self.times)} values, steps is {self.steps}")
        self._check_deadline()
        self._check_rtc()

    def _check_deadline(self) -> None:
        if self.deadline is None:
            return
        if "steps" in self.deadline.order and (self.times is not None or self.deadline.fewer_steps[0] >= self.steps):
            raise ValueError(
                f"the deadline's fewer_steps {self.deadline.fewer_steps} must be fewer than steps {self.steps}, and "
                "the times must be uniform"
            )
        if "hold" in self.deadline.order and self.chunking is None:
            raise ValueError(
                "the deadline may hold the chunk only where the runtime plays it: give chunking, too, or an order "
                "without hold"
            )
        if "reuse" not in self.deadline.order or self.reuse is None:
            return
        if self.reuse.mode != "full":
            raise ValueError("the deadline's reuse is of mode 'full'; it does not go with another mode of reuse")
        if self.reuse.every is None or self.reuse.every >= self.deadline.reuse_every:
            raise ValueError(
                f"the deadline's reuse_every {self.deadline.reuse_every} would save nothing: the prefix is reused "
                "behind a gate or as seldom computed already; raise reuse_every, or leave 'reuse' out of the order"
            )

    def _check_rtc(self) -> None:
        if self.rtc is None or self.chunking is None:
            return
        if self.chunking.blend != "replace":
            raise ValueError(
                f"real-time chunking continues one chunk; it does not go with blend {self.chunking.blend!r}"
            )
        if self.rtc.horizon is not None and self.rtc.horizon < self.chunking.delay:
            raise ValueError(
                f"rtc.horizon {self.rtc.horizon} is shorter than chunking.delay {self.chunking.delay}: actions that "
                "will have been executed must be followed; give a horizon of at least the delay"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values: steps and seed, and whatever is not at its default; `from_dict` is the inverse."""
        return {"steps": self.steps, "seed": self.seed, **written(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RuntimeConfig:
        """Build from `to_dict`'s form. Raises ValueError that names what is unknown or wrong."""
        return read(cls, values)

    @classmethod
    def load(cls, path: Path) -> RuntimeConfig:
        """From a JSON file. Raises FileNotFoundError, or ValueError that names file and field."""
        if not path.is_file():
            raise FileNotFoundError(f"no runtime configuration at {path}; write one as JSON, see docs/runtime.md")
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
