"""Linears that hold and compute with few bits: what stands in the reference's `nn.Linear`s when it is quantised.

Each keeps its weight as small as its format is. fp8 and nvfp4 are computed with float32 products of the rounded values,
so that any device shows what the format costs; int8 multiplies integers; w8a16 and w4a16 make bf16 weights on the fly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .formats import (
    Int4Groups,
    Nvfp4,
    e4m3_scale,
    int8_scale,
    nvfp4_tensor_scale,
    through_nvfp4,
    to_e4m3,
    to_int4,
    to_int8,
    to_nvfp4,
)

CUDA_ROWS = 32
"""`torch._int_mm` takes no fewer than 17 rows on a GPU; fewer are filled up to this."""
CUDA_MULTIPLE = 8
"""Of which it wants widths to be multiples."""


class QuantisedLinear(nn.Module, ABC):
    """A linear without its float weight.

    Attributes:
        weight: on the device "meta": shape and dtype of what the linear replaces, for code that asks for the dtype.
        in_features, out_features: as of `nn.Linear`.
        bias: (out,) float32, or None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device="meta")
        self.bias: Tensor | None
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """(...,in) -> (...,out) in x's dtype."""
        rows = x.reshape(-1, self.in_features)
        out = self.product(rows)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """(rows,in) -> (rows,out) float32, without the bias."""


class Fp8Linear(QuantisedLinear):
    """E4M3 weights with a scale for each output channel, E4M3 input with one static scale."""

    values: Tensor
    scale: Tensor
    input_scale: Tensor

    def __init__(self, linear: nn.Linear, input_amax: Tensor) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        scale = e4m3_scale(weight.abs().amax(dim=1))
        self.register_buffer("values", to_e4m3(weight, scale[:, None]))
        self.register_buffer("scale", scale)
        self.register_buffer("input_scale", e4m3_scale(input_amax))

    def product(self, rows: Tensor) -> Tensor:
        """See `QuantisedLinear`."""
        rounded = to_e4m3(rows, self.input_scale).float()
        return (rounded @ self.values.float().T) * (self.scale * self.input_scale)


class Int8Linear(QuantisedLinear):
    """int8 weights with a scale for each output channel, int8 input with one static scale, balanced before."""

    values: Tensor
    scale: Tensor
    divisor: Tensor

    def __init__(self, linear: nn.Linear, divisor: Tensor, input_amax: Tensor) -> None:
        super().__init__(linear)
        if linear.weight.is_cuda and (self.in_features % CUDA_MULTIPLE or self.out_features % CUDA_MULTIPLE):
            raise ValueError(
                f"int8 on a GPU needs widths that are multiples of {CUDA_MULTIPLE}, got {self.in_features} to "
                f"{self.out_features}; leave the product in bf16 or w8a16 by an exception in the precision plan"
            )
        weight = linear.weight.detach().float() * divisor
        scale = int8_scale(weight.abs().amax(dim=1))
        input_scale = int8_scale(input_amax)
        self.register_buffer("values", to_int8(weight, scale[:, None]))
        self.register_buffer("scale", scale * input_scale)
        self.register_buffer("divisor", divisor * input_scale)

    def product(self, rows: Tensor) -> Tensor:
        """See `QuantisedLinear`."""
        rounded = to_int8(rows, self.divisor)
        missing = max(0, CUDA_ROWS - len(rows)) if rows.is_cuda else 0
        sums = torch._int_mm(F.pad(rounded, (0, 0, 0, missing)), self.values.T)
        return sums[: len(rows)].float() * self.scale


class Int8WeightLinear(QuantisedLinear):
    """int8 weights with a scale for each output channel; the input stays as it is."""

    values: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        scale = int8_scale(weight.abs().amax(dim=1))
        self.register_buffer("values", to_int8(weight, scale[:, None]))
        self.register_buffer("scale", scale)

    def product(self, rows: Tensor) -> Tensor:
        """See `QuantisedLinear`; the integers are exact in bf16, so their scale can wait until behind the product."""
        return F.linear(rows, self.values.to(rows.dtype)).float() * self.scale


class Int4WeightLinear(QuantisedLinear):
    """int4 weights with a scale for each group of input channels; the input stays as it is."""

    packed: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        groups = to_int4(linear.weight.detach())
        self.register_buffer("packed", groups.packed)
        self.register_buffer("scale", groups.scale)

    def product(self, rows: Tensor) -> Tensor:
        """See `QuantisedLinear`."""
        return F.linear(rows, Int4Groups(self.packed, self.scale).dequantised(rows.dtype)).float()


class Nvfp4Linear(QuantisedLinear):
    """NVFP4 weights and input; the input's blocks are scaled as they come, its tensor scale is static."""

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor
    input_scale: Tensor

    def __init__(self, linear: nn.Linear, weight_amax: Tensor, input_amax: Tensor) -> None:
        super().__init__(linear)
        weight = to_nvfp4(linear.weight.detach(), nvfp4_tensor_scale(weight_amax))
        self.register_buffer("packed", weight.packed)
        self.register_buffer("block_scale", weight.block_scale)
        self.register_buffer("tensor_scale", weight.tensor_scale)
        self.register_buffer("input_scale", nvfp4_tensor_scale(input_amax))

    def product(self, rows: Tensor) -> Tensor:
        """See `QuantisedLinear`."""
        weight = Nvfp4(self.packed, self.block_scale, self.tensor_scale).dequantised()
        return through_nvfp4(rows, self.input_scale) @ weight.T
