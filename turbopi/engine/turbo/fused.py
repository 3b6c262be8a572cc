"""The denoise loop in kernels that fuse what `RowsLoop` does one by one, each launched before the last has ended."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import ModelConfig
from ...quant.fold import FoldedGemmaBlock
from .buffers import MOST_FUSED_ROWS, Buffers, DenoiseBuffers, RequestBuffers
from .denoise import RowsLoop, norm_of
from .weights import TurboWeights

OLDEST = (9, 0)
ATTENTION_ROWS = 32
"""Queries and heads of a program of the attention."""


def fused_obstacles(config: ModelConfig, weights: TurboWeights, batch: int) -> list[str]:
    """Why `FusedLoop` does not run such a batch; empty if it does. The engine's `describe` tells them."""
    found = []
    rows = batch * config.suffix_tokens
    if rows > MOST_FUSED_ROWS:
        found.append(f"{rows} suffix rows are more than {MOST_FUSED_ROWS}, beyond which it was not measured")
    if weights.dtype != torch.bfloat16:
        found.append(f"weights in {weights.dtype}")
    if weights.expert_has_fp8:
        found.append("the expert's products in fp8")
    if weights.device.type != "cuda" or torch.cuda.get_device_capability(weights.device) < OLDEST:
        found.append(f"no GPU of compute capability {OLDEST[0]}.{OLDEST[1]}, whose kernels may start before their turn")
    return found


@dataclass(frozen=True)
class Cuts:
    """In how many parts sums are computed.

    Attributes:
        programs: of the attention, about: in so many parts are its keys cut.
        out, down: parts of K of the products onto the stream.
    """

    programs: int = 128
    out: int = 4
    down: int = 8


class FusedLoop(RowsLoop):
    """Eight launches a layer: products that end in the rotation, in GeGLU, or in the parts of a sum.

    What follows them adds the parts up, so each sum has one order. A kernel waits for the one in front of it by itself,
    when it has already asked for its weights.
    """

    name = "fused"
    cuts = Cuts()

    def _tower(self, modulation: Tensor | None, request: RequestBuffers, buffers: Buffers) -> None:
        b, cache, ops = buffers.denoise, buffers.prefill, self._ops
        out_parts, down_parts = b.parts[: self.cuts.out], b.parts[: self.cuts.down]
        scale, shift, gate = norm_of(modulation, 0)
        ops.rms_norm(b.x, b.normed, scale, shift)
        for layer, block in enumerate(self._weights.expert.blocks):
            self._attend(request, b, block, cache.keys[layer], cache.values[layer])
            scale, shift, next_gate = norm_of(modulation, 2 * layer + 1)
            ops.row_parts(b.attended, block.out, out_parts)
            ops.row_sum_norm(out_parts, b.x, gate, scale, shift, b.normed)
            ops.row_geglu(b.normed, block.gate_up, b.hidden)
            ops.row_parts(b.hidden, block.down, down_parts)
            scale, shift, gate = norm_of(modulation, 2 * layer + 2)
            ops.row_sum_norm(down_parts, b.x, next_gate, scale, shift, b.normed)

    def _attend(
        self, request: RequestBuffers, b: DenoiseBuffers, block: FoldedGemmaBlock[Tensor], keys: Tensor, values: Tensor
    ) -> None:
        """b.normed to b.attended, the suffix's keys and values behind the prefix's."""
        ops, weights, suffix = self._ops, self._weights, self._config.suffix_tokens
        tables = weights.cos, weights.sin, request.lengths
        ops.row_qkv(b.normed, block.qkv, *tables, b.q, keys, values, suffix)
        parts = self._key_parts(len(b.state_token), len(b.partial))
        ops.row_attention(
            b.q,
            keys,
            values,
            request.lengths,
            b.attended,
            suffix,
            b.partial[:parts],
            b.partial_lse[:parts],
            extra=suffix,
            state_token=self._config.kind == "pi0",
            # The layer's largest weights, while nothing else comes from memory.
            ahead=block.gate_up,
        )

    def _key_parts(self, batch: int, most: int) -> int:
        """A power of two of parts in which the keys are cut."""
        expert = self._config.expert
        rows = self._config.suffix_tokens * expert.heads // expert.kv_heads
        programs = batch * expert.kv_heads * -(-rows // ATTENTION_ROWS)
        wanted = max(1, min(most, self.cuts.programs // programs))
        return 1 << wanted.bit_length() - 1
