"""Parameter names: ours, openpi's PyTorch names, lerobot's, and every parameter's shape (SPEC 3).

Our names are openpi's with four long prefixes shortened. lerobot's are openpi's behind `model.`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..config import GemmaConfig, ModelConfig, VisionConfig

Shape = tuple[int, ...]

_ROOT = "paligemma_with_expert."
# The two output heads come first: they are not inside the towers whose prefixes follow.
_PREFIXES = (
    ("vlm.lm_head.", _ROOT + "paligemma.lm_head."),
    ("expert.lm_head.", _ROOT + "gemma_expert.lm_head."),
    ("vision.", _ROOT + "paligemma.model.vision_tower.vision_model."),
    ("projector.", _ROOT + "paligemma.model.multi_modal_projector.linear."),
    ("vlm.", _ROOT + "paligemma.model.language_model."),
    ("expert.", _ROOT + "gemma_expert.model."),
)
_UNCHANGED = (
    "action_in_proj.",
    "action_out_proj.",
    "state_proj.",
    "time_mlp_in.",
    "time_mlp_out.",
    "action_time_mlp_in.",
    "action_time_mlp_out.",
)
LEROBOT_PREFIX = "model."

EMBEDDING = "vlm.embed_tokens.weight"
TIED_HEAD = "vlm.lm_head.weight"
"""The output head of the prefix tower: openpi stores the tied embedding under this name only."""
EXPERT_HEAD = "expert.lm_head.weight"
"""An untrained output head that no inference reads; openpi's strict loader asks for it."""
HEADS = (TIED_HEAD, EXPERT_HEAD)


def to_openpi(name: str) -> str:
    """openpi's name of our `name`. Raises ValueError for a name that is not ours."""
    for ours, theirs in _PREFIXES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    if name.startswith(_UNCHANGED):
        return name
    raise ValueError(f"{name!r} is not a parameter name of this package")


def from_openpi(name: str) -> str | None:
    """Our name of openpi's `name`, or None if it belongs to no part of the model."""
    for ours, theirs in _PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name if name.startswith(_UNCHANGED) else None


def to_lerobot(name: str) -> str:
    """lerobot's name of our `name`."""
    return LEROBOT_PREFIX + to_openpi(name)


def from_lerobot(name: str) -> str | None:
    """Our name of lerobot's `name`; lerobot also reads openpi's names as they are, so both forms count."""
    return from_openpi(name.removeprefix(LEROBOT_PREFIX))


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every parameter of `Pi0(config)`, in the order in which the data passes them."""
    cond = config.expert.width if config.kind == "pi05" else None
    return dict(
        [
            *_vision(config.vision),
            *_linear("projector", config.vlm.width, config.vision.width),
            (EMBEDDING, (config.vocab_size, config.vlm.width)),
            *_gemma("vlm", config.vlm, None),
            *_gemma("expert", config.expert, cond),
            *_suffix(config),
        ]
    )


def head_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of the two output heads, which `Pi0` does not have and openpi's files hold."""
    return {
        TIED_HEAD: (config.vocab_size, config.vlm.width),
        EXPERT_HEAD: (config.vocab_size, config.expert.width),
    }


def _linear(name: str, out: int, into: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def _layer_norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _vision(vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    width, patch = vision.width, vision.patch_size
    yield "vision.embeddings.patch_embedding.weight", (width, 3, patch, patch)
    yield "vision.embeddings.patch_embedding.bias", (width,)
    yield "vision.embeddings.position_embedding.weight", (vision.tokens, width)
    for index in range(vision.depth):
        layer = f"vision.encoder.layers.{index}"
        yield from _layer_norm(f"{layer}.layer_norm1", width)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{part}", width, width)
        yield from _layer_norm(f"{layer}.layer_norm2", width)
        yield from _linear(f"{layer}.mlp.fc1", vision.mlp_dim, width)
        yield from _linear(f"{layer}.mlp.fc2", width, vision.mlp_dim)
    yield from _layer_norm("vision.post_layernorm", width)


def _gemma(tower: str, gemma: GemmaConfig, cond: int | None) -> Iterator[tuple[str, Shape]]:
    width, queries, keys = gemma.width, gemma.heads * gemma.head_dim, gemma.kv_heads * gemma.head_dim
    for index in range(gemma.depth):
        layer = f"{tower}.layers.{index}"
        yield from _norm(f"{layer}.input_layernorm", width, cond)
        yield f"{layer}.self_attn.q_proj.weight", (queries, width)
        yield f"{layer}.self_attn.k_proj.weight", (keys, width)
        yield f"{layer}.self_attn.v_proj.weight", (keys, width)
        yield f"{layer}.self_attn.o_proj.weight", (width, queries)
        yield from _norm(f"{layer}.post_attention_layernorm", width, cond)
        yield f"{layer}.mlp.gate_proj.weight", (gemma.mlp_dim, width)
        yield f"{layer}.mlp.up_proj.weight", (gemma.mlp_dim, width)
        yield f"{layer}.mlp.down_proj.weight", (width, gemma.mlp_dim)
    yield from _norm(f"{tower}.norm", width, cond)


def _norm(name: str, width: int, cond: int | None) -> Iterator[tuple[str, Shape]]:
    if cond is None:
        yield f"{name}.weight", (width,)
    else:
        yield from _linear(f"{name}.dense", 3 * width, cond)


def _suffix(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    width = config.expert.width
    if config.kind == "pi0":
        yield from _linear("state_proj", width, config.state_dim)
    yield from _linear("action_in_proj", width, config.action_dim)
    if config.kind == "pi0":
        yield from _linear("action_time_mlp_in", width, 2 * width)
        yield from _linear("action_time_mlp_out", width, width)
    else:
        yield from _linear("time_mlp_in", width, width)
        yield from _linear("time_mlp_out", width, width)
    yield from _linear("action_out_proj", config.action_dim, width)
