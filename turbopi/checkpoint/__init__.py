"""Names and files ↔ weights: openpi, lerobot and JAX checkpoints, new ones, conversions, and the doctor."""

from .checkpoint import Checkpoint, open_checkpoint
from .convert import Conversion, convert
from .doctor import examine
from .initialise import init_checkpoint
from .load import load_model, load_opened
from .report import Check, Fact, Report
from .save import save_checkpoint

__all__ = [
    "Check",
    "Checkpoint",
    "Conversion",
    "Fact",
    "Report",
    "convert",
    "examine",
    "init_checkpoint",
    "load_model",
    "load_opened",
    "open_checkpoint",
    "save_checkpoint",
]
