"""Where a graph's weights come from: one parameter at a time, so that no model need be in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ..checkpoint.hashweights import hash_parameter
from ..checkpoint.tensors import read_tensor
from ..config import ModelConfig
from ..model import Pi0
from ..quant.calibration import weights_hash

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Weights:
    """The parameters of a `Pi0` under the reference's names.

    Attributes:
        config: of the model.
        shapes: of every parameter.
        read: one parameter by name, on the CPU in any floating dtype. Called again for every use.
        hash: of all of them, see `turbopi.quant.model_hash`.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    hash: str

    def tensor(self, name: str) -> Tensor:
        """A parameter as float32 on the CPU."""
        return self.read(name).detach().float().cpu()

    def array(self, name: str) -> np.ndarray:
        """A parameter as a float32 array."""
        return self.tensor(name).numpy()


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, without making any."""
    with torch.device("meta"):
        model = Pi0(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def weights_of_model(model: Pi0) -> Weights:
    """The weights of a loaded model, as they are."""
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return Weights(model.config, shapes, parameters.__getitem__, weights_hash(shapes, parameters.__getitem__))


def weights_of_checkpoint(checkpoint: Checkpoint, config: ModelConfig | None = None) -> Weights:
    """The weights of an opened checkpoint, read from its files when a graph asks for them.

    Raises CheckpointError if they do not fit the configuration.
    """
    config = checkpoint.config if config is None else config
    checkpoint.check(config)
    shapes = parameter_shapes(config)
    source = checkpoint.tensors

    def read(name: str) -> Tensor:
        return read_tensor(source, name)

    return Weights(config, shapes, read, weights_hash(shapes, read))


def hashed_weights(config: ModelConfig, seed: int) -> Weights:
    """Weights that a hash makes, parameter by parameter: a model of any size without a file."""
    shapes = parameter_shapes(config)

    def read(name: str) -> Tensor:
        return hash_parameter(name, shapes[name], seed)

    return Weights(config, shapes, read, f"hash-weights-seed-{seed}")


def as_array(tensor: Tensor) -> np.ndarray:
    """The same values without torch; what numpy lacks becomes ml_dtypes' type of that name."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()
