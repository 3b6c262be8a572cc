"""The work that a tick cannot avoid, counted from the configuration, and the time that it takes at the very least.

Counted is what no exact engine can leave out: products of valid tokens, and each weight read once each time it is used
from memory. Left out is what an engine may avoid (modulations that depend on the step alone, masks, the last prefix
layer beyond its keys and values) or hide (norms, activations between kernels).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..config import GemmaConfig, ModelConfig
from .workloads import Workload

FLOAT32 = 4


@dataclass(frozen=True)
class Cost:
    """Floating-point operations (a multiply and an add are two), bytes of weights read, other bytes moved."""

    flops: float
    weight_bytes: float
    data_bytes: float

    @property
    def bytes(self) -> float:
        """All bytes that must cross the memory's bus."""
        return self.weight_bytes + self.data_bytes


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in the same run: operations and bytes (read plus written) a second."""

    flops_per_s: float
    bytes_per_s: float


def linear_parameters(tower: GemmaConfig) -> tuple[int, int]:
    """Weights of one layer's key and value projections, and of its query, output and MLP projections."""
    keys_values = 2 * tower.width * tower.kv_heads * tower.head_dim
    rest = 2 * tower.width * tower.heads * tower.head_dim + 3 * tower.width * tower.mlp_dim
    return keys_values, rest


def vision_cost(config: ModelConfig, images: int, element: int, weight: float | None = None) -> Cost:
    """`encode_images` of `images` pictures, projector included; `element` bytes a weight or activation.

    `weight` bytes a weight of the layers, where they are kept in fewer bits; here and below.
    """
    vision, n = config.vision, config.vision.tokens
    patch = 3 * vision.patch_size**2 * vision.width
    layer = 4 * vision.width**2 + 2 * vision.width * vision.mlp_dim
    projector = vision.width * config.vlm.width
    attention = 2 * n * vision.width
    per_token = patch + vision.depth * (layer + attention) + projector
    weights: float = (patch + n * vision.width) * FLOAT32 + projector * element
    weights += vision.depth * layer * (weight or element)
    pixels = images * 3 * vision.image_size**2
    return Cost(
        flops=2.0 * images * n * per_token,
        weight_bytes=float(weights) if images else 0.0,
        data_bytes=float(pixels * FLOAT32 + images * n * config.vlm.width * element),
    )


def prefill_cost(config: ModelConfig, batch: int, tokens: int, element: int, weight: float | None = None) -> Cost:
    """`prefill` of `tokens` valid tokens a sample: all layers but the last, of which keys and values alone."""
    vlm = config.vlm
    keys_values, rest = linear_parameters(vlm)
    weights = vlm.depth * keys_values + (vlm.depth - 1) * rest
    attention = (vlm.depth - 1) * 2 * tokens * vlm.heads * vlm.head_dim
    cache = vlm.depth * 2 * vlm.kv_heads * vlm.head_dim
    return Cost(
        flops=2.0 * batch * tokens * (weights + attention),
        weight_bytes=float(weights * (weight or element)),
        data_bytes=float(batch * tokens * (vlm.width + cache) * element),
    )


def denoise_cost(
    config: ModelConfig,
    batch: int,
    tokens: int,
    steps: int,
    element: int,
    cache_bytes: float,
    weight: float | None = None,
) -> Cost:
    """`denoise` in `steps` evaluations; weights and keys that fit into `cache_bytes` on the chip are read once."""
    expert, n = config.expert, config.suffix_tokens
    keys_values, rest = linear_parameters(expert)
    layers = expert.depth * (keys_values + rest)
    projections = 2 * config.action_dim * expert.width
    if config.kind == "pi0":
        # Action projection and first linear fold into one, with the time as its bias; the second stands behind a SiLU.
        projections += expert.width**2
    attention = expert.depth * 2 * (tokens + n) * expert.heads * expert.head_dim
    weights = layers * (weight or element) + projections * FLOAT32
    cache = batch * tokens * expert.depth * 2 * expert.kv_heads * expert.head_dim * element
    readings = 1 if weights + cache <= cache_bytes else steps
    noise = 2 * batch * config.horizon * config.action_dim * FLOAT32
    return Cost(
        flops=2.0 * steps * batch * n * (layers + projections + attention),
        weight_bytes=float(readings * weights),
        data_bytes=float(readings * cache + noise),
    )


def tick_costs(
    config: ModelConfig,
    shape: Workload,
    batch: int,
    element: int,
    cache_bytes: float = 0.0,
    weight: float | None = None,
) -> dict[str, Cost]:
    """The cost of each stage. `element` is 2 for bf16, 4 for fp32; `weight` as of `vision_cost`, 1 for fp8."""
    tokens = shape.prefix_tokens(config)
    return {
        "encode_images": vision_cost(config, batch * shape.views, element, weight),
        "prefill": prefill_cost(config, batch, tokens, element, weight),
        "denoise": denoise_cost(config, batch, tokens, shape.steps, element, cache_bytes, weight),
    }


def least_ms(cost: Cost, ceilings: Ceilings) -> float:
    """Milliseconds below which no version runs: the longer of its arithmetic and its bytes."""
    return 1e3 * max(cost.flops / ceilings.flops_per_s, cost.bytes / ceilings.bytes_per_s)


def against_ceilings(
    costs: Mapping[str, Cost], measured_ms: Mapping[str, float], ceilings: Ceilings
) -> dict[str, dict[str, float]]:
    """Per measured stage what it reached, and how far from the floor it is: 1 would be the speed of light."""
    rows = {}
    for stage, ms in measured_ms.items():
        cost, seconds = costs[stage], ms / 1e3
        floor = least_ms(cost, ceilings)
        rows[stage] = {
            "measured_ms": ms,
            "least_ms": floor,
            "times_the_floor": ms / floor if floor else float("nan"),
            "tflop_per_s": cost.flops / seconds / 1e12,
            "tb_per_s": cost.bytes / seconds / 1e12,
            "of_flops_ceiling": cost.flops / seconds / ceilings.flops_per_s,
            "of_bytes_ceiling": cost.bytes / seconds / ceilings.bytes_per_s,
        }
    return rows
