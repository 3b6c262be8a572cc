"""`turbo-pi train`: a small policy from demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

CHECKPOINT = "checkpoint"


def train(
    data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR…")],
    out: Path,
    preset: str = "pi05-libero-small",
    steps: int = 10_000,
    batch_size: int = 512,
    learning_rate: float = 4e-4,
    max_seconds: float | None = None,
    seed: int = 0,
    device: str = "auto",
    workers: int = 8,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    shard_mib: int = 15,
) -> int:
    """Train a policy with the reference's own flow-matching loss; a run that was killed continues.

    Writes OUT/checkpoint (the averaged weights, openpi's layout), OUT/loss.jsonl and OUT/loss.svg.

    Args:
        data: directories of episode files, as `turbo-pi demos` writes them.
        out: directory of the run.
        preset: sizes of the model.
        steps: optimiser steps.
        batch_size: ticks per step.
        learning_rate: after the warm-up.
        max_seconds: stop and save after so long.
        seed: of weights, batches and augmentation.
        device: auto, cpu, cuda, ...
        workers: processes that read the episodes.
        dtype: of the stored weights.
        shard_mib: largest size of a weights file.
    """
    import torch

    from ..checkpoint.load import usable_device
    from ..config import preset as find_preset
    from ..policy import choose_device
    from ..train.curve import draw_curve
    from ..train.dataset import DemonstrationSet, dataset_stats, load_episodes
    from ..train.episodes import episode_files
    from ..train.trainer import CURVE_FILE, TrainConfig, Trainer
    from ..transforms import shipped_tokenizer

    if (out / CHECKPOINT).exists():
        raise FileExistsError(f"{out / CHECKPOINT} is there already: this run has ended; choose another --out")
    console = Console()
    target = usable_device(choose_device(device))
    model = find_preset(preset)
    with console.status("reading the episodes"):
        episodes = load_episodes(episode_files(data), workers)
        stats = dataset_stats(episodes)
        config = TrainConfig(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_seconds=max_seconds,
            seed=seed,
            bf16=target.type == "cuda",
            compiled=target.type == "cuda",
            cameras=episodes[0].frames.shape[1],
        )
        ticks = DemonstrationSet(episodes, model, stats, shipped_tokenizer(), target, config.noise, seed)
    trainer = Trainer(model, config, out, target)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(f"{len(episodes)} episodes, {len(ticks)} ticks, {parameters / 1e6:.1f} M parameters, on {target}")
    columns = (TextColumn("loss {task.fields[loss]:.4f}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=steps, completed=trainer.step, loss=float("nan"))
        trainer.run(ticks, lambda step, loss: progress.update(bar, completed=step, loss=loss))
    draw_curve(out / CURVE_FILE, out / "loss.svg")
    shard_bytes = shard_mib * 1024 * 1024
    path = trainer.save_checkpoint(out / CHECKPOINT, stats, shipped_tokenizer(), getattr(torch, dtype), shard_bytes)
    console.print(f"wrote {path}")
    return 0
