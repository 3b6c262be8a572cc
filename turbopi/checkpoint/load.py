"""A checkpoint into a `Pi0`, one tensor at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import InvalidTokens, ModelConfig, NumericsName
from ..model import Pi0
from ..model.numerics import MODEL_DTYPES, parameter_dtype
from .checkpoint import Checkpoint, open_checkpoint


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    config: ModelConfig | None = None,
    numerics: NumericsName | None = None,
    invalid_tokens: InvalidTokens | None = None,
) -> Pi0:
    """Load the checkpoint directory `path`, of any format, as a `Pi0` in eval mode.

    Weights go from the file to their device piece by piece: host memory stays below 1.2 times what is kept.

    Args:
        path: an openpi, lerobot or JAX checkpoint directory.
        device: where the parameters go, such as "cpu" or "cuda:0".
        dtype: float32 or bfloat16; which parameters stay float32 in bfloat16 is the numerics profile's matter.
        config: the whole configuration, instead of what the checkpoint states and shows.
        numerics: profile to use instead of the configuration's.
        invalid_tokens: treatment to use instead of the configuration's.

    Raises:
        FileNotFoundError: no such directory.
        CheckpointError: corrupt, incomplete or contradictory checkpoint.
        ValueError: unusable dtype, device or option.
    """
    return load_opened(
        open_checkpoint(path), device, dtype, config=config, numerics=numerics, invalid_tokens=invalid_tokens
    )


def load_opened(
    checkpoint: Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    config: ModelConfig | None = None,
    numerics: NumericsName | None = None,
    invalid_tokens: InvalidTokens | None = None,
) -> Pi0:
    """`load_model` for a checkpoint that is already open."""
    if dtype not in MODEL_DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, MODEL_DTYPES))}")
    target = usable_device(device)
    if config is None:
        config = checkpoint.config
    else:
        checkpoint.check(config)
    changes = {"numerics": numerics, "invalid_tokens": invalid_tokens}
    config = dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
    return build_model(config, target, dtype, checkpoint.tensors.read_into, order=checkpoint.tensors.infos)


def build_model(
    config: ModelConfig,
    device: str | torch.device,
    dtype: torch.dtype,
    fill: Callable[[str, Tensor], None],
    order: Iterable[str] | None = None,
) -> Pi0:
    """A `Pi0` in eval mode whose parameters are made one at a time.

    Args:
        config: of the model.
        device: where the parameters go.
        dtype: of the model; each parameter gets the dtype that the numerics profile gives it.
        fill: called with a parameter's name and its uninitialised tensor, to write its values.
        order: names in the order in which to fill; names that are no parameters are passed over.
    """
    with torch.device("meta"):
        model = Pi0(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in shapes if order is None else (name for name in order if name in shapes):
        kept = torch.empty(shapes[name], dtype=parameter_dtype(name, config.numerics, dtype), device=device)
        fill(name, kept)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(kept))
    return model.eval()


def usable_device(device: str | torch.device) -> torch.device:
    """The device by that name. Raises ValueError if the name is none or the machine has no such device."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is no device name; use for example 'cpu', 'cuda' or 'cuda:0'") from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise ValueError(
                f"device {device!s} was asked for, but torch sees {count} CUDA devices; use 'cpu', or install a CUDA "
                "build of torch on a machine with a GPU"
            )
    elif found.type != "cpu":
        raise ValueError(f"device {device!s} is not supported; use 'cpu' or 'cuda'")
    return found
