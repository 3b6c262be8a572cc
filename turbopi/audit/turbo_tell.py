"""What turbo's buffers hold, told under the reference's names, and replacements put back into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..engine.turbo.ops import Ops
from ..kernels import E4M3
from ..model.gemma import RMSNorm
from .sample import Visit, wanted

Arguments = dict[str, Any]
Convert = Callable[[Tensor], Tensor]


def _same(value: Tensor) -> Tensor:
    return value


class Teller:
    """Tells of buffers.

    Args:
        visit: who is told.
        ops: the engine's own operations, for what has to be computed again after a replacement.
    """

    def __init__(self, visit: Visit, ops: Ops) -> None:
        self.visit, self.ops = visit, ops

    def tell(self, name: str, held: Tensor, to: Convert = _same, back: Convert | None = _same) -> bool:
        """Tell of a buffer; whether it was replaced.

        What is in E4M3 is not told: its rounding belongs to the product that reads it, as it does in the reference.

        Args:
            name: of the reference's tensor.
            held: the buffer, or part of it.
            to: what makes the reference's tensor of it.
            back: the inverse, None where nothing may be replaced.
        """
        if held.dtype == E4M3 or not wanted(self.visit, name):
            return False
        given = self.visit(name, to(held).clone())
        if given is None or back is None:
            return False
        held.copy_(back(given.to(held.device)).reshape(held.shape))
        return True

    def rows(self, name: str, rows: Tensor, scale: float | Tensor = 1.0) -> bool:
        """(N,width) in the buffer, times 1/scale, of each column where it is a vector; (1,N,width) in the reference."""
        return self.tell(name, rows, lambda t: (t.float() * scale)[None], lambda t: t[0] / scale)

    def scaled(self, name: str, rows: Tensor, scale: Tensor, shift: Tensor | None) -> bool:
        """Rows of a bare norm, whose weight (and bias) the engine has folded into the product behind it."""
        added = torch.zeros_like(scale) if shift is None else shift
        # A weight of zero cannot be undone: such a channel is told as it is, and a replacement does not reach it.
        undo = torch.where(scale == 0, 0.0, 1.0 / scale)
        return self.tell(name, rows, lambda t: (t.float() * scale + added)[None], lambda t: (t[0] - added) * undo)

    def norm(self, name: str, rows: Tensor, norm: Any) -> bool:
        """Rows that a norm of the reference made; an adaRMS norm has its weight in them, the others do not."""
        if isinstance(norm, torch.nn.LayerNorm):
            return self.scaled(name, rows, norm.weight, norm.bias)
        if isinstance(norm, RMSNorm):
            return self.scaled(name, rows, 1.0 + norm.weight, None)
        return self.rows(name, rows)

    def renorm(self, done: Arguments) -> None:
        """Norm the stream again, where it was replaced behind an operation that adds and norms at once."""
        named = {key: done[key] for key in ("scale", "shift", "inverse") if key in done}
        if done["op"] == "residual_layer_norm":
            self.ops.layer_norm(done["x"], done["out"], inverse=done.get("inverse", 1.0))
        else:
            self.ops.rms_norm(done["x"], done["out"], **named)

    def heads(self, name: str, rows: Tensor, head_dim: int) -> bool:
        """Queries (N,heads·head_dim), scaled by head_dim^-0.5; (1,heads,N,head_dim) in the reference."""
        root, count = head_dim**0.5, len(rows)
        return self.tell(
            name,
            rows,
            lambda t: t.float().reshape(count, -1, head_dim).transpose(0, 1)[None] * root,
            lambda t: t[0].transpose(0, 1).reshape(count, -1) / root,
        )
