"""Many ticks of everything that changes: prompts of any length, cameras that drop out and return, resets.

    python benchmarks/runtime_soak.py --preset pi05-tiny --engine turbo-twins --ticks 100000     # a CPU
    python benchmarks/runtime_soak.py --preset pi05 --engine turbo --ticks 100000                # a GPU

Watches the process's and the device's memory, and how many graphs were recorded: after the warm-up neither may grow.
The receipt is benchmarks/results/runtime_soak_ENGINE.json.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from turbopi import ModelInput, RuntimeConfig, preset
from turbopi.audit.golden import hash_model
from turbopi.bench import write_receipt
from turbopi.config import ModelConfig
from turbopi.engine import Engine, create_engine
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo.ops import twin_ops
from turbopi.runtime import DeadlineConfig, ReuseConfig, Runtime, StreamConfig

TWINS = "turbo-twins"
MIB = 1 << 20
RESET, NEW_TASK, DROP, STILL = 0.005, 0.02, 0.03, 0.05
"""Chances at each tick: of a reset, another prompt, a camera that goes or returns, a frame that comes again."""


@dataclass(frozen=True)
class Options:
    """What to run, for how long."""

    preset: str = "pi05-tiny"
    """Model, with hash weights."""
    engine: str = TWINS
    """Engine, or turbo-twins: turbo's assembly on a CPU."""
    precision: str = "fp32"
    """Of the engine."""
    ticks: int = 100_000
    """In all."""
    steps: int = 2
    """Flow-matching evaluations; a deadline may make it 1."""
    every: int = 3
    """The prefix is computed at every n-th tick."""
    samples: int = 50
    """Times at which memory is looked at."""
    seed: int = 0
    """Of everything that changes."""
    out: Path | None = None
    """The receipt."""


def main() -> None:
    """Run, write the receipt, say what grew."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    engine = engine_of(options)
    runtime = RuntimeConfig(
        options.steps,
        reuse=ReuseConfig(every=options.every),
        deadline=DeadlineConfig(1e6, 50.0, order=("steps", "reuse"), fewer_steps=(1,), reuse_every=options.every + 1),
        stream=StreamConfig(),
    )
    looped = Runtime(engine, runtime)
    images = torch.uint8 if getattr(engine, "accepts_uint8", False) else torch.float32
    for cameras in range(1, engine.config.cameras + 1):
        looped.warm_up(cameras, images)
    results = soak(looped, options, images)
    path = options.out or Path(__file__).parent / "results" / f"runtime_soak_{options.engine}.json"
    config = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    write_receipt(path, "soak: memory and recorded graphs over many ticks", results, config)
    Console().print({name: value for name, value in results.items() if name != "samples"}, f"wrote {path}")


class Keeps:
    """Stands for CUDA graphs on a CPU: keeps the work, so that what is recorded can be counted."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do it, and return it."""
        work()
        return work


def engine_of(options: Options) -> Engine:
    """The engine over hash weights, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() and options.engine != TWINS else "cpu"
    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
    model = hash_model(preset(options.preset), 7, dtype, device)
    if options.engine == TWINS:
        return TurboEngine(model, "fp32", twin_ops(), Keeps())
    return create_engine(options.engine, model, options.precision)  # type: ignore[arg-type]


class World:
    """What a careless client might send."""

    def __init__(self, config: ModelConfig, seed: int, images: torch.dtype) -> None:
        self.config, self.images = config, images
        self._random, self._torch = random.Random(seed), torch.Generator().manual_seed(seed)
        self._task, self._state = 0, 0
        self._present = [True] * config.cameras
        self._new_task()
        self._last: ModelInput | None = None

    def _new_task(self) -> None:
        self._task = self._random.randint(1, self.config.max_tokens // 2)
        self._state = self._random.randint(0, self.config.max_tokens // 2)
        self._words = self._random.randint(3, 900)

    def next(self) -> tuple[ModelInput, int]:
        """An observation, and how many of its prompt's tokens are text."""
        chance = self._random.random
        if self._last is not None and chance() < STILL:
            return self._last, self._task
        if chance() < NEW_TASK:
            self._new_task()
        if chance() < DROP:
            slot = self._random.randrange(self.config.cameras)
            self._present[slot] = not self._present[slot] or sum(self._present) == 1
        self._last = self._observation()
        return self._last, self._task

    def _observation(self) -> ModelInput:
        config, size, slots = self.config, self.config.vision.image_size, self.config.max_tokens
        shape = (1, config.cameras, 3, size, size)
        frames = torch.randint(0, 256, shape, generator=self._torch, dtype=torch.uint8)
        tokens = torch.randint(3, config.vocab_size, (1, slots), generator=self._torch)
        tokens[0, : self._task] = torch.arange(self._words, self._words + self._task) % config.vocab_size
        return ModelInput(
            images=frames if self.images == torch.uint8 else frames.float() / 255 * 2 - 1,
            image_mask=torch.tensor([self._present]),
            tokens=tokens,
            token_mask=torch.arange(slots)[None] < self._task + self._state,
            state=torch.rand(1, config.state_dim, generator=self._torch) * 2 - 1,
        )


def soak(looped: Runtime, options: Options, images: torch.dtype) -> dict[str, Any]:
    """Tick after tick; memory and graphs now and then, and what the ticks were."""
    world, chance = World(looped.engine.config, options.seed, images), random.Random(options.seed + 1)
    noise = torch.zeros(1, looped.engine.config.horizon, looped.engine.config.action_dim)
    every, kinds, resets, samples = max(1, options.ticks // options.samples), {}, 0, []
    begin = time.perf_counter()
    for tick in range(options.ticks):
        if chance.random() < RESET:
            looped.reset()
            resets += 1
        inputs, text = world.next()
        start = time.perf_counter()
        actions, report = looped.sample(inputs, noise, text)
        assert bool(torch.isfinite(actions).all())
        # Now and then a tick seems too long, so that the deadline degrades and recovers, too.
        looped.finished(1e3 * (time.perf_counter() - start) + 100.0 * (chance.random() < 0.002))
        kinds[report.decision.kind] = kinds.get(report.decision.kind, 0) + 1
        if tick % every == every - 1:
            samples.append({"tick": tick + 1, **memory(looped.engine)})
    # The first tenth may still load and allocate; after that, nothing.
    settled = samples[len(samples) // 10]
    last = samples[-1]
    grown = {name: last[name] - settled[name] for name in last if name != "tick"}
    seconds = time.perf_counter() - begin
    return {
        "ticks": options.ticks,
        "resets": resets,
        "kinds": kinds,
        "seconds": seconds,
        "grown_since_a_tenth": grown,
        "samples": samples,
    }


def memory(engine: Engine) -> dict[str, float]:
    """MiB of the process now and of the device, and recorded graphs."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB
    found = {"resident_mib": round(resident, 2)}
    if torch.cuda.is_available():
        found["device_mib"] = round(torch.cuda.memory_allocated() / MIB, 2)
        found["device_reserved_mib"] = round(torch.cuda.memory_reserved() / MIB, 2)
    describe = getattr(engine, "describe", None)
    graphs = describe().get("graphs") if describe is not None else None
    return found | ({} if graphs is None else {"graphs": graphs})


if __name__ == "__main__":
    main()
