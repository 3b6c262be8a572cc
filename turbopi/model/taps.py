"""Taps: reading the intermediates of a forward pass by name.

A module that has something to show takes `tap: Tap | None` and calls it with a name and a tensor. Without a tap
nothing is computed or formatted, so the plain path pays one truth test. Names: `vision.camN.{embeddings,layerLL,
post_ln,projected}`; `prefix.{embs,pad_mask,position_ids,hiddenLL,kLL,vLL,out}`; `suffix.{position_ids,attn_mask}`;
`stepS.{time,x_t,adarms_cond,suffix_embs,hiddenLL,suffix_out,v_t}`; `actions`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tap = Callable[[str, torch.Tensor], None]


def scoped(tap: Tap | None, prefix: str) -> Tap | None:
    """The same tap with `prefix` put before every name; None stays None."""
    if tap is None:
        return None
    return lambda name, value: tap(prefix + name, value)
