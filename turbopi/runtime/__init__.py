"""What must be computed at this tick? Decisions over an engine's three stages; docs/runtime.md defines each."""

from .config import (
    ChunkingConfig,
    DeadlineConfig,
    PhaseGate,
    ReuseConfig,
    RtcConfig,
    RuntimeConfig,
    SimilarityGate,
    StreamConfig,
)
from .runtime import Runtime
from .snapshot import MixtureError
from .stream import Stamp

__all__ = [
    "ChunkingConfig",
    "DeadlineConfig",
    "MixtureError",
    "PhaseGate",
    "ReuseConfig",
    "RtcConfig",
    "Runtime",
    "RuntimeConfig",
    "SimilarityGate",
    "Stamp",
    "StreamConfig",
]
