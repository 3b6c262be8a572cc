"""Ways to run the three stages, behind one protocol."""

from .base import DTYPES, Engine, Precision, create_engine, precision_dtype
from .eager import EagerEngine

__all__ = ["DTYPES", "EagerEngine", "Engine", "Precision", "create_engine", "precision_dtype"]
