"""The engine "onnx" beside eager on a small policy, in one run: ticks in turns, stages, and what handing over costs.

    python benchmarks/onnx_engine.py                                    # checkpoints/pi05-libero-small, 2 threads
    python benchmarks/onnx_engine.py --checkpoint DIR --rounds 50
    python benchmarks/onnx_engine.py --device cuda                      # float32 and sixteen bits, beside graphed

Real LIBERO frames (tests/data/libero_frames.npz) through the policy's transforms. Every round runs each engine once, so
that a busy machine is busy for all of them; ratios are of medians. Also how far the actions are from eager's.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turbopi import ModelInput, load_model, load_policy
from turbopi.bench import summary, write_receipt
from turbopi.checkpoint import open_checkpoint
from turbopi.engine import STAGES, DescribedEngine, Engine, MixedEngine, create_engine, sample_actions
from turbopi.export import ExportSpec, export, weights_of_checkpoint, weights_of_model
from turbopi.quant import Calibration, PrecisionPlan, Quantisation, model_hash
from turbopi.quant.observe import input_ranges, watch

ROOT = Path(__file__).parents[1]
MIXED = tuple(
    ",".join(f"{stage}={'onnx' if stage == chosen else 'eager'}" for stage in ("vision", "prefill", "denoise"))
    for chosen in ("vision", "prefill", "denoise")
)
Observed = tuple[ModelInput, Tensor]


def observed(checkpoint: Path, count: int) -> list[Observed]:
    """Frames as the model takes them, each with noise."""
    transforms = load_policy(checkpoint, device="cpu").transforms
    z = np.load(ROOT / "tests" / "data" / "libero_frames.npz")
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(min(count, len(z["state"]))):
        frame = {
            "observation/image": z["agentview"][i][::-1, ::-1],
            "observation/wrist_image": z["wrist"][i][::-1, ::-1],
            "observation/state": z["state"][i],
            "prompt": str(z["prompt"][i]),
        }
        arrays, _ = transforms.inputs(frame)
        inputs = ModelInput(**{name: torch.from_numpy(np.asarray(value))[None] for name, value in vars(arrays).items()})
        shape = (1, transforms.config.horizon, transforms.config.action_dim)
        found.append((inputs, torch.randn(shape, generator=generator)))
    return found


def cpu_engines(checkpoint: Path, frames: list[Observed], steps: int) -> dict[str, Engine]:
    """Eager, onnx in float32 and int8, and one stage of each kind moved to onnx."""
    model = load_model(checkpoint)
    held = load_model(checkpoint, dtype=torch.bfloat16)
    ranges = input_ranges(watch(held, iter(frames), steps), "max", 100.0)
    calibration = Calibration(model_hash(held), "libero", "the timed frames", len(frames), "max", 100.0, ranges)
    made = {name: create_engine(name, model, "fp32") for name in ("eager", "onnx", *MIXED)}
    made["onnx int8"] = create_engine("onnx", held, "int8", Quantisation(PrecisionPlan("int8"), calibration))
    return made


def gpu_engines(checkpoint: Path, frames: list[Observed], steps: int) -> dict[str, Engine]:
    """Eager and its graphs beside onnx, in float32 and in sixteen bits."""
    exact, held = (load_model(checkpoint, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    made = {name: create_engine(name, exact, "fp32") for name in ("eager", "graphed", "onnx")}
    made |= {f"{name} bf16": create_engine(name, held, "bf16") for name in ("graphed", "onnx")}
    views = int(frames[0][0].image_mask.sum())
    longest = max(int(inputs.token_mask.sum()) for inputs, _ in frames)
    spec = ExportSpec(precision="fp16", steps=steps, views=views, prompt_buckets=(-(-longest // 16) * 16,))
    with tempfile.TemporaryDirectory() as folder:
        export(weights_of_model(held), spec, Path(folder))
        made["onnx fp16"] = create_engine(f"onnx:{folder}", held, "bf16")
        run_all({"onnx fp16": made["onnx fp16"]}, frames, steps)  # opens its graphs while they are there
    return made


def run_all(made: Mapping[str, Engine], frames: list[Observed], steps: int) -> None:
    """Every frame through every engine, which may open, compile or capture what it needs."""
    for engine in made.values():
        for inputs, noise in frames:
            sample_actions(engine, inputs, noise, steps)
            stages(engine, inputs, noise, steps)


def stages(engine: Engine, inputs: ModelInput, noise: Tensor, steps: int) -> list[float]:
    """Milliseconds of each stage of a tick."""
    times = [time.perf_counter()]

    def timed(work: Callable[[], Any]) -> Any:
        result = work()
        engine.synchronize()
        times.append(time.perf_counter())
        return result

    tokens = timed(lambda: engine.encode_images(inputs.images, inputs.image_mask))
    cache = timed(lambda: engine.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask))
    timed(lambda: engine.denoise(cache, inputs.state, noise, steps))
    return [1e3 * (b - a) for a, b in itertools.pairwise(times)]


def measure(checkpoint: Path, device: str, rounds: int, steps: int, count: int) -> dict[str, Any]:
    """Times of whole ticks and of stages, how far actions are apart, and whether a frame has the same bits again."""
    frames = observed(checkpoint, count)
    made = (cpu_engines if device == "cpu" else gpu_engines)(checkpoint, frames, steps)
    run_all(made, frames, steps)
    firsts = {name: sample_actions(engine, *frames[0], steps) for name, engine in made.items()}
    ticks: dict[str, list[float]] = {name: [] for name in made}
    parts: dict[str, list[list[float]]] = {name: [] for name in made}
    apart = dict.fromkeys(made, 0.0)
    for turn in range(rounds):
        inputs, noise = frames[turn % len(frames)]
        truth = None
        for name, engine in made.items():
            start = time.perf_counter()
            actions = sample_actions(engine, inputs, noise, steps)
            ticks[name].append(1e3 * (time.perf_counter() - start))
            truth = actions if truth is None else truth
            apart[name] = max(apart[name], float((actions - truth).abs().max() / truth.abs().max()))
            parts[name].append(stages(engine, inputs, noise, steps))
    medians = {name: float(np.median(values)) for name, values in ticks.items()}
    return {
        "checkpoint_hash": weights_of_checkpoint(open_checkpoint(checkpoint)).hash,
        "prompt_tokens": [int(inputs.token_mask.sum()) for inputs, _ in frames],
        "ratio_to_eager": {name: value / medians["eager"] for name, value in medians.items()},
        "actions_max_relative_to_eager": apart,
        "same_bits_at_the_end": {
            name: torch.equal(sample_actions(engine, *frames[0], steps), firsts[name]) for name, engine in made.items()
        },
        "engines": {name: engine.describe() for name, engine in made.items() if isinstance(engine, DescribedEngine)},
        "tick": {name: summary(values, keep=200) for name, values in ticks.items()},
        "stages_median_ms": {
            name: dict(zip(STAGES, np.median(values, axis=0).tolist(), strict=True)) for name, values in parts.items()
        },
        "hand_over_ms": {
            name: engine.describe()["hand_over_ms"] for name, engine in made.items() if isinstance(engine, MixedEngine)
        },
    }


def main() -> int:
    """Measure and write the receipt; 0 if onnx is not slower than eager."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "pi05-libero-small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/onnx_engine_cpu.json, or _cuda.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = arguments.checkpoint, arguments.device, arguments.rounds, arguments.steps, arguments.frames
    results = measure(*given)
    for name, ratio in results["ratio_to_eager"].items():
        parts = ", ".join(f"{ms:.2f}" for ms in results["stages_median_ms"][name].values())
        print(f"{name:40s} {results['tick'][name]['median_ms']:8.2f} ms  {ratio:5.2f} of eager  stages {parts}")
    config = {key: str(value) for key, value in vars(arguments).items()}
    out = arguments.out or ROOT / "benchmarks" / "results" / f"onnx_engine_{arguments.device}.json"
    print(write_receipt(out, "engine onnx beside eager", results, config))
    return 0 if results["ratio_to_eager"]["onnx"] <= 1.0 else 1


if __name__ == "__main__":
    sys.exit(main())
