"""The denoise loop as one kernel that stays on the GPU: a single π0.5 observation, Hopper and later."""

from __future__ import annotations

import torch

from ...config import ModelConfig
from ...kernels.cuda_module import can_compile
from ...kernels.denoise import Cache, DenoiseKernel, Layer, Matrix, Plan, Schedule, Shape
from ...kernels.denoise_fp8 import ScaledMatrix
from ...quant.fp8 import Fp8Weight
from .buffers import Buffers, RequestBuffers
from .denoise import Schedules, Steps
from .products import Product
from .weights import TurboWeights, longest_sequence

OLDEST = (9, 0)


def obstacles(config: ModelConfig, weights: TurboWeights, batch: int) -> list[str]:
    """Why this loop does not run such a batch; empty if it does. The engine's `describe` tells them."""
    found = []
    if batch != 1:
        found.append(f"a batch of {batch}")
    if config.kind != "pi05":
        found.append("π0's state token and action-time MLP")
    if weights.dtype != torch.bfloat16:
        found.append(f"weights in {weights.dtype}")
    if weights.device.type != "cuda" or torch.cuda.get_device_capability(weights.device) < OLDEST:
        found.append(f"no GPU of compute capability {OLDEST[0]}.{OLDEST[1]}")
    elif not can_compile():
        found.append("cuda-bindings is not installed")
    if len({isinstance(m, Fp8Weight) for b in weights.expert.blocks for m in (b.qkv, b.out, b.gate_up, b.down)}) > 1:
        found.append("expert products in fp8 beside others in bf16")
    found += Shape.problems(**_sizes(config))
    return found or _lack_of_room(config, weights.device)


def _lack_of_room(config: ModelConfig, device: torch.device) -> list[str]:
    try:
        Plan.fit(Shape(**_sizes(config)), torch.cuda.get_device_properties(device))
    except ValueError as error:
        return [str(error)]
    return []


class PersistentLoop:
    """All steps in one launch, see `turbopi.kernels.denoise`. Keeps its own copy of the expert's weights, packed.

    Raises:
        ValueError: `obstacles` are in the way.
        RuntimeError: the kernel does not compile here.
    """

    name = "persistent"

    def __init__(self, config: ModelConfig, weights: TurboWeights, schedules: Schedules) -> None:
        if found := obstacles(config, weights, 1):
            raise ValueError(f"the persistent denoise loop cannot run: {'; '.join(found)}")
        layers = [Layer(*map(_matrix, (b.qkv, b.out, b.gate_up, b.down))) for b in weights.expert.blocks]
        self._kernel = DenoiseKernel(Shape(**_sizes(config)), layers, weights.device)
        self._weights = weights
        self._schedules = schedules
        self._prepared: dict[Steps, Schedule] = {}

    def prepare(self, steps: Steps) -> None:
        """See `DenoiseLoop`."""
        if steps in self._prepared:
            return
        folded = self._schedules(steps)
        if folded.modulation is None:
            raise ValueError("the persistent denoise loop needs π0.5's modulations")
        self._prepared[steps] = Schedule(
            modulation=folded.modulation.contiguous(),
            in_weights=folded.action_in.weight.t().contiguous(),
            in_bias=folded.action_in.bias.contiguous(),
            out_weights=folded.action_out.weight.contiguous(),
            out_bias=folded.action_out.bias.contiguous(),
        )

    def run(self, request: RequestBuffers, buffers: Buffers, steps: Steps) -> None:
        """See `DenoiseLoop`."""
        x_t, prefix = buffers.denoise.x_t, buffers.prefill
        x_t.copy_(request.noise.view_as(x_t))
        cache = Cache(prefix.keys[:, 0], prefix.values[:, 0], request.lengths, self._weights.cos, self._weights.sin)
        self._kernel.run(self._prepared[steps], cache, x_t)


def _matrix(product: Product) -> Matrix:
    if isinstance(product, Fp8Weight):
        return ScaledMatrix(product.values, product.scale, product.inverse)
    return product


def _sizes(config: ModelConfig) -> dict[str, int]:
    expert = config.expert
    return {
        "width": expert.width,
        "depth": expert.depth,
        "heads": expert.heads,
        "kv_heads": expert.kv_heads,
        "head_dim": expert.head_dim,
        "mlp_dim": expert.mlp_dim,
        "rows": config.suffix_tokens,
        "longest": longest_sequence(config),
        "action_dim": config.action_dim,
    }
