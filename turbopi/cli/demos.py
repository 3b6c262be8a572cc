"""`turbo-pi demos`: demonstrations of the scripted expert in LIBERO."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def demos(
    out: Path,
    episodes: int = 100,
    tasks: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    processes: int = 2,
    image_size: int = 112,
    first_seed: int = 1_000_000,
    noise: float = 0.3,
    other_bowl: float = 0.3,
    checkpoint: Path | None = None,
    policy_share: float = 0.7,
) -> int:
    """Generate libero_spatial demonstrations on random resets; a run that was killed continues.

    Args:
        out: directory of the episode files.
        episodes: per task.
        tasks: indices in libero_spatial.
        processes: simulations at a time.
        image_size: of the stored frames in pixels: the image size of the model that will be trained.
        first_seed: of the random resets.
        noise: largest standard deviation of noise on the executed action.
        other_bowl: share of episodes that ask for the scene's other bowl, so that language matters.
        checkpoint: a policy that acts in the expert's place, whose mistakes the expert then relabels.
        policy_share: share of the ticks at which it acts.
    """
    from ..sim.gl import choose_gl
    from ..train.demos import DemoConfig, generate, kept_per_task

    choose_gl()
    config = DemoConfig(
        out=out,
        episodes=episodes,
        tasks=tasks,
        processes=processes,
        image_size=image_size,
        first_seed=first_seed,
        noise=noise,
        other_bowl=other_bowl,
        checkpoint=checkpoint,
        policy_share=policy_share,
    )
    console, results = Console(), []
    columns = (TextColumn("episodes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=episodes * len(tasks))
        for result in generate(config):
            results.append(result)
            progress.advance(bar)
    table = Table("task", "kept", "tried", title=str(out))
    for task, (kept, tried) in kept_per_task(results).items():
        table.add_row(str(task), str(kept), str(tried))
    console.print(table)
    return 0
