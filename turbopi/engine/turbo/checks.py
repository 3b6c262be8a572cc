"""What the turbo engine cannot run, said before anything is computed."""

from __future__ import annotations

import torch

from ...model import Pi0
from ...quant import Quantisation
from ...quant.fp8 import check_fp8
from ..base import Precision, precision_dtype
from ..capture import require_cuda

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp8")
OLDEST = (8, 0)
OLDEST_FP8 = (8, 9)
HEAD_DIMS = (32, 64, 128, 256)
OTHERS = "use the engine 'graphed' or 'eager'"


def check_device(device: torch.device, precision: Precision = "bf16") -> None:
    """Raise ValueError unless it is a CUDA GPU of compute capability 8.0 or later, for fp8 8.9 or later."""
    require_cuda(device, "turbo")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise ValueError(
            f"engine 'turbo' needs compute capability {OLDEST[0]}.{OLDEST[1]} (Ampere) or later, "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; {OTHERS}"
        )
    if precision == "fp8" and capability < OLDEST_FP8:
        raise ValueError(
            f"precision 'fp8' needs compute capability {OLDEST_FP8[0]}.{OLDEST_FP8[1]} (Ada, Hopper) or later, "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; use precision 'bf16'"
        )


def check_model(model: Pi0, precision: Precision) -> None:
    """Raise ValueError if the model's dtype, treatment of invalid tokens or sizes cannot be run."""
    dtype, config = precision_dtype(precision), model.config
    if model.vlm.dtype != dtype:
        raise ValueError(f"precision {precision!r} needs weights in {dtype}, the model holds {model.vlm.dtype}")
    if config.invalid_tokens != "dropped":
        raise ValueError(
            f"engine 'turbo' drops invalid tokens, the model has invalid_tokens={config.invalid_tokens!r}; "
            f"load it with invalid_tokens='dropped', or {OTHERS}"
        )
    if config.vlm.head_dim not in HEAD_DIMS:
        raise ValueError(
            f"engine 'turbo' has attention kernels for a head_dim of {', '.join(map(str, HEAD_DIMS))}, the model's is "
            f"{config.vlm.head_dim}; {OTHERS}"
        )
    vision_head = config.vision.width // config.vision.heads
    if vision_head % 8 or vision_head > 256:
        raise ValueError(
            f"engine 'turbo' needs a vision head size that is a multiple of 8 up to 256, the model's is {vision_head}; "
            f"{OTHERS}"
        )


def check_quantisation(model: Pi0, precision: Precision, quantisation: Quantisation | None) -> None:
    """Raise ValueError unless "fp8" comes with a plan and a calibration that can be run, and nothing else with any."""
    if precision == "fp8":
        check_fp8(model.config, quantisation)
    elif quantisation is not None:
        raise ValueError(f"precision {precision!r} quantises nothing; use 'fp8', or give no plan and no calibration")


def too_large(what: str, error: Exception) -> RuntimeError:
    """The error for a GPU whose memory does not suffice for `what`."""
    return RuntimeError(
        f"the GPU has too little memory for {what} of the engine 'turbo', which keeps folded weights beside the "
        f"model's ({error}); use a smaller batch, or {OTHERS}"
    )
