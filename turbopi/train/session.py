"""A whole training: demonstrations read, a model trained on them, its checkpoint and loss curve written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..checkpoint import open_checkpoint, save_checkpoint
from ..checkpoint.load import load_opened, usable_device
from ..config import preset
from ..model import Pi0
from ..policy import choose_device
from ..transforms import shipped_tokenizer
from .curve import draw_curve
from .dataset import DemonstrationSet, dataset_stats, load_episodes
from .episodes import episode_files
from .trainer import CURVE_FILE, TrainConfig, Trainer

CHECKPOINT, PICTURE = "checkpoint", "loss.svg"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainRequest:
    """What to train.

    Attributes:
        data: directories of episode files.
        out: directory of the run.
        preset: sizes of the model.
        start_from: checkpoint to begin from, whose sizes and statistics are kept; None: random weights of `preset`.
        blend: share of the trained weights in what is saved, the rest being those of `start_from`; what is learned for
            one task then costs less of the others (Wortsman et al., 2022, "Robust fine-tuning of zero-shot models").
        steps: optimiser steps.
        batch_size: ticks per step.
        learning_rate: after the warm-up.
        max_seconds: stop and save after so long; None: no limit.
        seed: of weights, batches and augmentation.
        device: auto, cpu, cuda, ...
        workers: processes that read the episodes.
        dtype: of the stored weights.
        shard_mib: largest size of a weights file.
    """

    data: tuple[Path, ...]
    out: Path
    preset: str = "pi05-libero-small"
    start_from: Path | None = None
    blend: float = 1.0
    steps: int = 10_000
    batch_size: int = 512
    learning_rate: float = 4e-4
    max_seconds: float | None = None
    seed: int = 0
    device: str = "auto"
    workers: int = 8
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    shard_mib: int = 15

    def __post_init__(self) -> None:
        if not 0 < self.blend <= 1:
            raise ValueError(f"blend must be in (0, 1], got {self.blend}")
        if self.blend < 1 and self.start_from is None:
            raise ValueError(f"blend {self.blend} mixes with the weights of a checkpoint; name it with start_from")


class TrainSession:
    """A training that is ready to run, or to continue where a killed one stopped."""

    def __init__(self, request: TrainRequest) -> None:
        """Read the demonstrations and make, or find, the state of the run.

        Raises:
            FileExistsError: the run has ended already.
            FileNotFoundError: no demonstrations, or no checkpoint to start from.
            ValueError: an unknown preset, or another configuration than the run was begun with.
        """
        if (request.out / CHECKPOINT).exists():
            raise FileExistsError(
                f"{request.out / CHECKPOINT} is there already: this run has ended; choose another --out"
            )
        self.request = request
        self.device = usable_device(choose_device(request.device))
        start = None if request.start_from is None else open_checkpoint(request.start_from)
        model = preset(request.preset) if start is None else start.config
        episodes = load_episodes(episode_files(request.data), request.workers)
        self.episodes = len(episodes)
        self.stats = dataset_stats(episodes) if start is None else start.norm_stats()
        config = TrainConfig(
            steps=request.steps,
            batch_size=request.batch_size,
            learning_rate=request.learning_rate,
            max_seconds=request.max_seconds,
            seed=request.seed,
            bf16=self.device.type == "cuda",
            compiled=self.device.type == "cuda",
            cameras=episodes[0].frames.shape[1],
            start_from=None if request.start_from is None else str(request.start_from),
        )
        self.ticks = DemonstrationSet(
            episodes, model, self.stats, shipped_tokenizer(), self.device, config.noise, request.seed
        )
        self._start = None if start is None else load_opened(start, self.device, torch.float32).state_dict()
        self.trainer = Trainer(model, config, request.out, self.device, self._start)

    def describe(self) -> str:
        """What is trained on what."""
        parameters = sum(p.numel() for p in self.trainer.model.parameters())
        return (
            f"{self.episodes} episodes, {len(self.ticks)} ticks, {parameters / 1e6:.1f} M parameters, on {self.device}"
        )

    def run(self, report: Callable[[int, float], None]) -> Path:
        """Train, calling `report(step, loss)` now and then; returns the checkpoint's path."""
        request, trainer = self.request, self.trainer
        trainer.run(self.ticks, report)
        draw_curve(request.out / CURVE_FILE, request.out / PICTURE)
        return save_checkpoint(
            request.out / CHECKPOINT,
            self._blended(trainer.average),
            self.stats,
            "libero",
            shipped_tokenizer(),
            dtype=DTYPES[request.dtype],
            max_shard_bytes=request.shard_mib * 1024 * 1024,
        )

    def _blended(self, trained: Pi0) -> Pi0:
        """What is saved; the trainer's own average stays as it is, for a run that is continued."""
        if self._start is None or self.request.blend == 1:
            return trained
        mixed = copy.deepcopy(trained)
        weights = mixed.state_dict()
        mixed.load_state_dict({k: self._start[k].lerp(v, self.request.blend) for k, v in weights.items()})
        return mixed
