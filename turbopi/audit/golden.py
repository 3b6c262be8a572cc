"""Golden records: every intermediate of another implementation's run, and the same run by the reference.

The files are described in the fixtures' README: weights and inputs are pure functions of (seed, name, index), so a
record holds only outputs, the larger ones sliced, which the key says: `prefix.embs[:,::61]`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.hashweights import hash_integers, hash_normal, hash_parameter, hash_tensor
from ..checkpoint.load import build_model
from ..checkpoint.names import HEADS, from_openpi
from ..config import GemmaConfig, InvalidTokens, ModelConfig, NumericsName, VisionConfig
from ..model import ModelInput, Pi0

OBSERVED_STATE_DIMS = 8
FIRST_TOKEN = 2


@dataclass(frozen=True)
class Golden:
    """One record.

    Attributes:
        path: the safetensors file.
        implementation: "openpi", "lerobot" or "openpi-jax".
        rope_float32: whether a bf16 run was made with float32 rotary frequencies.
        config: dimensions of the model.
        dtype: of the run.
        batch, steps, seed: of the run.
        prompt_lengths, cameras: valid prompt tokens, and which cameras are there, per sample.
    """

    path: Path
    implementation: str
    rope_float32: bool
    config: ModelConfig
    dtype: torch.dtype
    batch: int
    steps: int
    seed: int
    prompt_lengths: tuple[int, ...]
    cameras: tuple[tuple[bool, ...], ...]

    @property
    def numerics(self) -> NumericsName:
        """The profile that describes this record."""
        if self.implementation == "openpi-jax":
            return "jax" if self.dtype == torch.float32 else "exact"
        if self.implementation == "lerobot":
            return "lerobot"
        return "exact" if self.rope_float32 else "openpi"

    def records(self) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
        """The tap name, the slice of it that was kept, and its value."""
        with safe_open(self.path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, slices = key.partition("[")
                if not name.startswith("in."):
                    yield name, _parse_slices(slices), file.get_tensor(key)

    def parameter_dtypes(self) -> dict[str, torch.dtype]:
        """In which dtype the other implementation held each of our parameters. KeyError for JAX records."""
        with safe_open(self.path, "pt") as file:
            held = json.loads(file.metadata()["param_dtypes"])
        named = ((from_openpi(name), getattr(torch, dtype.removeprefix("torch."))) for name, dtype in held.items())
        return {name: dtype for name, dtype in named if name is not None and name not in HEADS}

    def inputs(self) -> tuple[ModelInput, Tensor]:
        """The run's input and noise, on the CPU."""
        config, batch, seed = self.config, self.batch, self.seed
        size = config.vision.image_size
        stored = self._stored_inputs()
        images = [
            stored.get(f"in.image{c}", hash_tensor(f"in.image{c}", (batch, 3, size, size), seed))
            for c in range(config.cameras)
        ]
        image_mask = torch.tensor(self.cameras)
        stacked = torch.stack(images, dim=1)
        if "in.image0" not in stored:
            stacked[~image_mask] = -1.0
        token_mask = torch.arange(config.max_tokens) < torch.tensor(self.prompt_lengths)[:, None]
        tokens = hash_integers("in.tokens", (batch, config.max_tokens), seed, FIRST_TOKEN, config.vocab_size)
        state = hash_tensor("in.state", (batch, config.state_dim), seed)
        state[:, OBSERVED_STATE_DIMS:] = 0
        noise = hash_normal("in.noise", (batch, config.horizon, config.action_dim), seed)
        return ModelInput(stacked, image_mask, tokens * token_mask, token_mask, state), noise

    def _stored_inputs(self) -> dict[str, Tensor]:
        with safe_open(self.path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith("in.")}  # noqa: SIM118

    def build(
        self,
        numerics: NumericsName | None = None,
        invalid_tokens: InvalidTokens = "masked",
        device: str | torch.device = "cpu",
    ) -> Pi0:
        """The reference with the record's weights and dtype; the record's own profile unless one is named."""
        changes: dict[str, Any] = {"numerics": numerics or self.numerics, "invalid_tokens": invalid_tokens}
        return hash_model(ModelConfig.from_dict(self.config.to_dict() | changes), self.seed, self.dtype, device)


def hash_model(config: ModelConfig, seed: int, dtype: torch.dtype, device: str | torch.device = "cpu") -> Pi0:
    """A reference model with hash weights, made parameter by parameter."""

    def fill(name: str, kept: Tensor) -> None:
        kept.copy_(hash_parameter(name, tuple(kept.shape), seed, device))

    return build_model(config, device, dtype, fill)


def _parse_slices(text: str) -> tuple[slice, ...]:
    """Such as ":,::61]" -> (slice(None), slice(None, None, 61)); "" -> ()."""
    if not text:
        return ()
    parts = text.removesuffix("]").split(",")
    return tuple(slice(None, None, int(part[2:]) if part.startswith("::") else None) for part in parts)


def open_golden(path: str | Path) -> Golden:
    """Read a record's description. Raises FileNotFoundError, or KeyError if the file is not a golden record."""
    path = Path(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    c = json.loads(meta["config"])
    v = c["vision"]
    config = ModelConfig(
        kind=meta["model"],
        vision=VisionConfig(
            width=v["hidden_size"],
            depth=v["num_hidden_layers"],
            mlp_dim=v["intermediate_size"],
            heads=v["num_attention_heads"],
            patch_size=v["patch_size"],
            image_size=v["image_size"],
        ),
        vlm=_gemma(c["vlm"]),
        expert=_gemma(c["expert"]),
        vocab_size=c["vocab"],
        horizon=c["action_horizon"],
        max_tokens=c["token_len"],
        action_dim=c["action_dim"],
    )
    return Golden(
        path=path,
        implementation=meta["impl"],
        rope_float32=meta.get("rope_fp32") == "True",
        config=config,
        dtype=getattr(torch, meta["dtype"]),
        batch=c["batch"],
        steps=c["num_steps"],
        seed=int(meta["seed"]),
        prompt_lengths=tuple(c["lens"]),
        cameras=tuple(tuple(bool(flag) for flag in flags) for flags in c["img_masks"]),
    )


def _gemma(c: dict[str, int]) -> GemmaConfig:
    return GemmaConfig(
        width=c["width"],
        depth=c["depth"],
        mlp_dim=c["mlp_dim"],
        heads=c["num_heads"],
        kv_heads=c["num_kv_heads"],
        head_dim=c["head_dim"],
    )


@dataclass(frozen=True)
class TapError:
    """How far one tap is from its record.

    Attributes:
        name: of the tap.
        relative: root-mean-square of the difference over that of the record; for integers and masks 0 or inf.
        max_relative: largest difference over the record's largest magnitude.
        equal: bit for bit.
    """

    name: str
    relative: float
    max_relative: float
    equal: bool


def tap_error(name: str, value: Tensor, record: Tensor) -> TapError:
    """Compare a tap with its record; shapes must be equal."""
    value = value.detach().cpu()
    if value.shape != record.shape:
        raise ValueError(f"tap {name} has shape {tuple(value.shape)}, the record {tuple(record.shape)}")
    if not record.is_floating_point():
        equal = torch.equal(value.to(record.dtype), record)
        return TapError(name, 0.0 if equal else float("inf"), 0.0 if equal else float("inf"), equal)
    equal = torch.equal(value.to(record.dtype), record)
    difference, record = value.double() - record.double(), record.double()
    return TapError(
        name,
        float(difference.norm() / record.norm()),
        float(difference.abs().max() / record.abs().max()),
        equal,
    )


def compare(golden: Golden, model: Pi0, only: Collection[str] | None = None) -> list[TapError]:
    """Run the record's input through `model` and compare every recorded tap, or `only` those named.

    The result is in the order of computation. Raises ValueError if the model does not produce a recorded tap.
    """
    kept = ((name, slices, record) for name, slices, record in golden.records() if only is None or name in only)
    records = {name: (slices, record) for name, slices, record in kept}
    errors: list[TapError] = []

    def sink(name: str, value: Tensor) -> None:
        if name in records:
            slices, record = records.pop(name)
            errors.append(tap_error(name, value[slices], record))

    inputs, noise = golden.inputs()
    device = next(model.parameters()).device
    with model.taps(sink):
        model.sample_actions(inputs.to(device), noise.to(device), golden.steps)
    if records:
        raise ValueError(f"{golden.path.name}: the model yields no tap {', '.join(sorted(records))}")
    return errors
