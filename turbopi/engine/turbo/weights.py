"""Everything that the turbo engine reads and never writes, in one place on the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...config import ModelConfig
from ...kernels import E4M3, TiledGeglu, geglu_obstacles, tile_geglu
from ...model import Pi0
from ...model.gemma import ROPE_BASE
from ...quant import Format, Quantisation
from ...quant.fold import FoldedExpert, FoldedPrefix, FoldedVision, Rounding, fold_expert, fold_prefix, fold_vision
from ...quant.fp8 import Fp8Rounding, Fp8Weight, check_fp8, input_amax


@dataclass(frozen=True, eq=False)
class TurboWeights:
    """Folded weights and the rotary table.

    Attributes:
        cos, sin: (positions, head_dim/2) float32, for every position that a prefix and a suffix can take.
        dtype, vision_dtype: of the residual streams.
        untiled: why the prefix's gate and up are not kept as `TiledGeglu`; empty if they are.
    """

    vision: FoldedVision
    prefix: FoldedPrefix
    expert: FoldedExpert
    cos: Tensor
    sin: Tensor
    dtype: torch.dtype
    vision_dtype: torch.dtype
    untiled: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.cos.device

    @property
    def has_fp8(self) -> bool:
        """Whether any product is in E4M3."""
        return any(_in_fp8(part) for part in _parts(self))

    @property
    def expert_has_fp8(self) -> bool:
        """Whether any of the action expert's products is."""
        return any(_in_fp8(part) for part in _parts(self.expert))

    @cached_property
    def expert_tiles(self) -> tuple[TiledGeglu, ...]:
        """The expert's gate and up once more, as `ManyRowsLoop` reads them; made when that is first prepared."""
        return tuple(_tiled(block.gate_up) for block in self.expert.blocks)

    def bytes_by_format(self) -> dict[str, int]:
        """Bytes on the device, the token embedding among them: fp8 products with their scales, the rest by dtype."""
        found: Counter[str] = Counter()
        made_since = self.__dict__.get("expert_tiles", ())
        for part in _parts((self, made_since)):
            found["fp8" if _in_fp8(part) else _dtype_name(part)] += part.nbytes
        return dict(found)


def _tiled(weight: Tensor | Fp8Weight) -> TiledGeglu:
    if isinstance(weight, Fp8Weight):
        return tile_geglu(weight.values, weight.scale, weight.inverse)
    return tile_geglu(weight)


def _in_fp8(part: Tensor | Fp8Weight | TiledGeglu) -> bool:
    return isinstance(part, Fp8Weight) or (isinstance(part, TiledGeglu) and part.e4m3)


def _dtype_name(part: Tensor | Fp8Weight | TiledGeglu) -> str:
    tensor = part if isinstance(part, Tensor) else part.rows if isinstance(part, TiledGeglu) else part.values
    return str(tensor.dtype).removeprefix("torch.")


def _parts(node: Any) -> Iterator[Tensor | Fp8Weight | TiledGeglu]:
    """Every tensor, E4M3 matrix and tiled matrix in nested dataclasses and tuples."""
    if isinstance(node, Tensor | Fp8Weight | TiledGeglu):
        yield node
    elif isinstance(node, tuple):
        for item in node:
            yield from _parts(item)
    elif is_dataclass(node):
        for field in fields(node):
            yield from _parts(getattr(node, field.name))


def rotary_table(model: Pi0, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (positions, head_dim/2) float32, with the frequencies of the model's numerics profile."""
    device = model.action_in_proj.weight.device
    rope = model.vlm.rope
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.float32, device=device) / rope.head_dim
    frequencies = 1.0 / ROPE_BASE**exponents
    if rope.bf16_frequencies and model.vlm.dtype == torch.bfloat16:
        frequencies = frequencies.to(torch.bfloat16).float()
    angles = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def longest_sequence(config: ModelConfig) -> int:
    """Prefix and suffix rows of one sample at most."""
    return config.prefix_slots + config.suffix_tokens


class TilingRounding(Rounding):
    """Keeps gate and up as `TiledGeglu`, everything else as another rounding does."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__(rounding.dtype)
        self._rounding = rounding

    def brings_bias(self, product: str) -> bool:
        """See `Rounding`."""
        return self._rounding.brings_bias(product)

    def keep(self, product: str, weight: Tensor, bias: Tensor | None = None) -> Any:
        """See `Rounding`."""
        kept = self._rounding.keep(product, weight, bias)
        if not product.endswith(".gate_up"):
            return kept
        return _tiled(kept)


def tiling_obstacles(model: Pi0, formats: Mapping[str, Format] | None) -> list[str]:
    """Why the prefix's gate and up are not multiplied by `tiled_geglu`; empty if they are. A fixed rule.

    `formats` of the products, None where nothing is quantised.
    """
    vlm, device = model.config.vlm, model.action_in_proj.weight.device
    pairs: set[tuple[Format, Format]] = {("bf16", "bf16")}
    if formats is not None:
        # The last layer has neither.
        layers = (f"prefix.layers.{layer}" for layer in range(vlm.depth - 1))
        pairs = {(formats[f"{layer}.gate_up"], formats[f"{layer}.down"]) for layer in layers}
    dtypes = {E4M3 if gate_up == "fp8" else model.vlm.dtype for gate_up, _ in pairs}
    found = [words for dtype in dtypes for words in geglu_obstacles(2 * vlm.mlp_dim, vlm.width, dtype, device)]
    if any(gate_up != down for gate_up, down in pairs):
        found.append("a layer with gate_up and down in different formats")
    return list(dict.fromkeys(found))


@torch.no_grad()
def fold_model(model: Pi0, quantisation: Quantisation | None = None) -> TurboWeights:
    """Fold layer by layer, next to the model, which stays as it is and shares its token embedding.

    With a quantisation its fp8 products are kept in E4M3 alone. The prefix's gate and up are `TiledGeglu` where a GPU
    multiplies those faster. Raises ValueError as `check_fp8`.
    """
    cos, sin = rotary_table(model, longest_sequence(model.config))
    dtypes = (model.vision.dtype, model.vlm.dtype, model.expert.dtype)
    vision, prefix, expert = (Rounding(dtype) for dtype in dtypes)
    formats: Mapping[str, Format] | None = None
    if quantisation is not None:
        formats, calibration = check_fp8(model.config, quantisation)
        amax = input_amax(model.config, calibration)
        vision, prefix, expert = (Fp8Rounding(dtype, formats, amax) for dtype in dtypes)
    untiled = tuple(tiling_obstacles(model, formats))
    if not untiled:
        prefix = TilingRounding(prefix)
    return TurboWeights(
        vision=fold_vision(model, vision),
        prefix=fold_prefix(model, prefix),
        expert=fold_expert(model, expert),
        cos=cos,
        sin=sin,
        dtype=model.vlm.dtype,
        vision_dtype=model.vision.dtype,
        untiled=untiled,
    )
