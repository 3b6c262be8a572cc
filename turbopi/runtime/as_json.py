"""Frozen dataclasses of settings as JSON values, and back; what is at its default is not written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def written(config: object) -> dict[str, Any]:
    """What is not at its default, as plain JSON values; `read` is the inverse."""
    found: dict[str, Any] = {}
    for f in fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if f.default is not MISSING and value == f.default:
            continue
        if dataclasses.is_dataclass(value):
            value = written(value)
        found[f.name] = list(value) if isinstance(value, tuple) else value
    return found


def read(cls: type[T], values: Any, where: str = "") -> T:
    """A dataclass from `written`'s form; `where` stands before field names in errors.

    Raises ValueError that names unknown and missing fields, or says what the dataclass itself says.
    """
    if not isinstance(values, Mapping):
        name = where.rstrip(".") or "the configuration"
        raise ValueError(f"{name} is {values!r}, expected a map of {cls.__name__}'s fields")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    missing = sorted(n for n, f in known.items() if f.default is MISSING and n not in values)
    if unknown or missing:
        problems = [f"unknown field {where}{n}" for n in unknown] + [f"missing field {where}{n}" for n in missing]
        raise ValueError(f"{', '.join(problems)}; {cls.__name__} has {', '.join(known)}")
    hints = get_type_hints(cls)
    return cls(**{name: _value(hints[name], value, f"{where}{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (UnionType,) else (hint,)
    nested = next((option for option in options if dataclasses.is_dataclass(option)), None)
    if nested is not None and value is not None:
        return read(nested, value, f"{where}.")  # type: ignore[arg-type]
    return tuple(value) if isinstance(value, list) else value
