"""Names of the tensors that an audit compares, in the order of computation.

`vision.camC.{embeddings,norm,tokens}` and `vision.camC.layers.L.X` with X one of q, k, v, attended, …; `prefix.embs`
and `prefix.layers.L.X`; `cache.layers.L.{k,v}`, what the denoise stage reads; `stepS.{x_t,cond,embs,norm,v_t}` and
`stepS.layers.L.X`; `actions`. Every tensor has valid rows only: engines that drop, mask or pad can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ..config import ModelConfig

VISION_LAYER = ("norm1", "q", "k", "v", "attended", "out", "mid", "norm2", "fc1", "hidden", "fc2", "stream")
_ATTENTION = ("q_raw", "k_raw", "v", "q", "k", "logits", "probs", "attended", "out", "mid")
_MLP = ("gate", "up", "hidden", "down", "stream")
PREFIX_LAYER = ("norm1", *_ATTENTION, "norm2", *_MLP)
LAST_PREFIX_LAYER = ("norm1", "k_raw", "v", "k")
ADAPTIVE_LAYER = ("norm1", "gate1", *_ATTENTION, "norm2", "gate2", *_MLP)

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("logits", "probs", "attended"),
    "softmax": ("probs",),
    "norm": ("norm1", "norm2", "gate1", "gate2", "norm"),
    "rope": ("q", "k"),
    "mlp": ("gate", "up", "fc1", "hidden", "down", "fc2"),
    "projections": ("q_raw", "k_raw", "v", "out"),
    "residual": ("mid", "stream"),
}
"""Kinds of operations, by what their results are called. In the vision tower q and k are projections."""


@dataclass(frozen=True)
class Place:
    """What a name says: tower ("vision", "prefix", "cache", "expert" or ""), camera or step, layer, tensor."""

    tower: str
    index: int | None
    layer: int | None
    tensor: str

    @property
    def stage(self) -> str:
        """The stage that computes it."""
        return {"vision": "encode_images", "prefix": "prefill", "cache": "prefill"}.get(self.tower, "denoise")

    @property
    def group(self) -> str:
        """Its key in `GROUPS`, the finest that has it, or "other"."""
        if self.tower == "vision" and self.tensor in ("q", "k"):
            return "projections"
        if self.tower == "cache":
            return "other"
        found = [name for name, tensors in GROUPS.items() if self.tensor in tensors]
        return found[-1] if found else "other"


@cache
def place(name: str) -> Place:
    """Take a name apart. Raises ValueError for what is no tensor's name."""
    first, *rest = name.split(".")
    tower, index = first, None
    if first.startswith("step"):
        tower, index = "expert", int(first.removeprefix("step"))
    elif first == "vision" and rest:
        index = int(rest.pop(0).removeprefix("cam"))
    elif first == "actions" and not rest:
        return Place("", None, None, "actions")
    layer = None
    if rest[:1] == ["layers"] and len(rest) == 3:
        layer, rest = int(rest[1]), rest[2:]
    if len(rest) != 1 or tower not in ("vision", "prefix", "cache", "expert"):
        raise ValueError(f"{name!r} is not the name of a tensor that an audit knows")
    return Place(tower, index, layer, rest[0])


def _layers(prefix: str, depth: int, tensors: Sequence[str]) -> list[str]:
    return [f"{prefix}.layers.{layer}.{tensor}" for layer in range(depth) for tensor in tensors]


def tensor_names(config: ModelConfig, cameras: Sequence[int], steps: int) -> tuple[str, ...]:
    """Every name, for a sample that has these cameras, in the order of computation."""
    names: list[str] = []
    for camera in cameras:
        tower = f"vision.cam{camera}"
        names += [f"{tower}.embeddings", *_layers(tower, config.vision.depth, VISION_LAYER)]
        names += [f"{tower}.norm", f"{tower}.tokens"]
    last = config.vlm.depth - 1
    names += ["prefix.embs", *_layers("prefix", last, PREFIX_LAYER)]
    names += [f"prefix.layers.{last}.{tensor}" for tensor in LAST_PREFIX_LAYER]
    names += _layers("cache", config.vlm.depth, ("k", "v"))
    adaptive = config.kind == "pi05"
    for step in range(steps):
        tower = f"step{step}"
        names += [f"{tower}.x_t", *([f"{tower}.cond"] if adaptive else []), f"{tower}.embs"]
        names += _layers(tower, config.expert.depth, ADAPTIVE_LAYER if adaptive else PREFIX_LAYER)
        names += [f"{tower}.norm", f"{tower}.v_t"]
    return (*names, "actions")


def in_group(name: str, group: str) -> bool:
    """Whether a switch of this group of `GROUPS` replaces the tensor."""
    where = place(name)
    if where.tower == "cache":
        return False
    if where.tower == "vision" and where.tensor in ("q", "k"):
        return group == "projections"
    return where.tensor in GROUPS[group]


def product_of(name: str) -> str | None:
    """The matrix product (as named in precision plans) that makes a tensor, None if none does."""
    where = place(name)
    tower = {"expert": "expert", "prefix": "prefix", "vision": "vision"}.get(where.tower)
    if tower is None or where.layer is None:
        return None
    made = {
        **dict.fromkeys(("q_raw", "k_raw", "q", "k", "v"), "qkv"),
        **dict.fromkeys(("out", "mid"), "out"),
        **dict.fromkeys(("gate", "up"), "gate_up"),
        "fc1": "fc1",
        "hidden": "fc1" if tower == "vision" else "gate_up",
        "down": "down",
        "fc2": "fc2",
        "stream": "fc2" if tower == "vision" else "down",
    }
    kind = made.get(where.tensor)
    return None if kind is None else f"{tower}.layers.{where.layer}.{kind}"
