"""Real observations, wherever they are kept: files, recordings of the server, LIBERO rollouts, LeRobot datasets."""

from .files import read_frames, read_observation
from .model_inputs import MINIMUM_FRAMES, model_inputs

__all__ = ["MINIMUM_FRAMES", "model_inputs", "read_frames", "read_observation"]
