"""`turbo-pi train`: a small policy from demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ..train.session import TrainSession


def train(
    data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR…")],
    out: Path,
    preset: str = "pi05-libero-small",
    start_from: Path | None = None,
    blend: float = 1.0,
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
        start_from: checkpoint to begin from, whose sizes and statistics are kept. Default: random weights.
        blend: share of the trained weights in the checkpoint; the rest are those of `start_from`.
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
    from ..train.session import TrainRequest, TrainSession

    console = Console()
    with console.status("reading the episodes"):
        session = TrainSession(
            TrainRequest(
                data=data,
                out=out,
                preset=preset,
                start_from=start_from,
                blend=blend,
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                max_seconds=max_seconds,
                seed=seed,
                device=device,
                workers=workers,
                dtype=dtype,
                shard_mib=shard_mib,
            )
        )
    console.print(session.describe())
    console.print(f"wrote {_run(session, console)}")
    return 0


def _run(session: TrainSession, console: Console) -> Path:
    """Train with a bar that shows the loss."""
    columns = (TextColumn("loss {task.fields[loss]:.4f}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=session.request.steps, completed=session.trainer.step, loss=float("nan"))
        return session.run(lambda step, loss: progress.update(bar, completed=step, loss=loss))
