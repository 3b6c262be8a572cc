"""Flow-matching training of a small policy: AdamW, warm-up and cosine, EMA, resumable, one device (SPEC 1.5)."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..model import Pi0
from ..model.flow import sample_time
from .dataset import DemonstrationSet, NoiseConfig

STATE_FILE = "training.pt"
CURVE_FILE = "loss.jsonl"


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimiser steps in all.
        batch_size: ticks per step.
        learning_rate: after `warmup` steps; falls to a hundredth along a cosine.
        weight_decay: of matrices.
        ema: decay of the averaged weights, which are what is saved.
        clip: largest gradient norm.
        bf16: autocast the matrix products.
        seed: of weights, batches, augmentation and times.
        save_every: steps between resumable states.
        cameras: camera slots that the demonstrations fill; slots beyond them are missing cameras.
        compiled: let torch.compile fuse the loss; worth it on a GPU.
        max_seconds: stop and save after so long; None: no limit. The schedule still spans `steps`.
        noise: disturbances of the inputs.
        start_from: where the first weights came from, if not from chance; only noted here.
    """

    steps: int = 10_000
    batch_size: int = 512
    learning_rate: float = 4e-4
    warmup: int = 300
    weight_decay: float = 0.01
    ema: float = 0.999
    clip: float = 1.0
    bf16: bool = True
    seed: int = 0
    save_every: int = 1000
    cameras: int = 2
    compiled: bool = False
    max_seconds: float | None = None
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    start_from: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"TrainConfig.ema must be in [0, 1), got {self.ema}")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class Trainer:
    """One training run in a directory. `run` continues where a killed run stopped.

    `weights`: a `Pi0` state to begin from instead of random weights.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        out: Path,
        device: torch.device,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config, self.out, self.device = config, out, device
        torch.manual_seed(config.seed)
        self.model = Pi0(model).to(device)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        # Static shapes and nothing to wait for: parameters do not depend on camera slots, and the two treatments of
        # invalid tokens agree to rounding. The average keeps the configuration that is saved.
        self.model.config = dataclasses.replace(model, cameras=config.cameras, invalid_tokens="masked")
        self._loss = torch.compile(self.model.unchecked_loss) if config.compiled else self.model.unchecked_loss
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda"
        )
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.step = 0
        out.mkdir(parents=True, exist_ok=True)
        self._resume()

    def run(self, data: DemonstrationSet, report: Callable[[int, float], None] | None = None) -> float:
        """Train to the end, or to `max_seconds`, calling `report(step, loss)`. Returns the last mean loss."""
        start, recent = time.monotonic(), []
        self.model.train()
        losses: list[Tensor] = []
        while self.step < self.config.steps:
            losses.append(self._one_step(data))
            if self.step % 100 == 0 or self.step == self.config.steps:
                recent = [float(loss) for loss in torch.stack(losses)]
                losses.clear()
                mean = sum(recent) / len(recent)
                self._note({"step": self.step, "loss": mean, "rate": self.config.rate(self.step - 1)})
                if report:
                    report(self.step, mean)
                limit = self.config.max_seconds
                if limit is not None and time.monotonic() - start > limit:
                    break
            if self.step % self.config.save_every == 0:
                self.save_state()
        self.save_state()
        return sum(recent) / len(recent) if recent else math.nan

    def _one_step(self, data: DemonstrationSet) -> Tensor:
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.rate(self.step)
        inputs, actions = data.batch(self.config.batch_size, self.generator)
        noise = torch.randn(actions.shape, generator=self.generator, device=self.device)
        times = sample_time(len(actions), self.generator, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            loss = self._loss(inputs, actions, noise, times).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimiser.step()
        # The average starts short, so that it forgets the random weights.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        return loss.detach()

    def save_state(self) -> None:
        """Write everything that a later run needs to continue; the old state stays until the new one is whole."""
        state: dict[str, Any] = {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "config": json.dumps(dataclasses.asdict(self.config)),
        }
        partial = self.out / (STATE_FILE + ".partial")
        torch.save(state, partial)
        partial.rename(self.out / STATE_FILE)

    def _resume(self) -> None:
        path = self.out / STATE_FILE
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        before = json.loads(state["config"])
        now = json.loads(json.dumps(dataclasses.asdict(self.config)))
        changed = [k for k in now if now[k] != before.get(k) and k not in ("max_seconds", "save_every", "compiled")]
        if changed:
            raise ValueError(f"{path} was made with another {', '.join(changed)}; use the same, or another directory")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"].cpu())
        self.step = state["step"]

    def _note(self, line: dict[str, float]) -> None:
        with (self.out / CURVE_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
