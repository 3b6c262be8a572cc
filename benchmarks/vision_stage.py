"""Stage 1 as a whole: kernel by kernel against norms behind products, alternately, with tilings to choose from.

    python benchmarks/vision_stage.py          # what the tuned file of this GPU says
    python benchmarks/vision_stage.py --tune   # tries tilings, and writes those that win
    python benchmarks/vision_stage.py --precision fp8 --tune

At the full model's size with random weights, from uint8 images to image tokens, each way one CUDA graph.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from vision_weights import BF16, CUDA, HEADS, HIDDEN, PROJECTED, TOKENS, WIDTH, in_e4m3, random_weights

from turbopi import preset
from turbopi.bench import write_receipt
from turbopi.bench.clock import StageClock
from turbopi.engine.capture import CudaGraphRecorder
from turbopi.engine.turbo.buckets import Bucket
from turbopi.engine.turbo.buffers import VisionBuffers, build, vision_specs
from turbopi.engine.turbo.ops import triton_ops
from turbopi.engine.turbo.tiled_vision import encode_tiled, encode_tiled_fp8, vision_sums
from turbopi.engine.turbo.vision import encode
from turbopi.kernels import E4M3, LinearTiling, VisionTilings, tuning, vision_attention_ref, vision_tilings
from turbopi.kernels._common import cdiv
from turbopi.kernels.tiled_linear import BLOCK
from turbopi.kernels.tuning import gpu_file, key
from turbopi.kernels.vision_tilings import OP
from turbopi.quant.fold import FoldedVision

START = Path(__file__).with_name("vision_start.json")
IN_CLUSTERS = {1: 132, 2: 132, 3: 117, 4: 120}
"""CTAs that an H200 holds at once, in clusters of so many."""


@dataclass(frozen=True)
class Options:
    """What to time."""

    precision: Literal["bf16", "fp8"] = "bf16"
    """Of the blocks' products."""
    images: tuple[int, ...] = (2, 3, 1)
    """Of one call."""
    rounds: int = 9
    """Turns of each way."""
    replays: int = 5
    """Of a turn."""
    tune: bool = False
    """Try tilings, and write those that win into the tuned file of this GPU."""
    candidates: int = 4
    """Of each product, when tuning."""
    budget_s: float = 120.0
    """No new tiling is tried after so long."""
    out: Path | None = None
    """The receipt; the default name says on which GPU."""


class Stage:
    """Buffers for some images, and both ways through them."""

    def __init__(self, images: int, weights: FoldedVision, precision: str = "bf16") -> None:
        config, self.e4m3 = preset("pi05"), precision == "fp8"
        self.rows, self.config = images * TOKENS, config.vision
        self.weights, self.ops = weights, triton_ops()
        self.images = torch.randint(0, 256, (1, images, 3, 224, 224), device=CUDA, dtype=torch.uint8)
        specs = vision_specs(config, Bucket(1, images, config.max_tokens), BF16, self.e4m3)
        self.b = build(VisionBuffers, lambda _, spec: torch.zeros(spec[0], dtype=spec[1], device=CUDA), specs)
        self.clock = StageClock(CUDA)
        reaches: list[float] = []
        self.want = self.exact(lambda x: reaches.append(float(x.abs().max())))
        if self.e4m3:
            self.weights = in_e4m3(weights, reaches)
        self.sums = vision_sums(self.weights)

    @property
    def fc2(self) -> Tensor:
        """A block's, on the GPU."""
        fc2 = self.weights.blocks[0].fc2
        return fc2.values if self.e4m3 else fc2

    def plain(self) -> None:
        """Kernel by kernel."""
        encode(self.config, self.weights, self.ops, self.images, self.b)

    def tiled(self, tilings: VisionTilings) -> None:
        """Norms behind products, or between products in E4M3."""
        by_tiles = encode_tiled_fp8 if self.e4m3 else encode_tiled
        by_tiles(self.config, self.weights, self.sums, tilings, self.ops, self.images, self.b)

    def race(self, ways: Mapping[str, Callable[[], None]], rounds: int, replays: int) -> dict[str, list[float]]:
        """Microseconds of each way, a number a turn."""
        # A recorder each time: the pool of graphs that are gone takes no new ones.
        recorder = CudaGraphRecorder(CUDA)
        graphs = {name: recorder.record(work) for name, work in ways.items()}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, replay in graphs.items():
                self.clock.start()
                for _ in range(replays):
                    replay()
                self.clock.mark()
                if turn:
                    found[name].append(1e3 * self.clock.stop()[0] / replays)
                else:
                    self.clock.stop()
        return found

    def errors(self, ways: dict[str, Callable[[], None]]) -> dict[str, float]:
        """Of the image tokens, relative to float32."""
        found = {}
        for name, work in ways.items():
            work()
            found[name] = float((self.b.image_tokens.float() - self.want).norm() / self.want.norm())
        return found

    def exact(self, look: Callable[[Tensor], None]) -> Tensor:
        """Image tokens in float32 throughout, of weights in bfloat16; `look` is shown every product's input in turn."""

        def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            look(x)
            return F.linear(x, weight.float(), None if bias is None else bias.float())

        def norm(x: Tensor) -> Tensor:
            return F.layer_norm(x, (WIDTH,), eps=1e-6)

        self.ops.patches(self.images.flatten(0, 1), self.b.patches)
        x = ((self.b.patches @ self.weights.patch.T).unflatten(0, (-1, TOKENS)) + self.weights.position).flatten(0, 1)
        attended = torch.empty_like(x)
        for block in self.weights.blocks:
            qkv = product(norm(x), block.qkv.weight, block.qkv.bias)
            vision_attention_ref(qkv, attended, HEADS, TOKENS)
            x = x + product(attended, block.out)
            hidden = F.gelu(product(norm(x), block.fc1.weight, block.fc1.bias), approximate="tanh")
            x = x + product(hidden, block.fc2)
        return F.linear(norm(x), self.weights.projector.weight.float(), self.weights.projector.bias.float())


SIZES = {
    "qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "fc1": (HIDDEN, WIDTH), "fc2": (WIDTH, HIDDEN),
    "projector": (PROJECTED, WIDTH),
}  # fmt: skip
"""Features and K of each product."""


def estimate(tiling: LinearTiling, k: int, e4m3: bool) -> float:
    """Microseconds, by count: the longer of a tile's multiplications and its copies at 64 bytes a cycle."""
    blocks = cdiv(cdiv(k, 2 * BLOCK if e4m3 else BLOCK), tiling.splits)
    cycles = blocks * max(2 * tiling.groups * tiling.columns, 2 * (tiling.tokens + tiling.columns))
    outputs = tiling.tokens * tiling.columns / tiling.splits
    return cycles / 1980 + 0.06e-3 * outputs + (1.0 if tiling.splits > 1 else 0.0)


def candidates(product: str, rows: int, most: int, e4m3: bool = False) -> Iterator[LinearTiling]:
    """Tilings that run all at once, the most promising first, two of each number of groups, one with a short ring."""
    features, k = SIZES[product]
    found: dict[int, list[LinearTiling]] = {}
    for groups in range(1, 5):
        for splits in {1, groups} if product in ("out", "fc2") else {1}:
            for columns in range(32, 257, 8):
                if groups * columns > 480 or (groups == 4 and columns > 104):
                    continue  # more registers than there are
                try:
                    tiling = LinearTiling(groups, columns, splits)
                except ValueError:
                    continue
                if tiling.ctas(rows, features) <= IN_CLUSTERS[splits] and fits(product, tiling, e4m3):
                    found.setdefault(groups, []).append(tiling)

    def promise(tiling: LinearTiling) -> float:
        return estimate(tiling, k, e4m3)

    best = [tiling for some in found.values() for tiling in sorted(some, key=promise)[:2]]
    first = sorted(best, key=promise)[:most]
    yield from first
    yield replace(first[0], most_slots=4)


def fits(product: str, tiling: LinearTiling, e4m3: bool) -> bool:
    """Whether the product, and those that read its moments, can be cut so."""
    whole = LinearTiling(1, 64)
    one: dict[str, Any] = {product: tiling}
    tilings = replace(VisionTilings(whole, whole, whole, whole, whole), **one)
    return not tilings.obstacles(WIDTH, HIDDEN, PROJECTED, e4m3)


def tune(
    stage: Stage, options: Options, until: float, console: Console
) -> tuple[VisionTilings | None, list[dict[str, Any]]]:
    """One product after the other, twice: that tiling with which the whole stage is fastest; None if none is right."""
    tried: list[dict[str, Any]] = []
    choices: dict[str, list[Any]] = {
        name: list(candidates(name, stage.rows, options.candidates, stage.e4m3)) for name in SIZES
    }
    best = vision_tilings(stage.fc2, stage.rows) or start(stage.rows, stage.fc2.dtype)
    best = best or VisionTilings(**{name: some[0] for name, some in choices.items()})
    choices |= {"grey": [False, True], "early_attention": [False, True]}
    limit = 1.1 * stage.errors({"plain": stage.plain})["plain"]
    for name in [*choices, *SIZES]:
        if time.monotonic() > until:
            break
        others = {said(choice): replace(best, **{name: choice}) for choice in [getattr(best, name), *choices[name]]}
        ways = {what: partial(stage.tiled, tilings) for what, tilings in others.items()}
        right = {what: work for what, work in ways.items() if is_right(stage, f"{name} {what}", work, limit, console)}
        if not right:
            return None, tried
        us = {what: statistics.median(turns) for what, turns in stage.race(right, 3, options.replays).items()}
        best = others[min(us, key=lambda what: us[what])]
        tried.append({"product": name, "us": us})
        console.print(stage.rows, name, {what: round(value, 1) for what, value in us.items()})
    return best, tried


def start(rows: int, dtype: torch.dtype) -> VisionTilings | None:
    """Where tuning begins without an entry: what an H200 showed to be good, if it did so for this number of rows."""
    entry = json.loads(START.read_text()).get(key(dtype, (rows, WIDTH, HIDDEN)))
    return None if entry is None else VisionTilings.read(entry)


def said(choice: LinearTiling | bool) -> str:
    """Short, for a receipt."""
    if isinstance(choice, bool):
        return str(choice)
    return f"{choice.tokens} x {choice.columns}, {choice.splits} parts, {choice.slots} slots"


def is_right(stage: Stage, name: str, work: Callable[[], None], limit: float, console: Console) -> bool:
    """Whether it runs, with at most such an error; told if not."""
    try:
        error = stage.errors({name: work})[name]
    except (RuntimeError, ValueError, TypeError) as refusal:
        console.print(f"{name} does not run: {refusal}")
        return False
    if not error <= limit:
        console.print(f"{name} is wrong: {error:.1e}, allowed {limit:.1e}")
    return error <= limit


def write_tuned(rows: int, dtype: torch.dtype, tilings: VisionTilings | None) -> None:
    """Into the file of this GPU; None takes the entry out."""
    file = gpu_file(CUDA)
    found = json.loads(file.read_text())
    entries = found["configs"].setdefault(OP, {})
    name = key(dtype, (rows, WIDTH, HIDDEN))
    if tilings is None:
        entries.pop(name, None)
    else:
        entries[name] = asdict(tilings)
    file.write_text(json.dumps(found, indent=1) + "\n")
    tuning.forget()


def measure(stage: Stage, options: Options, until: float, console: Console) -> dict[str, Any]:
    """One entry of the receipt."""
    tried: list[dict[str, Any]] = []
    tilings = vision_tilings(stage.fc2, stage.rows)
    if options.tune:
        tilings, tried = tune(stage, options, until, console)
    own = "tiled products in E4M3" if stage.e4m3 else "norms behind products"
    ways: dict[str, Callable[[], None]] = {"kernel by kernel": stage.plain}
    if tilings is not None:
        ways[own] = partial(stage.tiled, tilings)
    turns = stage.race(ways, options.rounds, options.replays)
    us = {name: statistics.median(some) for name, some in turns.items()}
    if options.tune:
        faster = min(us, key=lambda name: us[name]) == own
        write_tuned(stage.rows, E4M3 if stage.e4m3 else BF16, tilings if faster else None)
    cut = None if tilings is None else asdict(tilings)
    errors = stage.errors(ways)
    return {"rows": stage.rows, "tilings": cut, "us": us, "turns_us": turns, "errors": errors, "tried": tried}


@torch.no_grad()
def main() -> None:
    """Measure, print, write the receipt."""
    options, console = tyro.cli(Options, description=__doc__), Console(width=150)
    weights, until = random_weights(), time.monotonic() + options.budget_s
    results = [measure(Stage(images, weights, options.precision), options, until, console) for images in options.images]
    table = Table("rows", "way", "us", "error")
    for result in results:
        for name, us in result["us"].items():
            table.add_row(str(result["rows"]), name, f"{us:.0f}", f"{result['errors'][name]:.1e}")
    console.print(table)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    name = {"bf16": "vision_stage", "fp8": "vision_stage_fp8"}[options.precision]
    out = options.out or Path(__file__).parent / "results" / f"{name}_{gpu_file(CUDA).stem}.json"
    write_receipt(out, "stage 1 as a whole", {"runs": results}, settings)


if __name__ == "__main__":
    main()
