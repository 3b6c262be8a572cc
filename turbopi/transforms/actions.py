"""Actions relative to the state, and back (openpi's DeltaActions and AbsoluteActions, SPEC 2.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def action_mask(*runs: int) -> tuple[bool, ...]:
    """A mask from run lengths: 6, -1 is six relative dimensions and one absolute one.

    Raises:
        ValueError: a run of length 0.
    """
    if 0 in runs:
        raise ValueError(f"an action mask's run lengths must not be 0, got {runs}")
    return tuple(flag for run in runs for flag in [run > 0] * abs(run))


def absolute_actions(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    """Add the state to the masked dimensions of every step.

    Args:
        actions: (..., H, dims) in robot units.
        state: (..., at least as many dims as the last masked one), in robot units: un-normalised (trap 40).
        mask: for the first dims; those beyond it stay.

    Returns:
        A new array of numpy's promoted dtype.
    """
    return _shifted(actions, state, mask, 1)


def relative_actions(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    """Subtract the state from the masked dimensions of every step: the inverse of `absolute_actions`."""
    return _shifted(actions, state, mask, -1)


def _shifted(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool], sign: int) -> np.ndarray:
    dims = [i for i, masked in enumerate(mask) if masked]
    shifted = actions.astype(np.result_type(actions, state))
    shifted[..., dims] += sign * state[..., None, dims]
    return shifted
