"""Which matrix product is computed in which number format: a default and exceptions, as a small JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from ..config import ModelConfig

Format = Literal["bf16", "fp8", "int8", "w8a16", "w4a16", "nvfp4"]
FORMATS: tuple[Format, ...] = get_args(Format)
NEEDS_CALIBRATION: frozenset[Format] = frozenset({"fp8", "int8", "nvfp4"})
"""Formats whose activations are quantised too, with ranges that must be known beforehand."""

VISION_KINDS = ("qkv", "out", "fc1", "fc2")
GEMMA_KINDS = ("qkv", "out", "gate_up", "down")
NORMED_KINDS = frozenset({"qkv", "fc1", "gate_up"})
"""Products that read a norm's output."""


def product_names(config: ModelConfig) -> tuple[str, ...]:
    """Every matrix product that may be quantised, in the order in which they run.

    Products over one input are merged, as the turbo engine computes them: q, k and v, and gate and up. Of the prefix's
    last layer only keys and values are computed.
    """
    vision = [f"vision.layers.{i}.{kind}" for i in range(config.vision.depth) for kind in VISION_KINDS]
    last = config.vlm.depth - 1
    prefix = [f"prefix.layers.{i}.{kind}" for i in range(last) for kind in GEMMA_KINDS]
    expert = [f"expert.layers.{i}.{kind}" for i in range(config.expert.depth) for kind in GEMMA_KINDS]
    return (*vision, *prefix, f"prefix.layers.{last}.qkv", *expert)


def input_width(config: ModelConfig, product: str) -> int:
    """How many channels a product reads. Raises KeyError for what is no product's name."""
    tower, kind = product.split(".")[0], product.rsplit(".", 1)[1]
    if tower == "vision":
        vision = config.vision
        return {"qkv": vision.width, "out": vision.width, "fc1": vision.width, "fc2": vision.mlp_dim}[kind]
    gemma = {"prefix": config.vlm, "expert": config.expert}[tower]
    heads = gemma.heads * gemma.head_dim
    return {"qkv": gemma.width, "out": heads, "gate_up": gemma.width, "down": gemma.mlp_dim}[kind]


@dataclass(frozen=True)
class PrecisionPlan:
    """A number format for every product.

    Attributes:
        default: of products that no exception names.
        exceptions: formats by product name or shell pattern, such as "expert.layers.*.down"; the last match wins.
    """

    default: Format
    exceptions: Mapping[str, Format] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "exceptions", dict(self.exceptions))
        for where, chosen in (("default", self.default), *self.exceptions.items()):
            if chosen not in FORMATS:
                raise ValueError(f"precision plan: {where} has the format {chosen!r}; known: {', '.join(FORMATS)}")

    def format_of(self, product: str) -> Format:
        """The format of one product."""
        chosen = self.default
        for pattern, exception in self.exceptions.items():
            if fnmatchcase(product, pattern):
                chosen = exception
        return chosen

    def formats(self, config: ModelConfig) -> dict[str, Format]:
        """The format of every product of a model. Raises ValueError as `check`."""
        self.check(config)
        return {product: self.format_of(product) for product in product_names(config)}

    def needs_calibration(self, config: ModelConfig) -> bool:
        """Whether any product's activations are quantised. Raises ValueError as `check`."""
        return not NEEDS_CALIBRATION.isdisjoint(self.formats(config).values())

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError if an exception matches no product of the model."""
        products = product_names(config)
        stray = [p for p in self.exceptions if not any(fnmatchcase(product, p) for product in products)]
        if stray:
            raise ValueError(
                f"the precision plan names products that the model does not have: {', '.join(map(repr, stray))}; "
                f"names are {products[0]!r} to {products[-1]!r}, with * for any part"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        return {"default": self.default, "exceptions": dict(self.exceptions)}

    @classmethod
    def from_dict(cls, values: Any) -> PrecisionPlan:
        """Build from `to_dict`'s form. Raises ValueError that says what is wrong with it."""
        if not isinstance(values, Mapping) or "default" not in values or set(values) - {"default", "exceptions"}:
            found = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"a precision plan is an object with 'default' and 'exceptions', got {found}")
        exceptions = values.get("exceptions", {})
        if not isinstance(exceptions, Mapping):
            raise ValueError(f"a precision plan's exceptions are formats by product name, got {exceptions!r}")
        return cls(values["default"], exceptions)

    @classmethod
    def load(cls, path: str | Path) -> PrecisionPlan:
        """Read a plan's file. Raises FileNotFoundError, or ValueError that names the file and what is wrong with it."""
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no precision plan at {file}; `PrecisionPlan.save` or `turbo-pi audit` write one")
        try:
            return cls.from_dict(json.loads(file.read_text()))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON; returns the path."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return file
