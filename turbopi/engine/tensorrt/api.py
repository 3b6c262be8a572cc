"""TensorRT's module, if it is installed, and the facts by which a built engine is told from another."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import Any

import torch

OLDEST = (10, 0)
"""The first TensorRT with strongly typed networks and named tensors as they are used here."""


def load_tensorrt() -> Any:
    """The module `tensorrt`. Raises ImportError that says what to install."""
    try:
        module = importlib.import_module("tensorrt")
    except ImportError as error:
        raise ImportError(
            f"the engine 'tensorrt' needs TensorRT {OLDEST[0]} or later ({error}); install tensorrt, or use the engine "
            "'turbo' or 'onnx'"
        ) from error
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if version < OLDEST:
        raise ImportError(
            f"TensorRT {module.__version__} is installed, the engine 'tensorrt' needs {OLDEST[0]}.{OLDEST[1]} or later"
        )
    return module


@dataclass(frozen=True)
class PlanKey:
    """What a built engine is only good for.

    Attributes:
        gpu: name of the GPU.
        capability: its compute capability, such as "9.0".
        tensorrt: version that built it.
        graph: SHA-256 of the ONNX graph's file.
        weights: SHA-256 of the weight files' own, in the order of their names.
    """

    gpu: str
    capability: str
    tensorrt: str
    graph: str
    weights: str

    def to_dict(self) -> dict[str, str]:
        """Plain JSON values."""
        return asdict(self)

    def differences(self, other: dict[str, str]) -> list[str]:
        """In words, where another key differs."""
        mine = self.to_dict()
        return [f"{name} is {other.get(name)!r}, here {mine[name]!r}" for name in mine if other.get(name) != mine[name]]


def gpu_facts(device: torch.device) -> tuple[str, str]:
    """Name and compute capability of a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"{major}.{minor}"
