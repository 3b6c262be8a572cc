"""Which prefix slots are valid, decided on the host, so that captured graphs know their shapes beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """How the slots of a batch become the rows of the prefix.

    Attributes:
        order: (B,length) int64, the slot that each row takes. Rows behind a sample's valid ones hold some invalid slot.
        valid: (B,length) bool, or None if every row of every sample is valid.
    """

    order: np.ndarray
    valid: np.ndarray | None

    @property
    def length(self) -> int:
        """Rows a sample."""
        return int(self.order.shape[1])

    def same_as(self, other: Packing) -> bool:
        """Whether both say the same of the same number of rows."""
        if (self.valid is None) != (other.valid is None) or not np.array_equal(self.order, other.order):
            return False
        return self.valid is None or other.valid is None or np.array_equal(self.valid, other.valid)


def pack(valid: np.ndarray, bucket: int, always_masked: bool) -> Packing:
    """Valid slots to the front in their order, as `drop_invalid` moves them, the length rounded up to `bucket`.

    Args:
        valid: (B,P) bool.
        bucket: the length becomes a multiple of it; with 1 it is that of the longest sample.
        always_masked: give a mask even where nothing is invalid, so that all batches of a bucket look alike.
    """
    lengths = valid.sum(axis=1)
    length = -(-int(lengths.max()) // bucket) * bucket
    order = np.argsort(~valid, axis=1, kind="stable")[:, :length]
    missing = length - order.shape[1]
    if missing > 0:
        order = np.concatenate((order, np.zeros((order.shape[0], missing), order.dtype)), axis=1)
    mask = np.arange(length) < lengths[:, None]
    return Packing(order.astype(np.int64), mask if always_masked or not mask.all() else None)


def in_place(valid: np.ndarray) -> Packing:
    """Every slot where it is, invalid ones masked: what `invalid_tokens="masked"` asks for."""
    return Packing(np.broadcast_to(np.arange(valid.shape[1]), valid.shape).astype(np.int64), valid)
