"""The reference with quantised products: a copy of a model with some linears swapped. The model itself stays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..model import Pi0
from .calibration import InputRange, Quantisation
from .formats import balance
from .linear import Fp8Linear, Int4WeightLinear, Int8Linear, Int8WeightLinear, Nvfp4Linear, QuantisedLinear
from .plan import Format, product_names

INT8_CAPABILITY = (7, 5)
_TOWERS = {"vision": "vision.encoder.layers", "prefix": "vlm.layers", "expert": "expert.layers"}
_PARTS = {
    "vision": {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.out_proj",),
        "fc1": ("mlp.fc1",),
        "fc2": ("mlp.fc2",),
    },
    "gemma": {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    },
}
_HOW = {
    "fp8": "E4M3 values, multiplied as float32: simulated on every device",
    "int8": "int8 values, balanced inputs, integer products (torch._int_mm)",
    "w8a16": "int8 weights, made bf16 in every call",
    "w4a16": "int4 weights in groups, two a byte, made bf16 in every call",
    "nvfp4": "NVFP4 values, multiplied as float32: simulated on every device",
}


def linear_paths(config: ModelConfig, product: str) -> tuple[str, ...]:
    """Paths of the reference's linears that make up a product; the first of them reads the product's input."""
    tower, _, layer, kind = product.split(".")
    parts = _PARTS["vision" if tower == "vision" else "gemma"][kind]
    if tower == "prefix" and int(layer) == config.vlm.depth - 1:
        parts = parts[1:]  # of the last layer only keys and values are computed
    return tuple(f"{_TOWERS[tower]}.{layer}.{part}" for part in parts)


def quantised(model: Pi0, quantisation: Quantisation) -> Pi0:
    """A copy of `model` whose products are computed in the plan's formats; it shares every other parameter.

    Raises ValueError if a width does not fit a format, or the GPU has no int8 products; what `Quantisation.check` finds
    must have been found before.
    """
    _check_device(model, quantisation)
    # The memo makes deepcopy keep the parameters: only modules are new.
    result = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for product, chosen in quantisation.plan.formats(model.config).items():
        if chosen == "bf16":
            continue
        paths = linear_paths(model.config, product)
        linears = [_linear(model, path) for path in paths]
        known = quantisation.calibration.inputs[product] if quantisation.calibration is not None else None
        try:
            made = _MAKERS[chosen](linears, known)
        except ValueError as error:
            raise ValueError(f"{product}: {error}") from error
        for path, swapped in zip(paths, made, strict=True):
            parent, _, leaf = path.rpartition(".")
            setattr(result.get_submodule(parent), leaf, swapped)
    return result


def _check_device(model: Pi0, quantisation: Quantisation) -> None:
    device = _device(model)
    if device.type != "cuda" or "int8" not in quantisation.plan.formats(model.config).values():
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < INT8_CAPABILITY:
        raise ValueError(
            f"int8 products need compute capability {INT8_CAPABILITY[0]}.{INT8_CAPABILITY[1]} (Turing) or later, "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; use the precision 'w8a16'"
        )


def _device(model: Pi0) -> torch.device:
    return next(model.parameters()).device


def _linear(model: Pi0, path: str) -> nn.Linear:
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def _amax(linears: Sequence[nn.Linear]) -> Tensor:
    return torch.stack([linear.weight.detach().abs().amax() for linear in linears]).amax()


def _ranged(linears: Sequence[nn.Linear], found: InputRange | None) -> tuple[Tensor, Tensor]:
    """amax () and channel_amax (in,) float32 on the weights' device."""
    assert found is not None, "Quantisation.check asks for a calibration where one is needed"
    device = linears[0].weight.device
    return torch.tensor(found.amax, device=device), torch.tensor(found.channel_amax, device=device)


def _fp8(linears: Sequence[nn.Linear], found: InputRange | None) -> list[QuantisedLinear]:
    amax, _ = _ranged(linears, found)
    return [Fp8Linear(linear, amax) for linear in linears]


def _int8(linears: Sequence[nn.Linear], found: InputRange | None) -> list[QuantisedLinear]:
    _, channels = _ranged(linears, found)
    # One divisor for all that read this input, so that engines which merge them can share one quantised input.
    columns = torch.stack([linear.weight.detach().float().abs().amax(dim=0) for linear in linears]).amax(dim=0)
    divisor = balance(channels, columns)
    return [Int8Linear(linear, divisor, (channels / divisor).amax()) for linear in linears]


def _nvfp4(linears: Sequence[nn.Linear], found: InputRange | None) -> list[QuantisedLinear]:
    amax, _ = _ranged(linears, found)
    return [Nvfp4Linear(linear, _amax(linears), amax) for linear in linears]


_MAKERS: dict[Format, Callable[[Sequence[nn.Linear], InputRange | None], list[QuantisedLinear]]] = {
    "fp8": _fp8,
    "int8": _int8,
    "w8a16": lambda linears, _: [Int8WeightLinear(linear) for linear in linears],
    "w4a16": lambda linears, _: [Int4WeightLinear(linear) for linear in linears],
    "nvfp4": _nvfp4,
}


def weight_bytes(model: Pi0) -> dict[str, int]:
    """Bytes that a model's weights take: of the products (biases and scales included), and of all the rest."""
    products = 0
    for product in product_names(model.config):
        for path in linear_paths(model.config, product):
            module = model.get_submodule(path)
            products += sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return {"products": products, "rest": total - products}


def quantisation_details(model: Pi0, quantisation: Quantisation) -> dict[str, Any]:
    """How a model of `quantised` computes, as JSON values, for receipts."""
    formats = list(quantisation.plan.formats(model.config).values())
    calibration = quantisation.calibration
    return {
        "plan": quantisation.plan.to_dict(),
        "products": {name: formats.count(name) for name in dict.fromkeys(formats)},
        "how": {name: _HOW[name] for name in dict.fromkeys(formats) if name in _HOW},
        "weight_bytes": weight_bytes(model),
        "calibration": None if calibration is None else calibration.summary(),
    }
