"""Watching a model at work: how far the input of every product reaches, over all layers and flow-matching steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig
from ..model import ModelInput, Pi0
from ..model.gemma import RMS_EPS, AdaRMSNorm, RMSNorm
from .calibration import InputRange, Observer
from .plan import NORMED_KINDS, input_width, product_names
from .reference import linear_paths

_BINS = 1 << 15
_NORMS = {"qkv": ("input_layernorm", "layer_norm1"), "fc1": ("layer_norm2",), "gate_up": ("post_attention_layernorm",)}


@dataclass
class Magnitudes:
    """What was seen of one tensor.

    Attributes:
        channels: (width,) float32, largest magnitude of each channel.
        counts: (32768,) int64, how many magnitudes had each bf16 value, by its bits; float32 ones are rounded up.
        finite: whether every value was.
    """

    channels: Tensor
    counts: Tensor
    finite: bool = True

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Magnitudes:
        """Of a tensor of which nothing was seen yet."""
        return cls(torch.zeros(width, device=device), torch.zeros(_BINS, dtype=torch.int64, device=device))

    def add(self, x: Tensor) -> None:
        """Look at (...,width)."""
        rows = x.detach().reshape(-1, x.shape[-1]).float().abs()
        if not bool(torch.isfinite(rows).all()):
            self.finite = False
            return
        self.channels = torch.maximum(self.channels, rows.amax(dim=0))
        # The upper half of a float32's bits is the bf16 below it; adding all ones below makes it the one above.
        bits = (rows.view(torch.int32) + 0xFFFF) >> 16
        self.counts += torch.bincount(bits.flatten().clamp_max(_BINS - 1), minlength=_BINS)

    @property
    def amax(self) -> float:
        """Largest magnitude."""
        return float(self.channels.max())

    def percentile(self, percent: float) -> float:
        """The magnitude that `percent` % of all values do not exceed, to within a bf16's rounding."""
        below = self.counts.cumsum(0)
        wanted = -(-int(below[-1]) * percent // 100)
        index = int(torch.searchsorted(below, torch.tensor(wanted, device=below.device, dtype=below.dtype)))
        value = (torch.tensor(index, dtype=torch.int32) << 16).view(torch.float32)
        return min(float(value), self.amax)


@dataclass
class Watched:
    """What was seen of every product: its input, and where that comes from a norm the bare normalised value."""

    inputs: dict[str, Magnitudes] = field(default_factory=dict)
    normed: dict[str, Magnitudes] = field(default_factory=dict)


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm of the reference makes of x before scale, shift or modulation, float32.

    Raises TypeError for a module that is none of the reference's norms.
    """
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x.float(), norm.normalized_shape, eps=norm.eps)
    if isinstance(norm, RMSNorm | AdaRMSNorm):
        return F.rms_norm(x.float(), (x.shape[-1],), eps=RMS_EPS)
    raise TypeError(f"{type(norm).__name__} is no norm of the reference")


def _norm_of(model: Pi0, product: str) -> nn.Module:
    block = model.get_submodule(linear_paths(model.config, product)[0].rsplit(".", 2)[0])
    names = _NORMS[product.rsplit(".", 1)[1]]
    return next(getattr(block, name) for name in names if hasattr(block, name))


def _input_hook(into: Magnitudes) -> Callable[..., None]:
    def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        into.add(arguments[0])

    return look


def _norm_hook(into: Magnitudes) -> Callable[..., None]:
    def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        into.add(normalised(module, arguments[0]))

    return look


@torch.no_grad()
def watch(model: Pi0, batches: Iterable[tuple[ModelInput, Tensor]], steps: int) -> Watched:
    """Run the model on observations and look at every product's input. The model is as before afterwards.

    Args:
        model: the reference, unquantised.
        batches: inputs and noise (B,H,32), on any device; one whole tick each.
        steps: flow-matching evaluations of each tick, all of which are looked at.

    Raises InputError if an input does not fit the model.
    """
    device = next(model.parameters()).device
    watched, handles = Watched(), []
    try:
        for product in product_names(model.config):
            width = input_width(model.config, product)
            watched.inputs[product] = Magnitudes.empty(width, device)
            # The last of a product's linears is there in every layer, and all of them read the same input.
            linear = model.get_submodule(linear_paths(model.config, product)[-1])
            handles.append(linear.register_forward_pre_hook(_input_hook(watched.inputs[product])))
            if product.rsplit(".", 1)[1] in NORMED_KINDS:
                watched.normed[product] = Magnitudes.empty(width, device)
                norm = _norm_of(model, product)
                handles.append(norm.register_forward_pre_hook(_norm_hook(watched.normed[product])))
        for inputs, noise in batches:
            model.sample_actions(inputs.to(device), noise.to(device), steps)
    finally:
        for handle in handles:
            handle.remove()
    return watched


def input_ranges(watched: Watched, observer: Observer, percentile: float) -> dict[str, InputRange]:
    """Ranges by product; with "percentile", magnitudes above it will be cut off.

    Raises ValueError that names the products whose input was always zero or constant, or not finite.
    """
    problems = [problem for name in watched.inputs if (problem := _problem(name, watched)) is not None]
    if problems:
        raise ValueError(
            f"{len(problems)} products cannot be calibrated: {'; '.join(problems[:4])}; "
            "check the frames and the checkpoint (`turbo-pi doctor`)"
        )
    found = {}
    for product, inputs in watched.inputs.items():
        amax, channels = _range(inputs, observer, percentile)
        normed = watched.normed.get(product)
        normed_amax, normed_channels = (None, None) if normed is None else _range(normed, observer, percentile)
        found[product] = InputRange(amax, channels, normed_amax, normed_channels)
    return found


def _problem(product: str, watched: Watched) -> str | None:
    for what, seen in (("input", watched.inputs[product]), ("normalised input", watched.normed.get(product))):
        if seen is None:
            continue
        if not seen.finite:
            return f"{product}: its {what} holds NaN or infinite values"
        if int(seen.counts.sum()) == 0:
            return f"{product} was never computed"
        if seen.amax == 0:
            return f"{product}: its {what} is always 0"
        if int((seen.counts > 0).sum()) == 1:
            return f"{product}: its {what} has the one magnitude {seen.amax:.4g} only"
    return None


def _range(seen: Magnitudes, observer: Observer, percentile: float) -> tuple[float, tuple[float, ...]]:
    amax = seen.amax if observer == "max" else seen.percentile(percentile)
    # A percentile of a tensor that is nearly always 0 would be 0, and nothing could be scaled by it.
    amax = amax if amax > 0 else seen.amax
    return amax, tuple(seen.channels.clamp_max(amax).tolist())


def outliers(watched: Watched, percentile: float, worst: int = 5) -> dict[str, dict[str, Any]]:
    """Per product: amax, percentile, their ratio, and the channels that reach furthest, as JSON values.

    A large ratio says that few values take most of the format's range.
    """
    report = {}
    for product, seen in watched.inputs.items():
        at = seen.percentile(percentile)
        values, channels = seen.channels.topk(min(worst, len(seen.channels)))
        median = float(seen.channels.median())
        report[product] = {
            "amax": seen.amax,
            "percentile": at,
            "ratio": seen.amax / at if at > 0 else None,
            "channel_ratio": seen.amax / median if median > 0 else None,
            "worst_channels": [[int(c), float(v)] for c, v in zip(channels, values, strict=True)],
        }
    return report


def synthetic_batches(config: ModelConfig, frames: int, seed: int = 0) -> Iterable[tuple[ModelInput, Tensor]]:
    """Noise instead of observations: uniform images, random tokens of every length, all cameras there."""
    generator = torch.Generator().manual_seed(seed)
    size = config.vision.image_size
    for _ in range(frames):
        images = torch.rand((1, config.cameras, 3, size, size), generator=generator) * 2 - 1
        length = int(torch.randint(1, config.max_tokens + 1, (1,), generator=generator))
        tokens = torch.randint(0, config.vocab_size, (1, config.max_tokens), generator=generator)
        mask = torch.arange(config.max_tokens)[None] < length
        state = torch.rand((1, config.state_dim), generator=generator) * 2 - 1
        present = torch.ones((1, config.cameras), dtype=torch.bool)
        noise = torch.randn((1, config.horizon, config.action_dim), generator=generator)
        yield ModelInput(images, present, tokens * mask, mask, state), noise
