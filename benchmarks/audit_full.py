"""The audit of one frame of the full-size model on a GPU, and how long it takes.

    python benchmarks/audit_full.py --candidate turbo:bf16
    python benchmarks/audit_full.py --candidate turbo:fp8
    python benchmarks/audit_full.py --candidate turbo-twins:bf16 --preset pi05-tiny --device cpu   # a try without a GPU

Weights are hash weights, the observation is random with the shape of a workload: this certifies arithmetic and time, no
policy. fp8, int8 and nvfp4 are calibrated on noise here. The receipt has the GPU memory that it took, and the seconds
of every part: "all" is the audit itself; "loading" (models, calibration) and "compiling" (everything once, so that all
kernels are there) come before it and are not counted. It is one of `turbo-pi audit`, with an HTML page beside it.
Exit status 1 if an operation is over budget, a check fails, or the audit takes more than 60 s.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from turbopi import Pi0, preset
from turbopi.audit.checks import Told
from turbopi.audit.golden import hash_model
from turbopi.audit.sample import Sample
from turbopi.audit.session import AuditOptions, audit, full_float32
from turbopi.audit.subjects import Pair, SubjectName, make_pair, parse_subject
from turbopi.bench import workload, write_receipt
from turbopi.bench.workloads import observation
from turbopi.checkpoint.load import build_model
from turbopi.cli.audit import is_clean, summary
from turbopi.engine import precision_dtype
from turbopi.policy import choose_device
from turbopi.quant import Calibration, PrecisionPlan, Quantisation
from turbopi.quant.calibrate import calibrate
from turbopi.quant.observe import synthetic_batches
from turbopi.report import write_audit_report

RESULTS = Path(__file__).parent / "results"
SEED = 7
ALLOWED_S = 60.0
NOISE_FRAMES = 8


@dataclass(frozen=True)
class Options:
    """What to audit."""

    candidate: str = "turbo:bf16"
    """ENGINE:PRECISION."""
    preset: str = "pi05"
    """Sizes of the model."""
    workload: str = "libero"
    """Shape of the observation."""
    steps: int = 10
    """Flow-matching evaluations."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    every_layer: bool = False
    """Take every layer apart, which takes longer than 60 s."""
    out: Path | None = None
    """The receipt; by default benchmarks/results/audit_<preset>_<engine>_<precision>.json."""


def quantisation_of(name: SubjectName, model: Pi0, steps: int) -> Quantisation | None:
    """A plan without exceptions, calibrated on noise where it needs that; None for bf16 and fp32."""
    if name.precision in ("fp32", "bf16"):
        return None
    plan = PrecisionPlan(name.precision)  # type: ignore[arg-type]
    calibration: Calibration | None = None
    if plan.needs_calibration(model.config):
        batches = synthetic_batches(model.config, NOISE_FRAMES)
        calibration, _ = calibrate(model, batches, robot="libero", source="noise", steps=steps, synthetic=True)
    return Quantisation(plan, calibration)


def first_runs(pair: Pair, sample: Sample) -> None:
    """Everything that is compiled, loaded or captured when it first runs."""
    for subject in (pair.candidate, pair.plain):
        subject.run(sample, lambda name, value: None)
    pair.candidate.run(sample, Told())
    if pair.deployed is not None:
        pair.deployed.sample_actions(sample.inputs, sample.noise, sample.steps)


def now(device: torch.device) -> float:
    """The time at which everything asked for so far has been computed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> int:
    """Load, audit, print, write the receipt and its page."""
    options = tyro.cli(Options, description=__doc__)
    device, shape = torch.device(choose_device(options.device)), workload(options.workload)
    name, console = parse_subject(options.candidate, device.type), Console(soft_wrap=True)
    config = shape.fit(preset(options.preset))
    begin = time.perf_counter()
    reference = hash_model(config, SEED, torch.float32, device)
    held = reference.state_dict()
    dtype = precision_dtype(name.precision)
    model = build_model(config, device, dtype, lambda key, kept: kept.copy_(held[key]))
    with full_float32(), torch.no_grad():
        pair = make_pair(name, model, reference, quantisation_of(name, model, options.steps))
        sample = Sample(*observation(config, shape, 1), options.steps, f"random, {shape.name}")
        loaded = now(device)
        first_runs(pair, sample)
        compiled = now(device)
        settings = AuditOptions(every_layer=options.every_layer)
        with Console(stderr=True).status("") as status:
            results = audit(pair, reference, [sample], settings, status.update)
    seconds = now(device) - compiled
    took = {"all": seconds, "loading": loaded - begin, "compiling": compiled - loaded}
    results["seconds"] |= {part: round(value, 2) for part, value in took.items()}
    if device.type == "cuda":
        results["gpu_memory_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    out = options.out or RESULTS / f"audit_{options.preset}_{name.engine}_{name.precision}.json"
    facts = {"weights": "hash", "seed": SEED, "model": config.to_dict()}
    written = {**dataclasses.asdict(options), "out": out.name, "device": str(device), **facts}
    path = write_receipt(out, "audit", results, written)
    for part in summary(results):
        console.print(part, highlight=False)
    console.print("seconds: " + ", ".join(f"{part} {value:g}" for part, value in results["seconds"].items()))
    console.print(f"{seconds:.1f} s, at most {ALLOWED_S:g}; wrote {path} and {write_audit_report(path)}")
    return 0 if is_clean(results) and seconds <= ALLOWED_S else 1


if __name__ == "__main__":
    sys.exit(main())
