"""Other implementations, timed on the same observation where they are installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

from ..config import PRESETS, ModelConfig
from ..model import ModelInput


class LerobotSubject:
    """LeRobot's own PyTorch π0.5 at its published size, random weights, eager or by its `compile_model`.

    It takes every camera slot and every prompt slot and masks the invalid ones, so it computes them all.

    Raises:
        ImportError: lerobot is not installed, or beside a transformers that it cannot use; says what to install.
        ValueError: the model is not of the published size, which is the only one that lerobot builds.
    """

    stage_names: tuple[str, ...] = ()

    def __init__(
        self,
        config: ModelConfig,
        inputs: ModelInput,
        noise: Tensor,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
        compiled: bool,
    ) -> None:
        published = PRESETS["pi05"]
        if (config.kind, config.vision, config.vlm, config.expert) != (
            published.kind,
            published.vision,
            published.vlm,
            published.expert,
        ):
            raise ValueError("--peer lerobot times the published pi05 sizes only; use --preset pi05")
        self.name = "lerobot compiled" if compiled else "lerobot"
        self.inputs, self.noise, self.steps, self.device = inputs, noise, steps, device
        self._model = _build(config, device, dtype, compiled)

    def warm_up(self) -> None:
        """Nothing: its first call does it."""

    def call(self) -> None:
        """See `Subject`."""
        self._ask().cpu()

    def call_device_ms(self) -> float | None:
        """None: it is asked for stage by stage, and the host's delays lie between."""
        return None

    def split(self) -> dict[str, float]:
        """See `Subject`."""
        start = time.perf_counter()
        actions = self._ask()
        asked = time.perf_counter()
        actions.cpu()
        return {"host ask": 1e3 * (asked - start), "host wait and read": 1e3 * (time.perf_counter() - asked)}

    def _ask(self) -> Tensor:
        inputs = self.inputs.to(self.device)
        actions: Tensor = self._model.sample_actions(
            images=list(inputs.images.unbind(dim=1)),
            img_masks=list(inputs.image_mask.unbind(dim=1)),
            tokens=inputs.tokens,
            masks=inputs.token_mask,
            noise=self.noise.to(self.device),
            num_steps=self.steps,
        )
        return actions

    def prepare(self) -> None:
        """Nothing."""

    def stages(self, mark: Callable[[], None]) -> None:
        """Nothing: its stages are not apart."""

    def graph(self) -> Callable[[], None] | None:
        """None: if it has graphs, they are the compiler's."""
        return None


def _build(config: ModelConfig, device: torch.device, dtype: torch.dtype, compiled: bool) -> Any:
    try:
        configuration = import_module("lerobot.policies.pi05.configuration_pi05")
        modeling = import_module("lerobot.policies.pi05.modeling_pi05")
    except ImportError as error:
        raise ImportError(
            f"--peer lerobot needs LeRobot with its pi extra in this environment ({error}); install 'lerobot[pi]'"
        ) from error
    _check_transformers()
    settings = configuration.PI05Config(
        dtype={torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype],
        chunk_size=config.horizon,
        n_action_steps=config.horizon,
        tokenizer_max_length=config.max_tokens,
        compile_model=compiled,
        device=str(device),
    )
    with torch.device(device):
        return modeling.PI05Pytorch(settings).to(device).eval()


def _check_transformers() -> None:
    """Raise ImportError if lerobot cannot use the transformers beside it: it would fail in the first call."""
    from packaging.requirements import Requirement  # lerobot requires it too

    try:
        wanted = [Requirement(line) for line in metadata.requires("lerobot") or ()]
        there = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return  # not installed as packages: nobody says what fits
    for each in wanted:
        if each.name == "transformers" and there not in each.specifier:
            raise ImportError(
                f"lerobot {metadata.version('lerobot')} asks for transformers {each.specifier}, installed is {there}; "
                f"install 'transformers{each.specifier}'"
            )
