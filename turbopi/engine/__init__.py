"""Ways to run the three stages, behind one protocol."""

from .base import (
    DTYPES,
    FLOATS,
    STAGES,
    DescribedEngine,
    Engine,
    Precision,
    TickEngine,
    TimedEngine,
    create_engine,
    engines_for,
    precision_dtype,
    sample_actions,
)
from .compiled import CompiledEngine
from .eager import EagerEngine
from .exported import create_exported
from .graphed import GraphedEngine
from .mixed import MixedEngine
from .onnx import create_onnx
from .tensorrt import create_tensorrt
from .turbo import TurboEngine

__all__ = [
    "DTYPES",
    "FLOATS",
    "STAGES",
    "CompiledEngine",
    "DescribedEngine",
    "EagerEngine",
    "Engine",
    "GraphedEngine",
    "MixedEngine",
    "Precision",
    "TickEngine",
    "TimedEngine",
    "TurboEngine",
    "create_engine",
    "create_exported",
    "create_onnx",
    "create_tensorrt",
    "engines_for",
    "precision_dtype",
    "sample_actions",
]
