"""The reference: plain PyTorch π0 and π0.5, written to be read. Nobody optimises it."""

from .inputs import ModelInput
from .pi0 import Pi0
from .prefix import PrefixCache

__all__ = ["ModelInput", "Pi0", "PrefixCache"]
