"""The denoise loop for batches of many rows: attention and gate and up by the kernels that the prefix has."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import ModelConfig
from ...kernels import E4M3, attention_misfits, geglu_obstacles, prefix_attention_config
from ...quant.fp8 import Fp8Weight
from .buffers import Buffers, DenoiseBuffers, RequestBuffers
from .denoise import RowsLoop, Steps
from .products import Target, multiply_geglu
from .weights import TurboWeights

LEAST_ROWS = 200
"""Of a batch, from which on it was measured to be faster."""


def many_obstacles(config: ModelConfig, weights: TurboWeights, batch: int) -> list[str]:
    """Why `ManyRowsLoop` does not run such a batch; empty if it does. The engine's `describe` tells them."""
    found = []
    expert, blocks = config.expert, weights.expert.blocks
    rows = batch * config.suffix_tokens
    if rows < LEAST_ROWS:
        found.append(f"{rows} suffix rows are fewer than {LEAST_ROWS}, from which on it was measured")
    if config.kind == "pi0":
        found.append("a state token, which sees less than the rows behind it")
    like = weights.cos.new_empty(0, dtype=weights.dtype)
    found += attention_misfits(expert.kv_heads, expert.head_dim, weights.dtype, weights.device)
    if prefix_attention_config(like, config.suffix_tokens * expert.heads, expert.head_dim) is None:
        found.append("no entry for the prefix's attention in the tuned file of this GPU")
    formats = {(isinstance(b.gate_up, Fp8Weight), isinstance(b.down, Fp8Weight)) for b in blocks}
    for dtype in {E4M3 if fp8 else weights.dtype for fp8, _ in formats}:
        found += geglu_obstacles(2 * expert.mlp_dim, expert.width, dtype, weights.device)
    if any(gate_up != down for gate_up, down in formats):
        found.append("a layer with gate_up and down in different formats")
    return list(dict.fromkeys(found))


class ManyRowsLoop(RowsLoop):
    """`RowsLoop` with the kernels that were made for thousands of rows.

    Needs gate and up once more, in another order (`TurboWeights.expert_tiles`).
    """

    name = "many"

    def prepare(self, steps: Steps) -> None:
        """Fold the schedule, and reorder gate and up."""
        super().prepare(steps)
        self._tiles = self._weights.expert_tiles

    def run(self, request: RequestBuffers, buffers: Buffers, steps: Steps) -> None:
        """See `DenoiseLoop`."""
        torch.add(request.lengths, self._config.suffix_tokens, out=buffers.denoise.ends)
        super().run(request, buffers, steps)

    def _attention(self, layer: int, request: RequestBuffers, buffers: Buffers, into: Target) -> None:
        """All rows of a sample see the same keys, the prefix's and their own."""
        b, cache = buffers.denoise, buffers.prefill
        keys, values = cache.keys[layer], cache.values[layer]
        suffix = self._config.suffix_tokens
        self._ops.attention(b.q, keys, values, b.ends, into.tensor, suffix, inverse=into.inverse)

    def _hidden(self, layer: int, x: Tensor, b: DenoiseBuffers, into: Target) -> None:
        multiply_geglu(self._ops, x, self._tiles[layer], b.gate_up, into)
