"""How far the exported ONNX graphs are from the reference, tap by tap, in ONNX Runtime on the CPU.

    python benchmarks/onnx_parity.py                                   # the tiny and long fixtures, float32, all ways
    python benchmarks/onnx_parity.py --precisions                      # fp16, fp8-qdq, int8-qdq on the small policy
    python benchmarks/onnx_parity.py --full --work /tmp/onnx-full      # 3.3 billion parameters, about 40 GB of disk

`--full` makes hash weights one by one, exports them, and runs one stage at a time, each in a process of its own, so
that 24 GiB of memory suffice; it also tells the largest memory of each process. Writes a receipt beside the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_engine import observed

from turbopi import load_model
from turbopi.audit.golden import open_golden
from turbopi.bench import write_receipt
from turbopi.checkpoint.hashweights import hash_integers, hash_normal, hash_parameter, hash_tensor
from turbopi.config import ModelConfig, preset
from turbopi.export import QDQ, ExportSpec, Manifest, export, hashed_weights
from turbopi.export.proof import Reference, TapReading, prove, reading, reference, run
from turbopi.export.surgery import expose, inject
from turbopi.model import ModelInput, Pi0
from turbopi.quant import Calibration, PrecisionPlan, Quantisation, model_hash, quantised
from turbopi.quant.observe import input_ranges, watch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SEED = 7
STAGE_PARTS = {"vision": ("vision.", "projector."), "prefill": ("vlm.",)}
ALLOWED, ALLOWED_FULL = 1e-4, 1e-3


def worst(readings: list[TapReading]) -> dict[str, Any]:
    """By graph and way: how many taps, and the worst of them by both measures."""
    rows: dict[str, Any] = {}
    for key in dict.fromkeys((r.graph, r.way) for r in readings):
        own = [r for r in readings if (r.graph, r.way) == key]
        relative, largest = max(own, key=lambda r: r.relative), max(own, key=lambda r: r.max_relative)
        rows[" ".join(key)] = {
            "taps": len(own),
            "worst_relative": relative.relative,
            "worst_tap": relative.tap,
            "worst_max_relative": largest.max_relative,
            "actions_max_relative": next((r.max_relative for r in own if r.tap == "actions"), None),
        }
    return rows


def fixtures(attentions: tuple[str, ...]) -> dict[str, Any]:
    """Every float32 record's configuration, weights and first observation."""
    rows = []
    for path in sorted(p for size in ("tiny", "long") for p in (ROOT / "tests" / "data" / size).glob("*_f32*")):
        golden = open_golden(path)
        model = golden.build(invalid_tokens="dropped")
        inputs, noise = golden.inputs()
        one = dataclasses.replace(
            inputs, **{f.name: getattr(inputs, f.name)[:1] for f in dataclasses.fields(ModelInput)}
        )
        slots = -(-int(one.token_mask.sum()) // 16) * 16
        for attention in attentions:
            spec = ExportSpec(steps=golden.steps, prompt_buckets=(slots,), attention=attention)  # type: ignore[arg-type]
            rows.append({"record": path.stem, "attention": attention} | worst(prove(model, one, noise[:1], spec)))
            print(json.dumps(rows[-1]), flush=True)
    largest = max(row[key]["worst_relative"] for row in rows for key in row if " " in key)
    return {"allowed_relative": ALLOWED, "worst_relative": largest, "holds": largest <= ALLOWED, "rows": rows}


def precisions(checkpoint: Path) -> dict[str, Any]:
    """Lower precisions on a real policy and a real frame: against float32, and against the quantised reference.

    The yardstick "simulated" is how far the quantised reference itself is from float32.
    """
    frames = observed(checkpoint, 8)
    inputs, noise = frames[0]
    model = load_model(checkpoint)
    ranges = input_ranges(watch(model, iter(frames[1:]), 10), "max", 100.0)
    calibration = Calibration(model_hash(model), "libero", "7 frames", len(frames) - 1, "max", 100.0, ranges)
    rows: dict[str, Any] = {}
    slots = -(-int(inputs.token_mask.sum()) // 16) * 16
    for precision in ("fp16", "fp8-qdq", "int8-qdq"):
        spec = ExportSpec(precision=precision, prompt_buckets=(slots,))
        asked = None
        if precision in QDQ:
            asked = Quantisation(PrecisionPlan(QDQ[precision]), calibration)
        rows[precision] = {"against float32": worst(prove(model, inputs, noise, spec, asked))}
        if asked is not None:
            simulated = quantised(model, asked)
            readings = prove(simulated, inputs, noise, spec, asked, exported=model)
            truth, itself = (m.sample_actions(inputs, noise, spec.steps).numpy() for m in (model, simulated))
            found = reading("whole", "free", "actions", itself, truth)
            rows[precision] |= {
                "against the quantised reference": worst(readings),
                "simulated": dataclasses.asdict(found),
            }
        print(precision, json.dumps(rows[precision]), flush=True)
    return {"holds": True, "checkpoint": checkpoint.name, "rows": rows}


def observation(config: ModelConfig, views: int, prompt: int) -> tuple[ModelInput, torch.Tensor]:
    """One, made by hashes: `views` cameras and `prompt` tokens that are there."""
    size = config.vision.image_size
    inputs = ModelInput(
        images=hash_tensor("images", (1, config.cameras, 3, size, size), SEED),
        image_mask=torch.arange(config.cameras)[None] < views,
        tokens=hash_integers("tokens", (1, config.max_tokens), SEED, 3, config.vocab_size),
        token_mask=torch.arange(config.max_tokens)[None] < prompt,
        state=hash_tensor("state", (1, config.state_dim), SEED),
    )
    return inputs, hash_normal("noise", (1, config.horizon, config.action_dim), SEED)


def partial_model(config: ModelConfig, wanted: Callable[[str], bool]) -> Pi0:
    """A reference that has only some of its weights."""
    with torch.device("meta"):
        model = Pi0(config).eval()
    for name, parameter in list(model.named_parameters()):
        if wanted(name):
            module, _, leaf = name.rpartition(".")
            made = hash_parameter(name, tuple(parameter.shape), SEED)
            setattr(model.get_submodule(module), leaf, torch.nn.Parameter(made, requires_grad=False))
    return model


def step_reference(arguments: argparse.Namespace, stage: str) -> dict[str, Any]:
    """One stage of the reference, fed with the stage before; what it read and wrote goes into files."""
    config = preset(arguments.preset)
    parts = STAGE_PARTS.get(stage)
    known = tuple(part for own in STAGE_PARTS.values() for part in own)
    model = partial_model(config, lambda name: name.startswith(parts) if parts else not name.startswith(known))
    inputs, noise = observation(config, arguments.views, arguments.prompt)
    before = {"prefill": "vision", "denoise": "prefill"}.get(stage)
    given = None if before is None else dict(np.load(arguments.work / f"{before}.feeds.npz"))
    start = time.perf_counter()
    found = reference(model, inputs, noise, arguments.steps, arguments.bucket, stage, given)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    np.savez(arguments.work / f"{stage}.feeds.npz", **found.feeds)
    np.savez(arguments.work / f"{stage}.taps.npz", **found.taps)
    return {"seconds": seconds}


def step_prove(arguments: argparse.Namespace, stage: str) -> dict[str, Any]:
    """One exported stage graph, its taps made outputs, against the reference's files."""
    out = arguments.work / "export"
    info = Manifest.load(out).find(stage, 0 if stage == "vision" else arguments.bucket)
    expected = Reference(
        dict(np.load(arguments.work / f"{stage}.feeds.npz")), dict(np.load(arguments.work / f"{stage}.taps.npz"))
    )
    readings: list[TapReading] = []
    seconds = {}
    for way in ("forced", "stage") if stage == "denoise" else ("forced",):
        model = ir.load(out / info.file)
        inside = {value.name for node in model.graph for value in node.outputs}
        taps = [tap for tap in expected.taps if tap in inside]
        feeds = dict(expected.feeds)
        if stage == "denoise" and way == "forced":
            given = [tap for tap in taps if tap.endswith(".x_t")]
            inject(model, given)
            feeds |= {f"given.{tap}": expected.taps[tap] for tap in given}
        expose(model, taps)
        ir.save(model, out / f"proof_{way}_{info.file}")
        start = time.perf_counter()
        outputs = run(out / f"proof_{way}_{info.file}", feeds, arguments.threads)
        seconds[way] = time.perf_counter() - start
        readings += [reading(stage, way, tap, outputs[tap], expected.taps[tap]) for tap in taps]  # type: ignore[arg-type]
    return {"seconds": seconds, "worst": worst(readings)}


def step_export(arguments: argparse.Namespace, stage: str) -> dict[str, Any]:
    """The stage graphs, weights made one by one while they are written."""
    weights = hashed_weights(preset(arguments.preset), SEED)
    spec = ExportSpec(views=arguments.views, prompt_buckets=(arguments.bucket,), steps=arguments.steps)
    start = time.perf_counter()
    manifest = export(weights, spec, arguments.work / "export")
    return {
        "seconds": time.perf_counter() - start,
        "weight_bytes": {name: file.bytes for name, file in manifest.files.items()},
        "graph_bytes": {graph.file: graph.bytes for graph in manifest.graphs},
    }


def step_free(arguments: argparse.Namespace, stage: str) -> dict[str, Any]:
    """The exported stages one after the other, fed by each other alone, against the reference's own chain."""
    out = arguments.work / "export"
    manifest = Manifest.load(out)
    feeds = dict(np.load(arguments.work / "vision.feeds.npz"))
    start = time.perf_counter()
    for graph in manifest.order:
        feeds |= run(
            out / manifest.find(graph, 0 if graph == "vision" else arguments.bucket).file, feeds, arguments.threads
        )
    readings = []
    for graph in manifest.order:
        taps = dict(np.load(arguments.work / f"{graph}.taps.npz"))
        readings += [reading(graph, "free", tap, feeds[tap], taps[tap]) for tap in taps if tap in feeds]  # type: ignore[arg-type]
    return {"seconds": time.perf_counter() - start, "worst": worst(readings)}


STEPS = {"export": step_export, "reference": step_reference, "prove": step_prove, "free": step_free}


def child(arguments: argparse.Namespace, step: str, stage: str) -> dict[str, Any]:
    """A step in a process of its own, and the most memory that it held."""
    command = [sys.executable, __file__, *sys.argv[1:], "--step", step, "--stage", stage]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(said.splitlines()[-1])
    print(step, stage, json.dumps(result), flush=True)
    return result


def full(arguments: argparse.Namespace) -> dict[str, Any]:
    """Export, then reference and graph of each stage in turn."""
    results: dict[str, Any] = {"export": child(arguments, "export", "all")}
    for stage in ("vision", "prefill", "denoise"):
        results[stage] = {step: child(arguments, step, stage) for step in ("reference", "prove")}
    results["free"] = child(arguments, "free", "all")
    told = [results[stage]["prove"]["worst"] for stage in ("vision", "prefill", "denoise")]
    rows = {key: row for worst_of in (*told, results["free"]["worst"]) for key, row in worst_of.items()}
    largest = max(row["worst_relative"] for row in rows.values())
    return {"allowed_relative": ALLOWED_FULL, "worst_relative": largest, "holds": largest <= ALLOWED_FULL, **results}


def main() -> int:
    """Measure and write the receipt; 0 if every tap is as close as allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="full size, stage by stage")
    parser.add_argument("--precisions", action="store_true", help="fp16, fp8-qdq and int8-qdq on a small policy")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "pi05-libero-small")
    parser.add_argument("--work", type=Path, default=Path("/tmp/onnx-full"), help="where --full keeps its files")
    parser.add_argument("--preset", default="pi05")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=40, help="valid prompt tokens")
    parser.add_argument("--bucket", type=int, default=48, help="prompt slots")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", choices=STEPS, help="of --full, in this process")
    parser.add_argument("--stage")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.step:
        arguments.work.mkdir(parents=True, exist_ok=True)
        result = STEPS[arguments.step](arguments, arguments.stage)
        print(json.dumps({**result, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return 0
    if arguments.full:
        results, name = full(arguments), f"onnx_parity_{arguments.preset}.json"
    elif arguments.precisions:
        results, name = precisions(arguments.checkpoint), "onnx_precisions.json"
    else:
        results, name = fixtures(("explicit", "fused")), "onnx_parity.json"
    config = {key: str(value) for key, value in vars(arguments).items()}
    print(write_receipt(arguments.out or RESULTS / name, "ONNX graphs against the reference", results, config))
    return 0 if results["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
