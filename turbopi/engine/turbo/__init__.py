"""The turbo engine: π0 and π0.5 as fast as the hardware allows, with the reference's answer."""

from .engine import TurboEngine, create_turbo
from .tick import Tick

__all__ = ["Tick", "TurboEngine", "create_turbo"]
