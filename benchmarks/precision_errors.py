"""How far each precision is from float32 on real frames, and how many bytes its weights take.

    python benchmarks/precision_errors.py                       # this machine; pi05-libero-small takes 8 minutes
    python benchmarks/precision_errors.py --device cuda --engines eager turbo --precisions bf16 fp8

Every frame goes through every precision with the same noises. Free-running: each stage reads what the stage before it
made. The reference is the engine "eager" in fp32. The receipt is benchmarks/results/precision_errors.json.
Bytes of the full-size π0.5 are counted from its shapes, not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast, get_args

import torch
import tyro
from doc_tables import RESULTS, ROOT
from paired_runs import wide_console
from rich.table import Table
from torch import Tensor

from turbopi import ModelInput, Pi0, Policy, load_policy, preset
from turbopi.bench import write_receipt
from turbopi.checkpoint.load import build_model
from turbopi.engine import Engine, Precision, engines_for, precision_dtype
from turbopi.frames import model_inputs, read_frames
from turbopi.policy import choose_device
from turbopi.quant import (
    FORMATS,
    Calibration,
    Format,
    InputRange,
    PrecisionPlan,
    Quantisation,
    input_width,
    product_names,
    quantised,
    weight_bytes,
)

PRECISIONS = get_args(Precision)
FULL_SIZE = "pi05"


@dataclass(frozen=True)
class Options:
    """What to compare."""

    checkpoint: Path = ROOT / "checkpoints" / "pi05-libero-small"
    """The policy."""
    frames: Path = ROOT / "tests" / "data" / "libero_frames.npz"
    """Real observations, other than those of the calibration."""
    calibration: Path | None = None
    """Input ranges. None: calibration.json in the checkpoint."""
    plan: Path | None = None
    """Precision plan, for a single quantised precision."""
    precisions: tuple[str, ...] = PRECISIONS
    """Which."""
    engines: tuple[str, ...] = ("eager",)
    """Ways to run them; a precision that an engine does not run is left out."""
    steps: int = 10
    """Flow-matching evaluations."""
    noises: int = 5
    """Of each frame: what one noise shows of an error in the actions is mostly chance."""
    device: str = "auto"
    """Of all engines."""
    receipt: Path = RESULTS / "precision_errors.json"
    """The receipt."""


Ticks = Sequence[tuple[ModelInput, Sequence[Tensor]]]
"""Frames, each with its noises (1,H,32)."""


def main() -> None:
    """Compare, write the receipt, show the table."""
    options = tyro.cli(Options, description=__doc__)
    reference = open_policy(options, "eager", "fp32")
    frames = read_frames(options.frames, reference.transforms.robot)
    drawn = [list(model_inputs(reference, frames, minimum=1, seed=seed)) for seed in range(options.noises)]
    ticks = [(same[0][0], [noise for _, noise in same]) for same in zip(*drawn, strict=True)]
    expected = stages(reference.engine, ticks, options.steps)
    rows = []
    for engine in options.engines:
        for precision in options.precisions:
            if engine not in engines_for(cast("Precision", precision)):
                continue
            policy = open_policy(options, engine, precision)
            found = stages(policy.engine, ticks, options.steps)
            rows.append({"engine": engine, "precision": precision, **errors(found, expected), **told(policy)})
    results = {"frames": len(ticks), "rows": rows, "full_size_bytes": {p: full_size_bytes(p) for p in PRECISIONS}}
    config = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    config["device"] = choose_device(options.device)
    path = write_receipt(options.receipt, "precisions against float32 on real frames", results, config)
    console = wide_console()
    console.print(table(results))
    console.print(f"wrote {path}")


def open_policy(options: Options, engine: str, precision: str) -> Policy:
    """The policy in one precision."""
    plain = precision in ("fp32", "bf16")
    return load_policy(
        options.checkpoint,
        engine=engine,
        steps=options.steps,
        precision=cast("Precision", precision),
        device=options.device,
        plan=None if plain else options.plan,
        calibration=None if plain else options.calibration,
    )


def stages(engine: Engine, ticks: Ticks, steps: int) -> dict[str, list[Tensor]]:
    """What each stage makes of every frame, float64 on the CPU: valid keys and values, actions of every noise."""
    found: dict[str, list[Tensor]] = {"image_tokens": [], "keys": [], "values": [], "actions": []}
    for inputs, noises in ticks:
        tokens = engine.encode_images(inputs.images, inputs.image_mask)
        found["image_tokens"].append(_wide(tokens[inputs.image_mask.to(tokens.device)]))
        cache = engine.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
        length = int(cache.lengths[0])
        found["keys"].append(torch.stack([_wide(keys[:, :, :length]) for keys in cache.keys]))
        found["values"].append(torch.stack([_wide(values[:, :, :length]) for values in cache.values]))
        found["actions"].extend(_wide(engine.denoise(cache, inputs.state, noise, steps)) for noise in noises)
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu().clone()


def errors(found: Mapping[str, list[Tensor]], expected: Mapping[str, list[Tensor]]) -> dict[str, Any]:
    """Relative error of each stage over all frames, and of the actions more closely: of each frame and noise."""
    relative = {stage: _relative(found[stage], expected[stage]) for stage in found}
    each = [float((a - b).norm() / b.norm()) for a, b in zip(found["actions"], expected["actions"], strict=True)]
    a, b = torch.cat(found["actions"]).flatten(), torch.cat(expected["actions"]).flatten()
    return {
        "relative_error": relative,
        "each": each,
        "median_frame": median(each),
        "worst_frame": max(each),
        "largest_difference": float((a - b).abs().max()),
        "cosine": float(torch.nn.functional.cosine_similarity(a, b, dim=0)),
    }


def _relative(found: list[Tensor], expected: list[Tensor]) -> float:
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return float((difference / sum(float(b.square().sum()) for b in expected)) ** 0.5)


def told(policy: Policy) -> dict[str, Any]:
    """What the engine says of its weights, and of how it computes."""
    details = policy.describe()["engine_details"]
    if "weight_bytes" not in details and isinstance(model := getattr(policy.engine, "model", None), Pi0):
        details = {**details, "weight_bytes": weight_bytes(model)}
    return {name: details.get(name) for name in ("weight_bytes", "how", "calibration", "plan")}


def full_size_bytes(precision: str) -> dict[str, int]:
    """Bytes of the published π0.5's weights in the engine "eager", counted from their shapes."""
    config = preset(FULL_SIZE)
    model = build_model(config, "meta", precision_dtype(precision), lambda name, kept: None)
    if precision not in FORMATS or precision == "bf16":
        return weight_bytes(model)
    found = {}
    for product in product_names(config):
        channels = (1.0,) * input_width(config, product)
        found[product] = InputRange(1.0, channels)
    ranges = Calibration("none", "none", "sizes only", 0, "max", 100.0, found, synthetic=True)
    return weight_bytes(quantised(model, Quantisation(PrecisionPlan(cast("Format", precision)), ranges)))


def table(results: Mapping[str, Any]) -> Table:
    """Errors and memory, a row a precision."""
    columns = (
        "engine",
        "precision",
        "image tokens",
        "keys",
        "values",
        "actions",
        "median frame",
        "worst frame",
        "cosine",
        "weights, MB",
    )
    shown = Table(*columns, title=f"relative error against fp32, {results['frames']} real frames")
    for row in results["rows"]:
        relative, held = row["relative_error"], row["weight_bytes"]
        size = "" if held is None else f"{sum(held.values()) / 1e6:.1f}"
        cells = [f"{relative[stage]:.1e}" for stage in ("image_tokens", "keys", "values", "actions")]
        cells += [f"{row[name]:.1e}" for name in ("median_frame", "worst_frame")]
        shown.add_row(row["engine"], row["precision"], *cells, f"{row['cosine']:.5f}", size)
    return shown


if __name__ == "__main__":
    main()
