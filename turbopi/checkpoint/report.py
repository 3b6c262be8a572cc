"""What the doctor hands back: facts, and checks with their remedies. Rendering is the command line's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Fact:
    """One line of what a checkpoint is."""

    name: str
    value: str


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `remedy` is empty only on a pass."""

    name: str
    status: Status
    detail: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.status != "pass" and not self.remedy:
            raise ValueError(f"check {self.name!r} {self.status}s without a remedy")


@dataclass(frozen=True)
class Report:
    """The examination of one directory."""

    path: Path
    facts: tuple[Fact, ...]
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed; empty means that the policy can be used."""
        return tuple(check for check in self.checks if check.status == "fail")

    @property
    def warned(self) -> tuple[Check, ...]:
        """The checks that found something worth a look."""
        return tuple(check for check in self.checks if check.status == "warn")

    def fact(self, name: str) -> str:
        """The value of fact `name`. Raises KeyError if there is none."""
        return {fact.name: fact.value for fact in self.facts}[name]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return {
            "path": str(self.path),
            "facts": {fact.name: fact.value for fact in self.facts},
            "checks": [vars(check) for check in self.checks],
            "ok": not self.failed,
        }
