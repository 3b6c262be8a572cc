"""Every dimension and every choice of a π0 / π0.5 model, in frozen dataclasses.

`ModelConfig` is what a checkpoint is: it is written into `config.json` and into every receipt, and checks itself when
it is made. What a control tick does with it is `turbopi.runtime.RuntimeConfig`. Sizes: SPEC 1.0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")
ModelKind = Literal["pi0", "pi05"]
NumericsName = Literal["exact", "openpi", "lerobot", "jax"]
InvalidTokens = Literal["dropped", "masked"]


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name} must be an integer of at least 1, got {value!r}")


def _require_choice(config: object, name: str, choices: tuple[Any, ...]) -> None:
    if getattr(config, name) not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"{type(config).__name__}.{name} must be one of {allowed}, got {getattr(config, name)!r}")


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP tower. `image_size` and `patch_size` in pixels (square)."""

    width: int
    depth: int
    mlp_dim: int
    heads: int
    patch_size: int = 14
    image_size: int = 224

    def __post_init__(self) -> None:
        _require_positive(self, "width", "depth", "mlp_dim", "heads", "patch_size", "image_size")
        if self.width % self.heads:
            raise ValueError(f"VisionConfig.width {self.width} is not divisible by heads {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"VisionConfig.image_size {self.image_size} is not a multiple of patch {self.patch_size}")

    @property
    def tokens(self) -> int:
        """Image tokens per camera."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class GemmaConfig:
    """One Gemma tower: the prefix ("vlm") or the action expert."""

    width: int
    depth: int
    mlp_dim: int
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _require_positive(self, "width", "depth", "mlp_dim", "heads", "kv_heads", "head_dim")
        if self.heads % self.kv_heads:
            raise ValueError(f"GemmaConfig.heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"GemmaConfig.head_dim must be even for rotary embeddings, got {self.head_dim}")


@dataclass(frozen=True)
class ModelConfig:
    """A π0 or π0.5 model of any size.

    Attributes:
        kind: "pi0" (state token, RMSNorm expert) or "pi05" (adaRMS expert, state at most in the prompt).
        vision, vlm, expert: the three towers. The two Gemma towers share depth, heads and head size, because
            suffix queries read the prefix's keys and values layer by layer.
        vocab_size: rows of the token embedding.
        horizon: actions per chunk, H.
        max_tokens: prompt slots, T.
        cameras: camera slots, in the order base, left wrist, right wrist.
        action_dim, state_dim: padded sizes inside the model (32 in all published checkpoints).
        state_in_prompt: whether the prompt spells the normalised state (π0.5's discrete form, SPEC 2.5).
            None: the checkpoint does not say; the robot's convention decides.
        min_period, max_period: of the time embedding's sinusoids.
        numerics: named numerics profile, see `turbopi.model.numerics`.
        invalid_tokens: "dropped" removes padding and missing cameras before they cost anything; "masked"
            computes them and hides them, as openpi does. They agree to rounding (SPEC 1.6).
    """

    kind: ModelKind
    vision: VisionConfig
    vlm: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    horizon: int
    max_tokens: int
    cameras: int = 3
    action_dim: int = 32
    state_dim: int = 32
    state_in_prompt: bool | None = None
    min_period: float = 4e-3
    max_period: float = 4.0
    numerics: NumericsName = "exact"
    invalid_tokens: InvalidTokens = "dropped"

    def __post_init__(self) -> None:
        _require_choice(self, "kind", get_args(ModelKind))
        _require_choice(self, "numerics", get_args(NumericsName))
        _require_choice(self, "invalid_tokens", get_args(InvalidTokens))
        _require_choice(self, "state_in_prompt", (None, True, False))
        _require_positive(self, "vocab_size", "horizon", "max_tokens", "cameras", "action_dim", "state_dim")
        for name in ("depth", "heads", "kv_heads", "head_dim"):
            if getattr(self.vlm, name) != getattr(self.expert, name):
                raise ValueError(
                    f"vlm.{name} {getattr(self.vlm, name)} differs from expert.{name} {getattr(self.expert, name)}: "
                    "the expert reads the prefix's keys and values layer by layer, so both must agree"
                )
        if self.expert.width % 2:
            raise ValueError(f"expert.width must be even for the time embedding, got {self.expert.width}")
        if not 0 < self.min_period < self.max_period:
            raise ValueError(f"need 0 < min_period < max_period, got {self.min_period} and {self.max_period}")

    @property
    def prefix_slots(self) -> int:
        """Image and prompt slots, P, before invalid tokens are dropped."""
        return self.cameras * self.vision.tokens + self.max_tokens

    @property
    def suffix_tokens(self) -> int:
        """Suffix length: the horizon, and π0's state token."""
        return self.horizon + (1 if self.kind == "pi0" else 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build from `to_dict`'s form. Raises ValueError that names unknown and missing fields."""
        values = dict(values)
        for name, part in (("vision", VisionConfig), ("vlm", GemmaConfig), ("expert", GemmaConfig)):
            if isinstance(values.get(name), Mapping):
                values[name] = _from_mapping(part, values[name], f"{name}.")
        return _from_mapping(cls, values, "")


def _from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    missing = [n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING]
    if unknown or missing:
        problems = [f"unknown field {where}{n}" for n in unknown] + [f"missing field {where}{n}" for n in missing]
        raise ValueError(f"not a {cls.__name__}: {', '.join(problems)}")
    return cls(**values)


SO400M = VisionConfig(width=1152, depth=27, mlp_dim=4304, heads=16)
GEMMA_2B = GemmaConfig(width=2048, depth=18, mlp_dim=16384, heads=8, kv_heads=1, head_dim=256)
GEMMA_300M = GemmaConfig(width=1024, depth=18, mlp_dim=4096, heads=8, kv_heads=1, head_dim=256)
PALIGEMMA_VOCAB = 257152

_PI0 = ModelConfig(
    kind="pi0", vision=SO400M, vlm=GEMMA_2B, expert=GEMMA_300M, vocab_size=PALIGEMMA_VOCAB, horizon=50, max_tokens=48
)
_SMALL = ModelConfig(
    kind="pi0",
    vision=VisionConfig(width=192, depth=4, mlp_dim=512, heads=4, patch_size=14, image_size=112),
    vlm=GemmaConfig(width=256, depth=4, mlp_dim=768, heads=8, kv_heads=1, head_dim=32),
    expert=GemmaConfig(width=192, depth=4, mlp_dim=512, heads=8, kv_heads=1, head_dim=32),
    vocab_size=1024,
    horizon=10,
    max_tokens=96,
)
_TINY = ModelConfig(
    kind="pi0",
    vision=VisionConfig(width=96, depth=2, mlp_dim=144, heads=4, patch_size=14, image_size=56),
    vlm=GemmaConfig(width=128, depth=3, mlp_dim=192, heads=8, kv_heads=1, head_dim=32),
    expert=GemmaConfig(width=64, depth=3, mlp_dim=96, heads=8, kv_heads=1, head_dim=32),
    vocab_size=1024,
    horizon=10,
    max_tokens=64,
)

_LIBERO_SMALL = ModelConfig(
    kind="pi05",
    vision=VisionConfig(width=256, depth=6, mlp_dim=768, heads=4, patch_size=14, image_size=112),
    vlm=GemmaConfig(width=256, depth=6, mlp_dim=1024, heads=8, kv_heads=1, head_dim=32),
    expert=GemmaConfig(width=192, depth=6, mlp_dim=640, heads=8, kv_heads=1, head_dim=32),
    vocab_size=1024,
    horizon=10,
    max_tokens=80,
    state_in_prompt=True,
)

PRESETS: dict[str, ModelConfig] = {
    "pi0": _PI0,
    "pi05": dataclasses.replace(_PI0, kind="pi05", max_tokens=200),
    "pi0-small": _SMALL,
    "pi05-small": dataclasses.replace(_SMALL, kind="pi05", state_in_prompt=True),
    "pi05-libero-small": _LIBERO_SMALL,
    "pi0-tiny": _TINY,
    "pi05-tiny": dataclasses.replace(_TINY, kind="pi05", state_in_prompt=True),
}


def preset(name: str) -> ModelConfig:
    """The preset of that name; raises ValueError that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
