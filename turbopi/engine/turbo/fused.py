"""The denoise loop in kernels that fuse what `RowsLoop` does one by one, each launched before the last has ended."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import ModelConfig
from ...kernels import step_misfits
from ...kernels.row_attention_cluster import cluster_misfits
from ...quant.fold import FoldedGemmaBlock, Schedule
from ...quant.fp8 import Fp8Weight
from .buffers import MOST_FUSED_ROWS, Buffers, DenoiseBuffers, RequestBuffers
from .denoise import RowsLoop, modulation_of, norm_of
from .products import Product, Target, operand, target
from .weights import TurboWeights, longest_sequence

OLDEST = (9, 0)
ATTENTION_ROWS = 32
"""Queries and heads of a program of the attention."""


def fused_obstacles(config: ModelConfig, weights: TurboWeights, batch: int) -> list[str]:
    """Why `FusedLoop` does not run such a batch; empty if it does. The engine's `describe` tells them."""
    found = []
    rows = batch * config.suffix_tokens
    if rows > MOST_FUSED_ROWS:
        found.append(f"{rows} suffix rows are more than {MOST_FUSED_ROWS}: it reads the weights again for every 64")
    if weights.dtype != torch.bfloat16:
        found.append(f"weights in {weights.dtype}")
    if weights.device.type != "cuda" or torch.cuda.get_device_capability(weights.device) < OLDEST:
        found.append(f"no GPU of compute capability {OLDEST[0]}.{OLDEST[1]}, whose kernels may start before their turn")
    return found


def suffix_attention_obstacles(config: ModelConfig, weights: TurboWeights) -> list[str]:
    """Why the fused loop's attention is not one launch in clusters; empty if it is, in prefixes of any length."""
    expert = config.expert
    sizes = expert.kv_heads, expert.head_dim, longest_sequence(config)
    # The result may be in E4M3 as well.
    return cluster_misfits(*sizes, weights.dtype, weights.dtype, weights.device)


@dataclass(frozen=True)
class Cuts:
    """In how many parts sums are computed.

    Attributes:
        programs: of the attention, about: in so many parts are its keys cut.
        out, down: parts of K of the products onto the stream.
    """

    programs: int
    out: int
    down: int


class FusedLoop(RowsLoop):
    """Seven or eight launches a layer: products that end in the rotation, in GeGLU, or in the parts of a sum.

    What follows them adds the parts up, so each sum has one order. A kernel waits for the one in front of it by itself,
    when it has already asked for its weights. Each product is in its own format; whoever makes its input rounds it.
    """

    name = "fused"
    bf16, fp8 = Cuts(programs=128, out=4, down=8), Cuts(programs=256, out=4, down=4)

    def _cuts(self, product: Product) -> Cuts:
        """As measured with products of that format. The attention's go with qkv: they share the multiprocessors."""
        return self.fp8 if isinstance(product, Fp8Weight) else self.bf16

    def _begin(self, schedule: Schedule, step: int, b: DenoiseBuffers) -> None:
        """See `RowsLoop`; the end of a step leaves this for the next."""
        if step == 0 or not self._steps_at_once:
            super()._begin(schedule, step, b)

    def _end(self, schedule: Schedule, step: int, b: DenoiseBuffers) -> None:
        """See `RowsLoop`, and the beginning of the next step."""
        if step + 1 == schedule.steps or not self._steps_at_once:
            super()._end(schedule, step, b)
            return
        into, out = schedule.action_in, schedule.action_out
        normed = target(self._weights.expert.blocks[0].qkv, b.normed, b.normed_fp8)
        scale, shift, _ = norm_of(modulation_of(schedule, step + 1), 0)
        self._ops.row_step(
            b.normed,
            (out.weight, out.bias),
            b.x_t,
            (into.weight, into.bias[step + 1]),
            b.x,
            None if scale is None or shift is None else (scale, shift),
            normed.tensor,
            inverse=normed.inverse,
        )

    @property
    def _steps_at_once(self) -> bool:
        """Whether one kernel goes from a step to the next: every row is an action, and weights fit a program."""
        config = self._config
        return config.kind == "pi05" and not step_misfits(config.expert.width, config.action_dim)

    def _tower(self, modulation: Tensor | None, request: RequestBuffers, buffers: Buffers) -> None:
        b, cache, ops = buffers.denoise, buffers.prefill, self._ops
        blocks = self._weights.expert.blocks
        readers: list[Product | None] = [*(block.qkv for block in blocks), None]
        _, _, gate = norm_of(modulation, 0)
        normed = target(readers[0], b.normed, b.normed_fp8)
        for layer, block in enumerate(blocks):
            attended = target(block.out, b.attended, b.attended_fp8)
            self._attend(normed.tensor, request, b, block, cache.keys[layer], cache.values[layer], attended)
            out_parts = self._parts(attended.tensor, block.out, b.parts[: self._cuts(block.out).out])
            scale, shift, next_gate = norm_of(modulation, 2 * layer + 1)
            normed = target(block.gate_up, b.normed, b.normed_fp8)
            ops.row_sum_norm(out_parts, b.x, gate, scale, shift, normed.tensor, inverse=normed.inverse)
            hidden = target(block.down, b.hidden, b.hidden_fp8)
            values, columns = operand(block.gate_up)
            ops.row_geglu(normed.tensor, values, hidden.tensor, scale=columns, inverse=hidden.inverse)
            down_parts = self._parts(hidden.tensor, block.down, b.parts[: self._cuts(block.down).down])
            scale, shift, gate = norm_of(modulation, 2 * layer + 2)
            normed = target(readers[layer + 1], b.normed, b.normed_fp8)
            ops.row_sum_norm(down_parts, b.x, next_gate, scale, shift, normed.tensor, inverse=normed.inverse)

    def _parts(self, x: Tensor, product: Product, parts: Tensor) -> Tensor:
        """The parts, when x times the product has been put into them."""
        values, columns = operand(product)
        self._ops.row_parts(x, values, parts, scale=columns)
        return parts

    def _attend(
        self,
        x: Tensor,
        request: RequestBuffers,
        b: DenoiseBuffers,
        block: FoldedGemmaBlock[Product],
        keys: Tensor,
        values: Tensor,
        attended: Target,
    ) -> None:
        """Normed rows to `attended`, the suffix's keys and values behind the prefix's."""
        ops, weights, suffix = self._ops, self._weights, self._config.suffix_tokens
        tables = weights.cos, weights.sin, request.lengths
        qkv, columns = operand(block.qkv)
        ops.row_qkv(x, qkv, *tables, b.q, keys, values, suffix, scale=columns)
        parts = self._key_parts(len(b.state_token), len(b.partial), self._cuts(block.qkv).programs)
        ops.row_attention(
            b.q,
            keys,
            values,
            request.lengths,
            attended.tensor,
            suffix,
            b.partial[:parts],
            b.partial_lse[:parts],
            extra=suffix,
            state_token=self._config.kind == "pi0",
            # The layer's largest weights, while nothing else comes from memory.
            ahead=operand(block.gate_up)[0],
            inverse=attended.inverse,
        )

    def _key_parts(self, batch: int, most: int, all_programs: int) -> int:
        """A power of two of parts in which the keys are cut."""
        expert = self._config.expert
        rows = self._config.suffix_tokens * expert.heads // expert.kv_heads
        programs = batch * expert.kv_heads * -(-rows // ATTENTION_ROWS)
        wanted = max(1, min(most, all_programs // programs))
        return 1 << wanted.bit_length() - 1
