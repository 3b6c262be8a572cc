"""`turbo-pi calibrate`: how far a checkpoint's activations reach, for number formats with static ranges."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import ModelInput
    from ..policy import Policy

SHOWN = 12
"""Products in the printed outlier report; the JSON has all."""


@dataclass(frozen=True)
class FrameOptions:
    """Where the observations come from; exactly one of suite, frames, dataset and synthetic.

    Attributes:
        suite: play episodes of this LIBERO suite with the policy itself, such as libero_spatial.
        episodes: how many, going round the tasks, from the last official initial states backwards.
        looks: observations kept of each episode.
        frames: an .npz file, or a directory of them, such as `turbo-pi serve --record` makes.
        dataset: directory of a LeRobot-format dataset.
        dataset_frames: how many of its frames, evenly spread.
        features: KEY=FEATURE, where the dataset's names do not tell which feature is which key of the robot.
        synthetic: noise. Worth little: it does not reach where real observations do.
    """

    suite: str | None = None
    episodes: int = 10
    looks: int = 4
    frames: Path | None = None
    dataset: Path | None = None
    dataset_frames: int = 64
    features: tuple[str, ...] = ()
    synthetic: bool = False

    def __post_init__(self) -> None:
        chosen = [name for name in ("suite", "frames", "dataset", "synthetic") if getattr(self, name)]
        if len(chosen) != 1:
            raise ValueError(
                "give exactly one source of observations: --suite, --frames, --dataset or --synthetic; "
                f"got {' and '.join(chosen) or 'none'}"
            )


def calibrate(
    checkpoint: Path,
    source: Annotated[FrameOptions, tyro.conf.arg(name="")],
    out: Path | None = None,
    observer: Literal["max", "percentile"] = "max",
    percentile: float = 99.99,
    report: Path | None = None,
    robot: str | None = None,
    steps: int = 10,
    device: str = "auto",
    tokenizer: Path | None = None,
) -> int:
    """Measure the input of every matrix product over real observations, all layers and all flow-matching steps.

    fp8, int8 and nvfp4 need the result. It belongs to these weights and is refused for others.

    Args:
        checkpoint: directory of an openpi, lerobot or JAX checkpoint.
        source: which observations.
        out: JSON file to write. Default: calibration.json in the checkpoint.
        observer: max keeps every value in range; percentile cuts off what lies above.
        percentile: of magnitudes; for the observer, and for the outlier report.
        report: JSON file for the whole outlier report.
        robot: libero, droid, aloha, or lerobot. Default: what the checkpoint says.
        steps: flow-matching evaluations a tick.
        device: auto, cpu, cuda, ...
        tokenizer: a .model or tokenizer.json file. Default: the checkpoint's, else the one in openpi's cache.
    """
    from ..engine import EagerEngine
    from ..policy import load_policy
    from ..quant import CALIBRATION_FILE
    from ..quant.calibrate import calibrate as measure

    console = Console(soft_wrap=True)
    # Padding and missing cameras reach where no valid token does, and nobody reads them.
    policy = load_policy(
        checkpoint, robot=robot, steps=steps, device=device, tokenizer=tokenizer, invalid_tokens="dropped"
    )
    assert isinstance(policy.engine, EagerEngine)
    batches, told = _batches(policy, source, console)
    found, outliers = measure(
        policy.engine.model,
        batches,
        robot=policy.transforms.robot.name,
        source=f"{told}, {policy.engine.precision}, {steps} steps",
        steps=steps,
        observer=observer,
        percentile=percentile,
        synthetic=source.synthetic,
    )
    console.print(outlier_table(outliers, percentile))
    written = found.save(out or checkpoint / CALIBRATION_FILE)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps({"calibration": found.summary(), "products": outliers}, indent=1) + "\n")
        console.print(f"wrote {report}")
    console.print(f"wrote {written}: {found.frames} frames, {len(found.inputs)} products, for {found.checkpoint_hash}")
    if source.synthetic:
        console.print("[yellow]made of noise: worth little. Calibrate with real observations before a robot moves.[/]")
    return 0


def _batches(policy: Policy, source: FrameOptions, console: Console) -> tuple[Iterable[tuple[ModelInput, Tensor]], str]:
    """Inputs with noise, and where they are from, in words."""
    from ..frames import model_inputs, read_frames
    from ..frames.model_inputs import MINIMUM_FRAMES
    from ..quant.calibrate import SYNTHETIC, SYNTHETIC_FRAMES
    from ..quant.observe import synthetic_batches

    robot = policy.transforms.robot
    if source.synthetic:
        return synthetic_batches(policy.engine.config, SYNTHETIC_FRAMES), SYNTHETIC
    if source.frames is not None:
        return model_inputs(policy, read_frames(source.frames, robot)), source.frames.name
    if source.dataset is not None:
        from ..frames.lerobot_dataset import dataset_frames

        frames = list(dataset_frames(source.dataset, robot, source.dataset_frames, parse_features(source.features)))
        return model_inputs(policy, frames), f"LeRobot dataset {source.dataset.name}"
    from ..frames.rollouts import Rollouts, rollout_frames

    assert source.suite is not None
    if source.episodes * source.looks < MINIMUM_FRAMES:
        raise ValueError(
            f"{source.looks} --looks in each of {source.episodes} --episodes are too few frames, at least "
            f"{MINIMUM_FRAMES} are needed"
        )
    played: list[bool] = []

    def tell(steps: int, success: bool) -> None:
        played.append(success)
        console.print(f"episode {len(played)}/{source.episodes}: {'success' if success else 'failure'}, {steps} steps")

    frames = list(rollout_frames(policy, Rollouts(source.suite, source.episodes, source.looks), tell))
    return model_inputs(policy, frames), f"{source.suite}, {source.episodes} episodes, {sum(played)} successes"


def parse_features(pairs: tuple[str, ...]) -> dict[str, str]:
    """Features by key of "KEY=FEATURE". Raises ValueError for anything else."""
    split = [pair.partition("=") for pair in pairs]
    bad = [pair for pair, (key, _, name) in zip(pairs, split, strict=True) if not key or not name]
    if bad:
        raise ValueError(f"--features {' '.join(bad)}: write KEY=FEATURE, such as observation/image=image")
    return {key: name for key, _, name in split}


def outlier_table(outliers: dict[str, dict[str, Any]], percentile: float) -> Table:
    """The products whose largest magnitude is furthest beyond the percentile."""
    title = f"outliers: the {SHOWN} products furthest beyond their percentile {percentile:g}"
    columns = ("product", "amax", "percentile", "ratio", "worst channels")
    table = Table(*(Column(name, no_wrap=name == "product") for name in columns), title=title)
    for product, seen in sorted(outliers.items(), key=lambda item: -(item[1]["ratio"] or 0.0))[:SHOWN]:
        worst = ", ".join(f"{channel} ({value:.3g})" for channel, value in seen["worst_channels"][:2])
        ratio = "" if seen["ratio"] is None else f"{seen['ratio']:.1f}"
        table.add_row(product, f"{seen['amax']:.3g}", f"{seen['percentile']:.3g}", ratio, worst)
    return table
