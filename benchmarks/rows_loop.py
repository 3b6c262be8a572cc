"""The denoise loop of 17 to 64 rows: the fused loop beside the one that goes kernel by kernel.

    python benchmarks/rows_loop.py
    python benchmarks/rows_loop.py --tune
    python benchmarks/rows_loop.py --expert fp8 --out benchmarks/results/rows_loop_fp8.json

Error against float32, bits from run to run, time, and what each kernel of a layer is worth. Random weights of the
full-size expert, so that weights come from memory as they do in use. `--tune` measures the fused products in other
tiles, in the loop and one after another, and writes the best into the tuned file of this GPU.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from turbopi import kernels, preset
from turbopi.bench import write_receipt
from turbopi.bench.clock import StageClock
from turbopi.engine.capture import CudaGraphRecorder
from turbopi.engine.turbo.buckets import Bucket
from turbopi.engine.turbo.buffers import Buffers, DenoiseBuffers, RequestBuffers, build, denoise_specs
from turbopi.engine.turbo.denoise import RowsLoop, Schedules
from turbopi.engine.turbo.fused import FusedLoop
from turbopi.engine.turbo.graphs import ieee_float32
from turbopi.engine.turbo.ops import Ops, triton_ops, twin_ops
from turbopi.engine.turbo.weights import TurboWeights
from turbopi.kernels import E4M3, GemmConfig, tuning
from turbopi.quant.fold import Affine, FoldedExpert, FoldedGemmaBlock, FoldedState, Schedule
from turbopi.quant.fp8 import to_fp8_weight

DEVICE = torch.device("cuda")
WATCHED = {"row_qkv": "qkv", "row_parts": "", "row_geglu": "gate_up"}
LAYER = ("qkv", "attention", "out", "norms", "geglu", "down")


@dataclass(frozen=True)
class Options:
    """What to time."""

    kind: Literal["pi05", "pi0"] = "pi05"
    """Of the model."""
    horizon: int = 50
    """Actions; π0 has a row more."""
    batch: int = 1
    """Observations."""
    expert: Literal["bf16", "fp8"] = "bf16"
    """Format of the expert's products; inputs of fp8 ones are scaled by what one run in bf16 shows."""
    prefix: int = 968
    """Prefix tokens of each."""
    steps: int = 10
    """Flow-matching evaluations."""
    repeats: int = 30
    """Timed replays of a graph."""
    tune: bool = False
    """Try other tiles first, and write the best."""
    out: Path = Path(__file__).parent / "results" / "rows_loop.json"
    """The receipt."""


class Case:
    """Random weights, schedule, cache and noise of one shape, and buffers to work in."""

    def __init__(self, options: Options, steps: int, dtype: torch.dtype, amax: dict[str, float] | None = None) -> None:
        self._generator = torch.Generator(DEVICE).manual_seed(0)
        self.config = replace(preset(options.kind), horizon=options.horizon)
        self.steps = steps
        expert, draw = self.config.expert, self._draw
        inner, kv = expert.heads * expert.head_dim, expert.kv_heads * expert.head_dim
        query = torch.ones(inner + 2 * kv, 1, device=DEVICE)
        query[:inner] = expert.head_dim**-0.5
        blocks = []
        for _ in range(expert.depth):
            matrices = {
                "qkv": draw(inner + 2 * kv, expert.width) * query,
                "out": draw(expert.width, inner),
                "gate_up": draw(2 * expert.mlp_dim, expert.width),
                "down": draw(expert.width, expert.mlp_dim),
            }
            kept = {name: t.bfloat16().to(dtype) for name, t in matrices.items()}
            blocks.append(
                FoldedGemmaBlock(
                    **{name: t if amax is None else to_fp8_weight(t, amax[name]) for name, t in kept.items()}
                )
            )
        slots = options.prefix + self.config.suffix_tokens
        half = expert.head_dim // 2
        angles = torch.arange(slots, device=DEVICE)[:, None] / 10000 ** (torch.arange(half, device=DEVICE) / half)
        state = None
        if options.kind == "pi0":
            state = FoldedState(
                self._affine(expert.width, self.config.state_dim), self._affine(expert.width, expert.width)
            )
        known: dict[str, Any] = {"expert": FoldedExpert(tuple(blocks), state), "cos": angles.cos(), "sin": angles.sin()}
        known |= {"dtype": dtype, "vision_dtype": dtype, "vision": None, "prefix": None}
        # Of the other towers there is nothing here.
        self.weights = TurboWeights(**{f.name: known.get(f.name, ()) for f in fields(TurboWeights)})
        self.schedule = self._schedule(steps)
        size = (expert.depth, options.batch, expert.kv_heads, slots, expert.head_dim)
        keys, values = (torch.randn(size, generator=self._generator, device=DEVICE).bfloat16() for _ in range(2))
        bucket = Bucket(options.batch, self.config.cameras, self.config.max_tokens)
        specs = denoise_specs(self.config, bucket, dtype, fp8=amax is not None)
        denoise = build(DenoiseBuffers, lambda _, spec: torch.zeros(spec[0], dtype=spec[1], device=DEVICE), specs)
        prefill = SimpleNamespace(keys=keys.to(dtype), values=values.to(dtype))
        self.buffers = cast(Buffers, SimpleNamespace(prefill=prefill, denoise=denoise))
        actions = (options.batch, self.config.horizon, self.config.action_dim)
        self.noise = torch.randn(actions, generator=self._generator, device=DEVICE)
        lengths = torch.full((options.batch,), options.prefix, dtype=torch.int32, device=DEVICE)
        tokens = {"lengths": lengths, "noise": self.noise, "state": draw(options.batch, self.config.state_dim)}
        self.request = cast(RequestBuffers, SimpleNamespace(**tokens))

    def _draw(self, *size: int) -> Tensor:
        """Normal values, scaled so that a product keeps the size of its input."""
        return torch.randn(size, generator=self._generator, device=DEVICE) * size[-1] ** -0.5

    def _affine(self, rows: int, columns: int) -> Affine:
        return Affine(self._draw(rows, columns), self._draw(rows))

    def _schedule(self, steps: int) -> Schedule:
        width, actions = self.config.expert.width, self.config.action_dim
        modulation = None
        if self.config.kind == "pi05":
            size = (steps, 2 * self.config.expert.depth + 1, 3, width)
            modulation = torch.randn(size, generator=self._generator, device=DEVICE) * 0.3
        out = self._affine(actions, width)
        into = Affine(self._draw(width, actions), self._draw(steps, width))
        return Schedule(into, modulation, Affine(out.weight / steps, out.bias / steps))

    def work(self, kind: type[RowsLoop], ops: Ops) -> Callable[[], None]:
        """All steps by a loop."""
        loop = kind(self.config, self.weights, ops, cast(Schedules, lambda steps: self.schedule))
        return lambda: loop.run(self.request, self.buffers, self.steps)


def amax_of(case: Case) -> dict[str, float]:
    """How far the inputs of an expert's products reach in bf16."""
    ops, found = triton_ops(), dict.fromkeys(("qkv", "out", "gate_up", "down"), 0.0)

    def noted(name: str, op: Callable[..., None]) -> Callable[..., None]:
        def run(x: Tensor, *rest: Any, **more: Any) -> None:
            product = name or ("down" if x.shape[1] == case.config.expert.mlp_dim else "out")
            found[product] = max(found[product], float(x.abs().max()))
            op(x, *rest, **more)

        return run

    watched: dict[str, Any] = {name: noted(product, getattr(ops, name)) for name, product in WATCHED.items()}
    case.work(FusedLoop, replace(ops, **watched))()
    return found


def case_of(options: Options, steps: int) -> Case:
    """With the expert's products in the format that is asked for."""
    plain = Case(options, steps, torch.bfloat16)
    return plain if options.expert == "bf16" else Case(options, steps, torch.bfloat16, amax_of(plain))


def milliseconds(work: Callable[[], None], repeats: int) -> tuple[float, Callable[[], None]]:
    """The median time of a replay, and what replays."""
    replay = CudaGraphRecorder(DEVICE).record(work)
    clock, times = StageClock(DEVICE), []
    for _ in range(repeats + 3):
        clock.start()
        replay()
        clock.mark()
        times += clock.stop()
    return statistics.median(times[3:]), replay


def ops_of(mlp_dim: int, tiles: dict[str, GemmConfig] | None = None, without: str = "") -> Ops:
    """The kernels with given tiles, or with one of a layer's left out, which computes nothing right."""
    tiles = tiles or {}

    def product(name: str, op: Callable[..., None]) -> Callable[..., None]:
        def run(*tensors: Any, **scales: Any) -> None:
            named = name or ("down" if tensors[0].shape[1] == mlp_dim else "out")
            if named != without:
                op(*tensors, config=tiles.get(named), **scales)

        return run

    nothing: dict[str, Any] = {
        {"attention": "row_attention", "norms": "row_sum_norm"}.get(without, ""): lambda *_, **__: None
    }
    nothing.pop("", None)
    products: dict[str, Any] = {
        "row_qkv": product("qkv", kernels.row_qkv),
        "row_geglu": product("geglu", kernels.row_geglu),
    }
    return replace(triton_ops(), **products, row_parts=product("", kernels.row_parts), **nothing)


def measure(options: Options) -> dict[str, Any]:
    """Both loops: time, error of what the steps move, whether runs give the same bits; and a layer in parts."""
    exact, case = Case(options, options.steps, torch.float32), case_of(options, options.steps)
    with ieee_float32():
        exact.work(RowsLoop, twin_ops())()
    noise = case.noise.view_as(case.buffers.denoise.x_t)
    moved = exact.buffers.denoise.x_t - noise
    results: dict[str, Any] = {}
    for kind in (RowsLoop, FusedLoop, RowsLoop, FusedLoop):
        ms, replay = milliseconds(case.work(kind, triton_ops()), options.repeats)
        answers = []
        for _ in range(5):
            replay()
            torch.cuda.synchronize()
            answers.append(case.buffers.denoise.x_t.clone())
        found = results.setdefault(kind.name, {"ms": []})
        found["ms"].append(ms)
        found["error"] = float((answers[0] - noise - moved).norm() / moved.norm())
        found["bit_identical"] = all(torch.equal(answers[0], answer) for answer in answers)
    layers = options.steps * case.config.expert.depth
    whole, parts = results[FusedLoop.name]["ms"][-1], {}
    for name in LAYER:
        work = case.work(FusedLoop, ops_of(case.config.expert.mlp_dim, without=name))
        parts[name] = (whole - milliseconds(work, options.repeats)[0]) * 1e3 / layers
    results["us_of_a_layer"] = {"all": whole * 1e3 / layers} | parts
    return results


def _tiles(columns: tuple[int, ...], itemsize: int) -> list[GemmConfig]:
    """Of Hopper's kernels with rings of rows, and of Triton's."""
    rings = [(128, 4), (128, 8), (256, 2), (256, 4), (512, 2)]
    rings = [(row_bytes // itemsize, stages) for row_bytes, stages in rings]
    hopper = [GemmConfig(64, n, k, 1, 4, stages, descriptors=True) for n in columns for k, stages in rings]
    plain = [(128 // itemsize, 8), (256 // itemsize, 4)]
    return [*hopper, *(GemmConfig(64, n, k, 1, 4, s) for n in columns for k, s in plain)]


def tune(options: Options, console: Console) -> dict[str, Any]:
    """Each product's tiles in turn, by the time of two steps of the loop; writes the best. Returns what was tried."""
    case = case_of(options, 2)
    cuts, dtype = (FusedLoop.fp8, E4M3) if options.expert == "fp8" else (FusedLoop.bf16, torch.bfloat16)
    expert, rows = case.config.expert, options.batch * case.config.suffix_tokens
    inner, layers = expert.heads * expert.head_dim, 2 * expert.depth
    products = {
        "geglu": ("row_geglu", (rows, expert.mlp_dim, expert.width), (32,)),
        "down": ("row_parts", (rows, expert.width, expert.mlp_dim, cuts.down), (32, 64)),
        "out": ("row_parts", (rows, expert.width, inner, cuts.out), (32, 64)),
        "qkv": ("row_qkv", (rows, inner + 2 * expert.kv_heads * expert.head_dim, expert.width), (16, 32)),
    }
    file = tuning.gpu_file(DEVICE)
    content = json.loads(file.read_text())
    best: dict[str, GemmConfig] = {}
    tried: dict[str, Any] = {}
    for name, (op, sizes, columns) in products.items():
        times = {}
        for config in _tiles(columns, dtype.itemsize):
            try:
                work = case.work(FusedLoop, ops_of(expert.mlp_dim, best | {name: config}))
                times[config] = milliseconds(work, 9)[0] * 1e3 / layers
            except ValueError as error:
                console.print(f"{name} {config}: {error}")
        best[name] = min(times, key=times.__getitem__)
        tried[name] = {str(config): us for config, us in times.items()}
        content["configs"].setdefault(op, {})[tuning.key(dtype, sizes)] = asdict(best[name])
        console.print(f"{name}: {best[name]}, {times[best[name]]:.2f} us a layer")
    file.write_text(json.dumps(content, indent=1) + "\n")
    tuning.forget()
    return tried


def main() -> None:
    """Tune if asked, measure, print, write the receipt."""
    options, console = tyro.cli(Options, description=__doc__), Console(width=140)
    tried = tune(options, console) if options.tune else {}
    results = measure(options)
    table = Table("loop", "ms", "error", "same bits")
    for name in (RowsLoop.name, FusedLoop.name):
        found = results[name]
        table.add_row(
            name, " ".join(f"{ms:.2f}" for ms in found["ms"]), f"{found['error']:.2e}", str(found["bit_identical"])
        )
    console.print(table)
    console.print({name: round(us, 2) for name, us in results["us_of_a_layer"].items()})
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    write_receipt(options.out, "denoise loops of few rows, random weights", results | {"tried_us": tried}, settings)


if __name__ == "__main__":
    main()
