"""A checkpoint's `ModelConfig`: what it states, what its tensors show, and what it must not leave open.

Order of belief: the `turbopi` object (it may be partial), then the tensors' shapes. Variant names must agree with the
shapes where no `turbopi` object speaks. What none of them can tell is an error that names the field (SPEC 1.0, 3).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any, get_args

from ..config import GEMMA_2B, GEMMA_300M, SO400M, GemmaConfig, ModelConfig, ModelKind, VisionConfig
from ..errors import CheckpointError
from .names import EMBEDDING, HEADS, head_shapes, parameter_shapes
from .tensors import FLOATS, TensorInfo, some

TURBOPI = "turbopi"
VARIANTS: dict[str, GemmaConfig] = {
    "gemma_2b": GEMMA_2B,
    "gemma_2b_lora": GEMMA_2B,
    "gemma_300m": GEMMA_300M,
    "gemma_300m_lora": GEMMA_300M,
    "dummy": GemmaConfig(width=64, depth=4, mlp_dim=128, heads=8, kv_heads=1, head_dim=16),
}
DEFAULT_MAX_TOKENS = {"pi0": 48, "pi05": 200}
_TOWERS = {"vlm": "paligemma_variant", "expert": "action_expert_variant"}
_PARTS = {"vision": VisionConfig, "vlm": GemmaConfig, "expert": GemmaConfig}

Infos = Mapping[str, TensorInfo]


class _Shapes:
    """Tensor shapes, with absent tensors collected so that one error can name them all."""

    def __init__(self, infos: Infos) -> None:
        self.infos = infos
        self.absent: list[str] = []

    def size(self, name: str, axis: int) -> int:
        """Size of `name` along `axis`; 1 if it is absent or has no such axis, which is noted."""
        info = self.infos.get(name)
        if info is None or len(info.shape) <= axis or not all(info.shape):
            self.absent.append(name)
            return 1
        return info.shape[axis]

    def depth(self, prefix: str) -> int:
        """Layers under `prefix`, counted to the last one that has any tensor."""
        pattern = re.compile(re.escape(prefix) + r"\.layers\.(\d+)\.")
        return 1 + max((int(m[1]) for name in self.infos if (m := pattern.match(name))), default=0)


def stated_config(declared: Mapping[str, Any]) -> dict[str, Any]:
    """The checked `turbopi` object of a config.json, {} if there is none.

    Raises CheckpointError if it is no object, has fields that `ModelConfig` does not, or a tower's size is no size.
    """
    stated = declared.get(TURBOPI, {})
    if not isinstance(stated, Mapping):
        raise CheckpointError(f'"{TURBOPI}" in config.json is {stated!r}, expected an object of ModelConfig fields')
    unknown = sorted(set(stated) - {f.name for f in dataclasses.fields(ModelConfig)})
    for part, cls in _PARTS.items():
        values = stated.get(part, {})
        if not isinstance(values, Mapping):
            raise CheckpointError(f'"{TURBOPI}"."{part}" in config.json is {values!r}, expected an object of sizes')
        unknown += [f"{part}.{key}" for key in sorted(set(values) - {f.name for f in dataclasses.fields(cls)})]
    if unknown:
        raise CheckpointError(f'"{TURBOPI}" in config.json has unknown fields: {", ".join(unknown)}; remove them')
    # Before anything is divided by them.
    wrong = [
        f"{part}.{key} {value!r}"
        for part in _PARTS
        for key, value in stated.get(part, {}).items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    if wrong:
        raise CheckpointError(f'"{TURBOPI}" in config.json has {", ".join(wrong)}, expected integers of at least 1')
    return dict(stated)


def kind_of_tensors(infos: Infos) -> ModelKind:
    """π0 or π0.5, from the time MLP that the tensors hold. Raises CheckpointError if neither or both are there."""
    pi05 = any(name.startswith("time_mlp_in.") for name in infos)
    pi0 = any(name.startswith("action_time_mlp_in.") for name in infos)
    if pi0 == pi05:
        found = "both" if pi0 else "neither"
        raise CheckpointError(
            f"the weights hold {found} of time_mlp_in (π0.5) and action_time_mlp_in (π0); "
            "expected exactly one: this is not a whole π0 or π0.5 checkpoint"
        )
    return "pi05" if pi05 else "pi0"


def declared_kinds(declared: Mapping[str, Any]) -> dict[str, str]:
    """Where config.json states the model's kind -> what it states there."""
    stated = declared.get(TURBOPI)
    found = {"turbopi.kind": stated.get("kind")} if isinstance(stated, Mapping) else {}
    found["type"] = declared.get("type")
    return {where: str(kind) for where, kind in found.items() if kind is not None}


def infer_config(declared: Mapping[str, Any], infos: Infos, heads: Mapping[str, Mapping[str, int]]) -> ModelConfig:
    """The whole configuration. `heads`: head counts known from elsewhere (a JAX tree spells them).

    Raises CheckpointError that lists every contradiction and every unknown field with how to state it.
    """
    stated = stated_config(declared)
    kind = kind_of_tensors(infos)
    shapes, problems = _Shapes(infos), _kind_problems(declared, kind)
    vision = _vision(shapes, stated.get("vision", {}), heads.get("vision", {}), problems)
    towers = {
        tower: _gemma(shapes, tower, stated.get(tower, {}), heads.get(tower, {}), declared, problems)
        for tower in _TOWERS
    }
    if not stated:
        problems += _variant_problems(declared, towers)
    rest = _rest(shapes, kind, declared, problems)
    rest |= {key: value for key, value in stated.items() if key not in _PARTS}
    if "horizon" not in rest:
        problems.append(_unknown("horizon", "the number of actions per chunk is not in the weights", {"horizon": 50}))
    if shapes.absent:
        problems.append(f"tensors that the sizes are read from are missing or misshapen: {some(shapes.absent)}")
    if problems:
        raise CheckpointError("; ".join(problems))
    try:
        return ModelConfig.from_dict({**rest, "kind": kind, "vision": vision, **towers})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the sizes found in this checkpoint do not make a model: {error}") from error


def _kind_problems(declared: Mapping[str, Any], kind: ModelKind) -> list[str]:
    return [
        f"config.json declares {where} {stated!r}, but the weights are those of {kind}; correct the declaration or "
        "the weights file"
        for where, stated in declared_kinds(declared).items()
        if stated != kind
    ]


def _unknown(field: str, why: str, example: Mapping[str, Any]) -> str:
    text = json.dumps({TURBOPI: example})
    return f"{field} is unknown: {why}; state it in config.json, for example {text}"


def _vision(
    shapes: _Shapes, stated: Mapping[str, Any], heads: Mapping[str, int], problems: list[str]
) -> dict[str, Any]:
    width = shapes.size("vision.embeddings.patch_embedding.weight", 0)
    patch = shapes.size("vision.embeddings.patch_embedding.weight", 3)
    tokens = shapes.size("vision.embeddings.position_embedding.weight", 0)
    side = math.isqrt(tokens)
    if side * side != tokens and "image_size" not in stated:
        problems.append(f"vision.embeddings.position_embedding has {tokens} rows, expected a square number of patches")
    sizes: dict[str, Any] = {
        "width": width,
        "depth": shapes.depth("vision.encoder"),
        "mlp_dim": shapes.size("vision.encoder.layers.0.mlp.fc1.weight", 0),
        "patch_size": patch,
        "image_size": side * patch,
    }
    if width == SO400M.width:
        sizes["heads"] = SO400M.heads
    sizes |= {**heads, **stated}
    if "heads" not in sizes:
        why = f"a vision tower {width} wide does not show its number of attention heads"
        problems.append(_unknown("vision.heads", why, {"vision": {"heads": 4}}))
    return sizes


def _gemma(
    shapes: _Shapes,
    tower: str,
    stated: Mapping[str, Any],
    heads: Mapping[str, int],
    declared: Mapping[str, Any],
    problems: list[str],
) -> dict[str, int]:
    layer = f"{tower}.layers.0"
    queries, width = (shapes.size(f"{layer}.self_attn.q_proj.weight", axis) for axis in (0, 1))
    keys = shapes.size(f"{layer}.self_attn.k_proj.weight", 0)
    known = {**heads, **stated}
    variant = VARIANTS.get(str(declared.get(_TOWERS[tower])))
    if variant and (variant.heads * variant.head_dim, variant.kv_heads * variant.head_dim) == (queries, keys):
        known = {"kv_heads": variant.kv_heads, "head_dim": variant.head_dim, **known}
    head_dim = known.get("head_dim") or keys // known.get("kv_heads", 1)
    if not isinstance(head_dim, int) or head_dim < 1 or queries % head_dim or keys % head_dim:
        problems.append(f"{tower}: {queries} query rows and {keys} key rows are not whole heads of {head_dim}")
        head_dim = 1
    return {
        "width": width,
        "depth": shapes.depth(tower),
        "mlp_dim": shapes.size(f"{layer}.mlp.gate_proj.weight", 0),
        "heads": queries // head_dim,
        "kv_heads": keys // head_dim,
        "head_dim": head_dim,
        **known,
    }


def _variant_problems(declared: Mapping[str, Any], towers: Mapping[str, Mapping[str, int]]) -> list[str]:
    problems = []
    for tower, key in _TOWERS.items():
        name = declared.get(key)
        if name is None:
            continue
        if name not in VARIANTS:
            problems.append(f"config.json has {key} {name!r}, known are {', '.join(VARIANTS)}")
            continue
        expected, found = dataclasses.asdict(VARIANTS[name]), towers[tower]
        wrong = [
            f"{field} {found[field]} instead of {expected[field]}"
            for field in expected
            if found[field] != expected[field]
        ]
        if wrong:
            problems.append(
                f"config.json declares {key} {name!r}, but the weights have {', '.join(wrong)}; correct the variant, "
                f'or add a "{TURBOPI}" object to config.json, which makes the weights\' shapes count'
            )
    return problems


def _rest(shapes: _Shapes, kind: ModelKind, declared: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Everything outside the towers, except what the `turbopi` object overrides."""
    lerobot = declared.get("type") in get_args(ModelKind)
    action_dim = shapes.size("action_in_proj.weight", 1)
    rest: dict[str, Any] = {
        "vocab_size": shapes.size(EMBEDDING, 0),
        "action_dim": action_dim,
        "state_dim": shapes.size("state_proj.weight", 1)
        if kind == "pi0"
        else declared.get("max_state_dim", action_dim),
        "max_tokens": declared.get("tokenizer_max_length", DEFAULT_MAX_TOKENS[kind]),
    }
    # openpi's π0.5 does either, and its files do not say; π0 never spells the state, lerobot's π0.5 always (SPEC 2.5).
    if lerobot or kind == "pi0":
        rest["state_in_prompt"] = kind == "pi05"
    for theirs, ours in (("action_horizon", "horizon"), ("chunk_size", "horizon")):
        if theirs in declared:
            rest[ours] = declared[theirs]
    for period in ("min_period", "max_period"):
        if period in declared:
            rest[period] = declared[period]
    cameras = sum(1 for f in declared.get("input_features", {}).values() if f.get("type") == "VISUAL") if lerobot else 0
    if cameras > 3:
        rest["cameras"] = cameras
    for key in ("action_dim", "max_action_dim"):
        if declared.get(key, action_dim) != action_dim:
            problems.append(f"config.json declares {key} {declared[key]}, but action_in_proj takes {action_dim}")
    return rest


def tensor_problems(infos: Infos, unknown: tuple[str, ...], config: ModelConfig) -> list[str]:
    """Every way in which the tensors are not those of `config`: missing, unexpected, misshapen, not floating."""
    expected = parameter_shapes(config)
    missing = [name for name in expected if name not in infos]
    strangers = [*unknown, *(name for name in infos if name not in expected and name not in HEADS)]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {some(missing)}")
    if strangers:
        problems.append(f"{len(strangers)} tensors belong to no part of a {config.kind} model: {some(strangers)}")
    for name, shape in (expected | head_shapes(config)).items():
        info = infos.get(name)
        if info is not None and info.shape != shape:
            problems.append(f"{name} has shape {list(info.shape)}, expected {list(shape)}")
        elif info is not None and info.dtype not in FLOATS:
            problems.append(f"{name} has dtype {info.dtype}, expected {' or '.join(map(str, FLOATS))}")
    return problems
