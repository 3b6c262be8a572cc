"""Turbo-Pi: π0 and π0.5 robot policies in real time, proven against a plain reference."""

from .checkpoint import load_model
from .config import ModelConfig, preset
from .errors import CheckpointError, InputError
from .model import ModelInput, Pi0, PrefixCache
from .policy import Policy, load_policy
from .runtime import RuntimeConfig

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "InputError",
    "ModelConfig",
    "ModelInput",
    "Pi0",
    "Policy",
    "PrefixCache",
    "RuntimeConfig",
    "load_model",
    "load_policy",
    "preset",
]
