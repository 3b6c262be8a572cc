"""The ranges of every product's input, as measured on observations, in a JSON file beside the checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from decimal import ROUND_CEILING, Context
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError
from ..model import Pi0
from .plan import NEEDS_CALIBRATION, NORMED_KINDS, PrecisionPlan, input_width, product_names

Observer = Literal["max", "percentile"]
CALIBRATION_FILE = "calibration.json"
VERSION = 1
_SAMPLES = 1024
_FOUR_DIGITS_UP = Context(prec=4, rounding=ROUND_CEILING)
_MAKE = "make one with `turbo-pi calibrate --checkpoint ...`"


@dataclass(frozen=True)
class InputRange:
    """How far one product's input reaches.

    "Normed": where the input is a norm's output, the normalised value before the norm's own scale, shift or modulation,
    which engines that fold those into the weights see instead.

    Attributes:
        amax: largest magnitude, or the observer's percentile of it.
        channel_amax: the same of each input channel, at most `amax`.
        normed_amax, normed_channel_amax: of the normalised value; None where the input comes from no norm.
    """

    amax: float
    channel_amax: tuple[float, ...]
    normed_amax: float | None = None
    normed_channel_amax: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if (self.normed_amax is None) != (self.normed_channel_amax is None):
            raise ValueError("an input range has either both normed ranges or neither")
        for amax, channels in ((self.amax, self.channel_amax), (self.normed_amax, self.normed_channel_amax)):
            if amax is None or channels is None:
                continue
            if not (math.isfinite(amax) and amax > 0):
                raise ValueError(f"an input range's amax must be positive and finite, got {amax!r}")
            if not all(0 <= channel <= amax for channel in channels):
                raise ValueError(f"an input range's channels must lie between 0 and its amax {amax:g}")


@dataclass(frozen=True)
class Calibration:
    """Ranges of all products of one checkpoint.

    Attributes:
        checkpoint_hash: `model_hash` of the weights that were observed.
        robot: whose observations.
        source: where they came from, for people.
        frames: how many.
        observer: "max", or "percentile": the rest above it is cut off.
        percentile: of magnitudes, 100 for "max".
        inputs: ranges by product name.
        synthetic: made of noise, not of real observations: worth little.
    """

    checkpoint_hash: str
    robot: str
    source: str
    frames: int
    observer: Observer
    percentile: float
    inputs: Mapping[str, InputRange]
    synthetic: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", dict(self.inputs))
        if self.observer not in get_args(Observer):
            raise ValueError(f"calibration: observer {self.observer!r}; known: {', '.join(get_args(Observer))}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"calibration: percentile must be above 0 and at most 100, got {self.percentile!r}")

    def check(self, checkpoint_hash: str, config: ModelConfig) -> None:
        """Raise CheckpointError unless this is the calibration of these weights and covers all their products."""
        if checkpoint_hash != self.checkpoint_hash:
            raise CheckpointError(
                f"the calibration ({self.source}) is of another checkpoint: it has the hash {self.checkpoint_hash}, "
                f"the weights have {checkpoint_hash}; {_MAKE}"
            )
        products = product_names(config)
        missing, stray = set(products) - set(self.inputs), set(self.inputs) - set(products)
        if missing or stray:
            raise CheckpointError(
                f"the calibration lacks {sorted(missing)[:3]} and has {sorted(stray)[:3]}, which the model does not "
                f"have; {_MAKE}"
            )
        for product in products:
            self._check_input(product, input_width(config, product))

    def summary(self) -> dict[str, Any]:
        """All but the ranges, and a digest of those, as JSON values, for receipts."""
        ranges = repr(sorted((name, astuple(found)) for name, found in self.inputs.items()))
        return {**self._head(), "ranges": hashlib.sha256(ranges.encode()).hexdigest()[:16]}

    def _head(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "inputs"}

    def _check_input(self, product: str, width: int) -> None:
        found, normed = self.inputs[product], product.rsplit(".", 1)[1] in NORMED_KINDS
        channels = {len(found.channel_amax)} | (set() if not normed else {len(found.normed_channel_amax or ())})
        if channels != {width} or (found.normed_channel_amax is not None) != normed:
            raise CheckpointError(
                f"the calibration has {sorted(channels)} channels for {product}, the model {width}"
                f"{', normed ones too' if normed else ''}; {_MAKE}"
            )

    def save(self, path: str | Path) -> Path:
        """Write as JSON, ranges rounded up to four digits; returns the path."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        inputs = {name: _rounded(asdict(found)) for name, found in self.inputs.items()}
        file.write_text(
            json.dumps({"version": VERSION, **self._head(), "inputs": inputs}, separators=(",", ":")) + "\n"
        )
        return file

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a calibration's file. Raises FileNotFoundError, or CheckpointError that says what is wrong with it."""
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no calibration at {file}; {_MAKE}")
        try:
            values = json.loads(file.read_text())
            if values.pop("version") != VERSION:
                raise ValueError(f"its version is not {VERSION}")
            inputs = {name: InputRange(**_tuples(found)) for name, found in values.pop("inputs").items()}
            return cls(**values, inputs=inputs)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{file} is no calibration that can be read ({error}); {_MAKE}") from error


@dataclass(frozen=True)
class Quantisation:
    """All that an engine needs to know in order to quantise a model.

    Attributes:
        plan: formats.
        calibration: ranges; None where no format needs any.
    """

    plan: PrecisionPlan
    calibration: Calibration | None = None

    def check(self, precision: str, model: Pi0) -> None:
        """Raise ValueError (CheckpointError for a calibration that does not belong) unless all fits the model."""
        formats = set(self.plan.formats(model.config).values())
        if precision not in formats:
            raise ValueError(
                f"precision {precision!r} was asked for, but the plan has {', '.join(sorted(formats))} only; "
                "ask for one of these, or change the plan"
            )
        wanting = sorted(formats & NEEDS_CALIBRATION)
        if self.calibration is not None:
            self.calibration.check(model_hash(model), model.config)
        elif wanting:
            raise ValueError(f"{', '.join(wanting)} needs a calibration, and none was given; {_MAKE}")

    def check_robot(self, robot: str) -> None:
        """Raise CheckpointError for ranges of another robot's frames: the same weights may serve several robots."""
        ranges = self.calibration
        if ranges is None or ranges.synthetic or ranges.robot == robot:
            return
        raise CheckpointError(
            f"the calibration was made with frames of robot {ranges.robot!r}, this policy is for {robot!r}, whose "
            "activations reach elsewhere; run `turbo-pi calibrate` with frames of this robot"
        )


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Every number rounded up to four significant digits, so that no range shrinks."""
    return {name: _round_up(value) for name, value in values.items() if value is not None}


def _round_up(value: float | tuple[float, ...]) -> Any:
    if isinstance(value, tuple):
        return [_round_up(number) for number in value]
    return float(_FOUR_DIGITS_UP.create_decimal(repr(float(value))))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def model_hash(model: Pi0) -> str:
    """Tell weights apart: `weights_hash` of a model's parameters.

    The same for a checkpoint in any format, on any device, loaded in float32 or in bfloat16.
    """
    parameters = dict(model.named_parameters())
    return weights_hash(parameters, parameters.__getitem__)


@torch.no_grad()
def weights_hash(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """A digest of every parameter's name, shape and up to 1024 values at even distances, as bf16.

    It tells checkpoints of different training apart, which moves nearly every value. It does not notice an edit of
    single values, nor one that leaves what is read alone: where the distance is a multiple of the row's length, as in
    matrices of 1024 rows or more whose sides are powers of two, that is the first column only.

    `read` gives one parameter at a time, so that weights need not be in memory together.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        parameter = read(name)
        flat = parameter.detach().flatten()
        sample = flat[:: -(-flat.numel() // _SAMPLES)]
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
