"""How far the turbo engine is from the reference in float32, next to plain bf16 PyTorch: stage by stage, layer by
layer, step by step.

    python benchmarks/turbo_parity.py

Two models: π0.5 at full size with hash weights and the `libero` workload, and `pi05-libero-small` on frames of LIBERO.
Two truths, both float32 on the same device: "exact", with the weights as they are, and "arithmetic", with weights
rounded to bf16, so that only the rounding of what is computed counts (one truth, where the weights are bf16 anyway).
Two chains: a "tick", in which each stage reads what the stage before it made, so that errors grow; and "stage", in
which each reads what the truth made before it.
Errors are relative: the root of the summed squares of differences over that of the truth, all samples together.
Exit status 1 if turbo's is more than 1.2 times plain's anywhere.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from turbopi import ModelInput, Pi0, load_model, load_policy, preset
from turbopi.bench import WORKLOADS, write_receipt
from turbopi.bench.contenders import hash_weights
from turbopi.bench.workloads import observation
from turbopi.checkpoint.load import build_model
from turbopi.engine import EagerEngine, Engine, Precision, TurboEngine
from turbopi.engine.capture import CudaGraphRecorder
from turbopi.engine.turbo.checks import check_device
from turbopi.engine.turbo.denoise import Schedules
from turbopi.engine.turbo.ops import triton_ops, twin_ops
from turbopi.kernels.tuning import gpu_file
from turbopi.model import PrefixCache
from turbopi.policy import choose_device
from turbopi.quant.fold import Affine, Schedule

ROOT = Path(__file__).parents[1]
ALLOWED = 1.2
"""How many times plain PyTorch's error turbo's may be."""
SEED = 7
Chain = Literal["tick", "stage"]
Sample = tuple[ModelInput, Tensor]


@dataclass(frozen=True)
class Options:
    """What to compare."""

    presets: tuple[str, ...] = ("pi05",)
    """Models with hash weights, on random observations."""
    checkpoints: tuple[Path, ...] = (ROOT / "checkpoints" / "pi05-libero-small",)
    """Trained models, on frames."""
    frames: Path = ROOT / "tests" / "data" / "libero_frames.npz"
    """Of LIBERO: agentview, wrist, state, prompt."""
    workload: str = "libero"
    """Shape of the random observations."""
    samples: int = 8
    """Observations a model."""
    steps: int = 10
    """Flow-matching evaluations."""
    device: str = "auto"
    """Without a GPU, turbo runs with its twins."""
    out: Path | None = None
    """The receipt; by default benchmarks/results/turbo_parity_<gpu>.json."""

    def __post_init__(self) -> None:
        if min(self.samples, self.steps) < 1:
            raise ValueError(f"samples and steps must be at least 1, got {self.samples} and {self.steps}")
        if self.workload not in WORKLOADS:
            raise ValueError(f"unknown workload {self.workload!r}; known: {', '.join(WORKLOADS)}")


# What runs


class FirstSteps(Schedules):
    """Asked for `steps`, the first that many of a schedule of `total`, so that a loop stops on the way."""

    def __init__(self, model: Pi0, total: int) -> None:
        super().__init__(model)
        self._total = total

    def __call__(self, steps: int) -> Schedule:
        """The schedule's beginning; its output is still scaled by -1/total."""
        if not 1 <= steps <= self._total:
            raise ValueError(f"a schedule of {self._total} steps has no beginning of {steps}")
        whole = super().__call__(self._total)
        into, modulation = whole.action_in, whole.modulation
        return Schedule(
            Affine(into.weight, into.bias[:steps]),
            None if modulation is None else modulation[:steps],
            whole.action_out,
        )


def precision_of(model: Pi0) -> Precision:
    """By the dtype of its weights."""
    return "fp32" if model.vlm.dtype == torch.float32 else "bf16"


class Subject(Protocol):
    """An engine that tells x_t after every step."""

    engine: Engine

    def x_ts(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> list[Tensor]:
        """(B,H,32) float32 after each of the steps; the last are the actions."""


class Reference:
    """`Pi0` through its taps."""

    def __init__(self, model: Pi0) -> None:
        self.engine = EagerEngine(model, precision_of(model))

    def x_ts(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> list[Tensor]:
        """See `Subject`."""
        with self.engine.model.taps() as taps:
            actions = self.engine.denoise(cache, state, noise, steps)
        return [*(taps[f"step{step}.x_t"] for step in range(1, steps)), actions]


class Turbo:
    """The turbo engine, with kernels and graphs on a GPU and with twins elsewhere. Its loop is run to each step."""

    def __init__(self, model: Pi0, steps: int) -> None:
        device = next(model.parameters()).device
        ops, recorder = twin_ops(), None
        if device.type == "cuda":
            check_device(device)
            ops, recorder = triton_ops(), CudaGraphRecorder(device)
        self.engine = TurboEngine(model, precision_of(model), ops, recorder, FirstSteps(model, steps))

    def x_ts(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int) -> list[Tensor]:
        """See `Subject`."""
        return [self.engine.denoise(cache, state, noise, count) for count in range(1, steps + 1)]


@dataclass(frozen=True, eq=False)
class Models:
    """The truths, and what is compared with them, on one device."""

    truths: Mapping[str, Reference]
    subjects: Mapping[str, Subject]


def make_models(exact: Pi0, rounded: Pi0, steps: int) -> Models:
    """From the same weights in float32 and in bf16. A checkpoint that holds bf16 has one truth: nothing was rounded."""
    truths, pairs = {"exact": Reference(exact)}, zip(exact.parameters(), rounded.parameters(), strict=True)
    if not all(torch.equal(whole, part.to(whole.dtype)) for whole, part in pairs):
        held = rounded.state_dict()
        device = next(rounded.parameters()).device
        arithmetic = build_model(rounded.config, device, torch.float32, lambda name, kept: kept.copy_(held[name]))
        truths["arithmetic"] = Reference(arithmetic)
    return Models(truths, {"plain": Reference(rounded), "turbo": Turbo(rounded, steps)})


# What it is run on


def hash_case(name: str, options: Options, device: torch.device) -> tuple[Models, list[Sample]]:
    """A preset with hash weights and random observations, one a seed."""
    shape = WORKLOADS[options.workload]
    config = shape.fit(preset(name))
    exact, rounded = hash_weights(config, device, "fp32", SEED), hash_weights(config, device, "bf16", SEED)
    samples = [observation(config, shape, 1, seed) for seed in range(options.samples)]
    return make_models(exact, rounded, options.steps), samples


def checkpoint_case(path: Path, options: Options, device: torch.device) -> tuple[Models, list[Sample]]:
    """A trained LIBERO policy and frames, spread over the file."""
    policy = load_policy(path, robot="libero", device=str(device), precision="fp32")
    rounded = load_model(path, device=str(device), dtype=torch.bfloat16)
    frames = np.load(options.frames)
    if options.samples > len(frames["state"]):
        raise ValueError(f"{options.frames} holds {len(frames['state'])} frames, {options.samples} were asked for")
    samples = []
    for sample, frame in enumerate(np.linspace(0, len(frames["state"]) - 1, options.samples).astype(int)):
        # The simulator draws upside down.
        arrays, _ = policy.transforms.inputs(
            {
                "observation/image": frames["agentview"][frame][::-1, ::-1],
                "observation/wrist_image": frames["wrist"][frame][::-1, ::-1],
                "observation/state": frames["state"][frame],
                "prompt": str(frames["prompt"][frame]),
            }
        )
        inputs = ModelInput(
            **{f.name: torch.from_numpy(np.asarray(getattr(arrays, f.name)))[None] for f in fields(ModelInput)}
        )
        shape = (1, rounded.config.horizon, rounded.config.action_dim)
        samples.append((inputs, torch.randn(shape, generator=torch.Generator().manual_seed(sample))))
    engine = policy.engine
    assert isinstance(engine, EagerEngine)
    return make_models(engine.model, rounded, options.steps), samples


# Comparing


@dataclass(frozen=True, eq=False)
class Trace:
    """What one subject made of one sample: taps by name, and what the next stage reads, on the device."""

    taps: dict[str, Tensor]
    tokens: Tensor
    cache: PrefixCache


def trace(subject: Subject, sample: Sample, steps: int, given: Trace | None = None) -> Trace:
    """Run the stages; with `given`, each on what stands there instead of on what the stage before made."""
    (x, noise), engine = sample, subject.engine
    tokens = engine.encode_images(x.images, x.image_mask)
    fed = tokens if given is None else given.tokens.to(tokens.dtype)
    cache = engine.prefill(fed, x.image_mask, x.tokens, x.token_mask)
    taps = {"image_tokens": tokens[x.image_mask.to(tokens.device)].clone()}
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        taps |= {f"k{layer:02d}": keys.clone(), f"v{layer:02d}": values.clone()}
    read = cache if given is None else copied(given.cache, cache.keys[0].dtype)
    for step, x_t in enumerate(subject.x_ts(read, x.state, noise, steps), start=1):
        taps[f"x_t after {step:02d}"] = x_t
    return Trace(taps, tokens.clone(), copied(cache, cache.keys[0].dtype))


def copied(cache: PrefixCache, dtype: torch.dtype) -> PrefixCache:
    """A copy that belongs to nobody."""
    keys, values = (tuple(t.to(dtype, copy=True) for t in tensors) for tensors in (cache.keys, cache.values))
    return PrefixCache(keys, values, cache.lengths.clone(), cache.valid)


class Errors:
    """Summed squares of differences and of the truth, by chain, tap and subject."""

    def __init__(self) -> None:
        self._sums: dict[tuple[Chain, str, str], np.ndarray] = {}

    def add(self, chain: Chain, subject: str, taps: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
        """One sample. Raises ValueError if the shapes differ."""
        for name, expected in truth.items():
            got = taps[name]
            if got.shape != expected.shape:
                raise ValueError(f"{subject}'s {name} is {tuple(got.shape)}, the truth's {tuple(expected.shape)}")
            difference = (got.double() - expected.double()).square().sum()
            sums = np.array([float(difference), float(expected.double().square().sum())])
            key = (chain, name, subject)
            self._sums[key] = self._sums.get(key, 0) + sums

    def lines(self) -> list[dict[str, Any]]:
        """A line a tap, in the order of computation: the relative error of each subject, and turbo's over plain's."""
        found: dict[tuple[Chain, str], dict[str, Any]] = {}
        for (chain, name, subject), (difference, whole) in self._sums.items():
            line = found.setdefault((chain, name), {"chain": chain, "tap": name})
            line[subject] = float(np.sqrt(difference / whole))
        return [line | {"ratio": line["turbo"] / line["plain"]} for line in found.values()]


@torch.no_grad()
def compare(models: Models, samples: Sequence[Sample], steps: int) -> dict[str, list[dict[str, Any]]]:
    """Every subject against every truth."""
    errors = {truth: Errors() for truth in models.truths}
    for sample in samples:
        own = {name: trace(subject, sample, steps).taps for name, subject in models.subjects.items()}
        for truth_name, truth in models.truths.items():
            expected = trace(truth, sample, steps)
            for name, subject in models.subjects.items():
                errors[truth_name].add("tick", name, own[name], expected.taps)
                alone = trace(subject, sample, steps, given=expected).taps
                errors[truth_name].add("stage", name, alone, expected.taps)
    return {truth: found.lines() for truth, found in errors.items()}


# Reporting


def tables(name: str, result: dict[str, list[dict[str, Any]]]) -> Iterator[Table]:
    """One for each truth: both chains side by side."""
    for truth, lines in result.items():
        table = Table(
            "tap", *(f"{chain}: {what}" for chain in ("tick", "stage") for what in ("plain", "turbo", "ratio"))
        )
        table.title = f"{name}: relative error against float32, {truth}"
        by_tap: dict[str, list[str]] = {}
        for line in lines:
            cells = by_tap.setdefault(line["tap"], [])
            cells += [f"{line['plain']:.2e}", f"{line['turbo']:.2e}", f"{line['ratio']:.2f}"]
        for tap, cells in by_tap.items():
            table.add_row(tap, *cells)
        yield table


def worst(cases: Mapping[str, Any]) -> dict[str, Any]:
    """The line with the largest ratio; one that is not a number counts as larger than all."""
    lines = [
        {"model": name, "truth": truth} | line
        for name, case in cases.items()
        for truth, found in case["errors"].items()
        for line in found
    ]
    return max(lines, key=lambda line: float("inf") if np.isnan(line["ratio"]) else line["ratio"])


def describe(models: Models, samples: Sequence[Sample]) -> dict[str, Any]:
    """What was run."""
    turbo = models.subjects["turbo"].engine
    assert isinstance(turbo, TurboEngine)
    prefix = [int(x.image_mask.sum()) * turbo.config.vision.tokens + int(x.token_mask.sum()) for x, _ in samples]
    return {"turbo": turbo.describe(), "config": turbo.config.to_dict(), "prefix_tokens": prefix}


def main() -> int:
    """Compare, print, write the receipt."""
    options = tyro.cli(Options, description=__doc__)
    device = torch.device(choose_device(options.device))
    # Float32 in full, in products and in the patch convolution.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    console, cases = Console(width=140), {}
    wanted = [(name, hash_case, name) for name in options.presets]
    for name, make, what in [*wanted, *((path.name, checkpoint_case, path) for path in options.checkpoints)]:
        models, samples = make(what, options, device)  # type: ignore[operator]
        errors = compare(models, samples, options.steps)
        cases[name] = {"errors": errors, **describe(models, samples)}
        for table in tables(name, errors):
            console.print(table)
    if not cases:
        raise ValueError("nothing to compare: name a preset or a checkpoint")
    most = worst(cases)
    gpu = gpu_file(device).stem if device.type == "cuda" else "cpu"
    out = options.out or Path(__file__).parent / "results" / f"turbo_parity_{gpu}.json"
    results = {"allowed_ratio": ALLOWED, "worst": most, "cases": cases}
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(options).items()
    }
    settings["checkpoints"] = [path.name for path in options.checkpoints]
    write_receipt(out, "turbo parity: error against float32, beside plain bf16", results, settings)
    where = f"{most['model']}, {most['truth']}, {most['chain']}, {most['tap']}"
    console.print(f"largest ratio of turbo's error to plain's: {most['ratio']:.3f} ({where}); allowed {ALLOWED}")
    return 0 if most["ratio"] <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
