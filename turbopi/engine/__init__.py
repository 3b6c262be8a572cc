"""Ways to run the three stages, behind one protocol."""

from .base import DTYPES, STAGES, Engine, Precision, TickEngine, create_engine, precision_dtype, sample_actions
from .compiled import CompiledEngine
from .eager import EagerEngine
from .graphed import GraphedEngine
from .turbo import TurboEngine

__all__ = [
    "DTYPES",
    "STAGES",
    "CompiledEngine",
    "EagerEngine",
    "Engine",
    "GraphedEngine",
    "Precision",
    "TickEngine",
    "TurboEngine",
    "create_engine",
    "precision_dtype",
    "sample_actions",
]
