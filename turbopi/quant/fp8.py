"""Folded weights in E4M3, for engines that multiply E4M3 by E4M3 and scale the sums.

x W^T = (x / s) (W / t)^T · s·t, with one static s for the input, from the calibration, and a t for each output channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from .calibration import Calibration, InputRange, Quantisation
from .fold import Rounding
from .formats import e4m3_scale, to_e4m3
from .plan import NORMED_KINDS, Format, input_width, product_names

MULTIPLE = 16
"""Of which a product's widths must be multiples: the tensor cores' rows of E4M3 stand at 16 bytes."""
RUN_BY_TURBO: tuple[Format, ...] = ("fp8", "bf16")


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A matrix (out, in) in E4M3.

    Attributes:
        values: (out, in) float8_e4m3fn, W / t.
        scale: (out,) float32, s·t: by which a sum of products is multiplied.
        inverse: 1 / s, by which the product's input is multiplied before it is rounded to E4M3.
        bias: (out,) in the dtype of the product's output, or None.
    """

    values: Tensor
    scale: Tensor
    inverse: float
    bias: Tensor | None = None

    @property
    def weight_scale(self) -> Tensor:
        """(out,) float32, t: what dequantises the values."""
        return self.scale * self.inverse

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        parts = (self.values, self.scale, self.bias)
        return sum(part.numel() * part.itemsize for part in parts if part is not None)


def to_fp8_weight(weight: Tensor, input_amax: float, bias: Tensor | None = None) -> Fp8Weight:
    """A matrix (out, in) of any float dtype for inputs up to `input_amax`, what is beyond being saturated."""
    scale = e4m3_scale(weight.abs().amax(dim=1))
    step = float(e4m3_scale(torch.tensor(input_amax)))
    return Fp8Weight(to_e4m3(weight, scale[:, None]).contiguous(), (scale * step).contiguous(), 1.0 / step, bias)


class Fp8Rounding(Rounding):
    """Keeps the plan's fp8 products as `Fp8Weight`, all others as tensors of `dtype`.

    Args:
        dtype: of the tower.
        plan: the format of every product, "fp8" or "bf16".
        amax: of every fp8 product's input, see `input_amax`.
    """

    def __init__(self, dtype: torch.dtype, plan: Mapping[str, Format], amax: Mapping[str, float]) -> None:
        super().__init__(dtype)
        self._plan, self._amax = plan, amax

    def brings_bias(self, product: str) -> bool:
        """See `Rounding`. In E4M3 a bias among the weights would be rounded to three bits of mantissa."""
        return self._plan[product] == "fp8"

    def keep(self, product: str, weight: Tensor, bias: Tensor | None = None) -> Any:
        """See `Rounding`."""
        if self._plan[product] != "fp8":
            return super().keep(product, weight)
        kept = None if bias is None else bias.to(self.dtype).contiguous()
        return to_fp8_weight(weight, self._amax[product], kept)


def input_amax(config: ModelConfig, calibration: Calibration) -> dict[str, float]:
    """How far every product's input reaches as the folded model computes it.

    That is before a norm's own scale where that is folded into the product's weight; π0.5's expert folds none.
    """
    return {
        product: _reach(calibration.inputs[product], _folds_norm(config, product)) for product in product_names(config)
    }


def _folds_norm(config: ModelConfig, product: str) -> bool:
    tower, kind = product.split(".")[0], product.rsplit(".", 1)[1]
    return kind in NORMED_KINDS and (tower != "expert" or config.kind == "pi0")


def _reach(found: InputRange, normed: bool) -> float:
    return found.normed_amax if normed and found.normed_amax is not None else found.amax


def output_width(config: ModelConfig, product: str) -> int:
    """How many channels a product makes. Raises KeyError for what is no product's name."""
    tower, _, layer, kind = product.split(".")
    if tower == "vision":
        vision = config.vision
        return {"qkv": 3 * vision.width, "out": vision.width, "fc1": vision.mlp_dim, "fc2": vision.width}[kind]
    gemma = {"prefix": config.vlm, "expert": config.expert}[tower]
    last = tower == "prefix" and int(layer) == config.vlm.depth - 1
    heads = 2 * gemma.kv_heads if last else gemma.heads + 2 * gemma.kv_heads
    return {
        "qkv": heads * gemma.head_dim,
        "out": gemma.width,
        "gate_up": 2 * gemma.mlp_dim,
        "down": gemma.width,
    }[kind]


def check_fp8(config: ModelConfig, quantisation: Quantisation | None) -> tuple[dict[str, Format], Calibration]:
    """The plan's formats and the calibration for an engine that computes in fp8 and bf16.

    Raises:
        ValueError: no plan or no calibration; a plan with other formats; widths that E4M3 products cannot have.
    """
    if quantisation is None or quantisation.calibration is None:
        raise ValueError(
            "precision 'fp8' needs a plan and a calibration, which were not given: make one with "
            "`turbo-pi calibrate --checkpoint ...`, or use precision 'bf16'"
        )
    formats = quantisation.plan.formats(config)
    if other := sorted(set(formats.values()) - set(RUN_BY_TURBO)):
        raise ValueError(
            f"engine 'turbo' runs products in {' and '.join(RUN_BY_TURBO)}, the plan has {', '.join(other)} too; "
            "change the plan, or use the engine 'eager'"
        )
    for product, chosen in formats.items():
        widths = input_width(config, product), output_width(config, product)
        if product.startswith("vision.") and product.endswith((".fc1", ".fc2")):
            widths = (config.vision.width, config.vision.width)  # the hidden units are filled up by the fold
        if chosen == "fp8" and any(width % MULTIPLE for width in widths):
            raise ValueError(
                f"{product} is {widths[0]} to {widths[1]} wide, and fp8 products need multiples of {MULTIPLE}; "
                "leave it in 'bf16' by an exception in the precision plan, or use precision 'bf16'"
            )
    return formats, quantisation.calibration


def fp8_details(config: ModelConfig, quantisation: Quantisation) -> dict[str, Any]:
    """What an engine is quantised with, as JSON values, for receipts; of what `check_fp8` has let pass."""
    formats, calibration = check_fp8(config, quantisation)
    chosen = list(formats.values())
    return {
        "plan": quantisation.plan.to_dict(),
        "products": {name: chosen.count(name) for name in dict.fromkeys(chosen)},
        "calibration": calibration.summary(),
    }
