"""What dropping invalid tokens saves: both treatments on the same observation, alternating, in one run.

    python benchmarks/dropped_vs_masked.py                           # seconds
    python benchmarks/dropped_vs_masked.py --full --repeats 2        # π0.5's real size: 16 GiB, minutes

Two cameras of three and a prompt of 40 tokens in 200 slots, float32. Without --full the model has the geometry of
π0.5 (224 px, 256 tokens a camera, 200 prompt slots) at a smaller width. The receipts go to benchmarks/results/.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console

from turbopi import ModelConfig, ModelInput, preset
from turbopi.audit.golden import hash_model
from turbopi.bench import summary, write_receipt
from turbopi.config import GemmaConfig, VisionConfig

PROMPT_TOKENS = 40
SMALLER = ModelConfig(
    kind="pi05",
    vision=VisionConfig(width=288, depth=6, mlp_dim=1076, heads=4),
    vlm=GemmaConfig(width=512, depth=6, mlp_dim=4096, heads=8, kv_heads=1, head_dim=64),
    expert=GemmaConfig(width=256, depth=6, mlp_dim=1024, heads=8, kv_heads=1, head_dim=64),
    vocab_size=1024,
    horizon=10,
    max_tokens=200,
)


@dataclass(frozen=True)
class Options:
    """How to measure."""

    repeats: int = 10
    """Pairs of timed calls."""
    steps: int = 10
    """Flow-matching evaluations."""
    threads: int = 2
    """CPU threads."""
    full: bool = False
    """Time π0.5 in its real size."""


def observation(config: ModelConfig) -> tuple[ModelInput, torch.Tensor]:
    """One observation with two cameras of three and 40 valid prompt tokens, and noise."""
    g = torch.Generator().manual_seed(0)
    size = config.vision.image_size
    token_mask = torch.arange(config.max_tokens)[None] < PROMPT_TOKENS
    inputs = ModelInput(
        images=torch.rand(1, 3, 3, size, size, generator=g) * 2 - 1,
        image_mask=torch.tensor([[True, True, False]]),
        tokens=torch.randint(3, config.vocab_size, (1, config.max_tokens), generator=g) * token_mask,
        token_mask=token_mask,
        state=torch.zeros(1, 32),
    )
    return inputs, torch.randn(1, config.horizon, config.action_dim, generator=g)


def main() -> None:
    """Measure, report, write the receipt."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    config = replace(preset("pi05"), horizon=10) if options.full else SMALLER
    inputs, noise = observation(config)
    model = hash_model(config, 7, torch.float32)
    configs = {way: replace(config, invalid_tokens=way) for way in ("masked", "dropped")}
    actions: dict[str, torch.Tensor] = {}
    samples: dict[str, list[float]] = {way: [] for way in configs}
    for repeat in range(options.repeats + 1):
        for way in configs:
            model.config = configs[way]  # the same weights both ways
            start = time.perf_counter()
            actions[way] = model.sample_actions(inputs, noise, options.steps)
            if repeat > 0:  # the first pair warms up
                samples[way].append(1e3 * (time.perf_counter() - start))
    difference = float((actions["dropped"] - actions["masked"]).norm() / actions["masked"].norm())
    results = {way: summary(values) for way, values in samples.items()}
    speedup = results["masked"]["median_ms"] / results["dropped"]["median_ms"]
    console = Console()
    console.print(
        f"masked {results['masked']['median_ms']:.0f} ms, dropped {results['dropped']['median_ms']:.0f} ms: "
        f"{speedup:.2f}× faster; actions differ by {difference:.1e} relative"
    )
    write_receipt(
        Path(__file__).parent / "results" / f"dropped_vs_masked{'_full' if options.full else ''}.json",
        "dropped against masked invalid tokens, float32",
        results | {"speedup": speedup, "actions_relative_difference": difference},
        {"model": config.to_dict(), "prompt_tokens": PROMPT_TOKENS, "cameras": 2, "steps": options.steps},
    )


if __name__ == "__main__":
    main()
