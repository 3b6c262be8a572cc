"""Policies over tiny models, and observations that move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from turbopi import ModelInput, Policy, load_policy
from turbopi.audit.golden import hash_model
from turbopi.config import ModelConfig, preset
from turbopi.engine import Engine
from turbopi.engine.eager import EagerEngine
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo.ops import twin_ops
from turbopi.runtime import Runtime, RuntimeConfig

Observation = dict[str, Any]


STAGES = ("encode_images", "prefill", "prefill_partial", "prefill_embedded", "denoise", "integrate", "sample_actions")


class Counting:
    """Notes which stages of an engine are asked for."""

    def __init__(self, engine: Engine) -> None:
        self.ran: list[str] = []
        for name in (*STAGES, "sample_again", "embed_prompt"):
            if hasattr(engine, name):
                setattr(engine, name, self._noted(name, getattr(engine, name)))

    def _noted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            self.ran.append(name)
            return call(*arguments, **options)

        return noted

    def take(self) -> list[str]:
        """What ran since the last call."""
        ran, self.ran = self.ran, []
        return ran


def eager(name: str = "pi05-tiny") -> EagerEngine:
    return EagerEngine(hash_model(preset(name), 7, torch.float32), "fp32")


def turbo(name: str = "pi05-tiny") -> TurboEngine:
    return TurboEngine(hash_model(preset(name), 7, torch.float32), "fp32", twin_ops(), None)


def runtime(engine: Engine, **options: Any) -> Runtime:
    return Runtime(engine, RuntimeConfig(steps=2, **options))


def inputs(config: ModelConfig, seed: int = 0, state: int = 3, text: int = 6) -> ModelInput:
    """One observation: images and state tokens of the seed, the same text always."""
    g = torch.Generator().manual_seed(seed)
    size, slots = config.vision.image_size, config.max_tokens
    tokens = torch.zeros(1, slots, dtype=torch.int64)
    tokens[0, :text] = torch.arange(10, 10 + text)
    tokens[0, text : text + state] = torch.randint(100, 200, (state,), generator=g)
    return ModelInput(
        images=torch.rand(1, config.cameras, 3, size, size, generator=g) * 2 - 1,
        image_mask=torch.tensor([[True, True, False]]),
        tokens=tokens,
        token_mask=torch.arange(slots)[None] < text + state,
        state=torch.rand(1, config.state_dim, generator=g) * 2 - 1,
    )


def noise(config: ModelConfig, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, config.horizon, config.action_dim, generator=torch.Generator().manual_seed(seed))


def play(runtime: Runtime, seeds: list[int], text: int = 6) -> list[str]:
    """Ticks over the observations of these seeds; what was done at each."""
    config = runtime.engine.config
    return [runtime.sample(inputs(config, s), noise(config), text)[1].decision.kind for s in seeds]


def frames(data: Path, count: int = 4) -> list[Observation]:
    z = np.load(data / "libero_frames.npz")
    return [
        {
            "observation/image": z["agentview"][i][::-1, ::-1],
            "observation/wrist_image": z["wrist"][i][::-1, ::-1],
            "observation/state": z["state"][i],
            "prompt": str(z["prompt"][0]),
        }
        for i in range(count)
    ]


def policy(path: Path, runtime: RuntimeConfig | None = None, **options: Any) -> Policy:
    return load_policy(path, device="cpu", runtime=runtime, **options)
