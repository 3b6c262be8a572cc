"""Named combinations of engine, precision and runtime: what to recommend, and the back ends of earlier notes.

Nothing here claims a success rate that has not been measured: see `Preset.stated`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..engine import Precision
from .config import ChunkingConfig, ReuseConfig, RuntimeConfig, SimilarityGate


@dataclass(frozen=True)
class Success:
    """What was measured in closed loop: successes of episodes, the interval's ends (0 to 1), and the receipt."""

    successes: int
    episodes: int
    low: float
    high: float
    receipt: str


@dataclass(frozen=True)
class Preset:
    """A combination under a name.

    Attributes:
        engine, precision: as of `load_policy`.
        runtime: what a tick does.
        what: in a line.
        success: in closed loop; None until it has been measured.
    """

    engine: str
    precision: Precision
    runtime: RuntimeConfig
    what: str
    success: Success | None = None

    def stated(self) -> str:
        """The success rate with its interval.

        Raises ValueError where it has not been measured: nothing may be claimed then.
        """
        if self.success is None:
            raise ValueError(
                f"the success of this preset ({self.what}) has not been measured: nothing is claimed for it; "
                "run benchmarks/runtime_closed_loop.py"
            )
        s = self.success
        return f"{s.successes}/{s.episodes}, {100 * s.low:.1f} to {100 * s.high:.1f} % ({s.receipt})"


def _every(n: int) -> RuntimeConfig:
    return RuntimeConfig(reuse=ReuseConfig(every=n))


_GATE = RuntimeConfig(reuse=ReuseConfig(gate=SimilarityGate(0.985)))

RECOMMENDED: dict[str, Preset] = {
    "safe": Preset(
        "turbo",
        "bf16",
        RuntimeConfig(10),
        "everything at every tick",
        Success(189, 200, 0.9042, 0.9690, "benchmarks/results/runtime_closed_loop.json"),
    ),
    "balanced": Preset(
        "turbo",
        "bf16",
        RuntimeConfig(3),
        "three steps, everything else at every tick",
        Success(193, 200, 0.9295, 0.9829, "benchmarks/results/runtime_closed_loop.json"),
    ),
    "fast": Preset(
        "turbo",
        "bf16",
        RuntimeConfig(1),
        "one step, everything else at every tick",
        Success(191, 200, 0.9167, 0.9761, "benchmarks/results/runtime_closed_loop.json"),
    ),
}
"""What each did in 200 episodes is in docs/runtime.md. None reuses a prefix: at replan 5 that costs two thirds of all
successes."""

NOTES: dict[str, Preset] = {
    "pytorch": Preset("eager", "bf16", RuntimeConfig(), "the reference"),
    "pytorch_text_cache": Preset("eager", "bf16", RuntimeConfig(prompt_cache=True), "embedded prompt kept"),
    "pytorch_kv_reuse": Preset("eager", "bf16", _GATE, "prefix reused while image tokens agree to 0.985"),
    "pytorch_kv_reuse_2": Preset("eager", "bf16", _every(2), "prefix at every second tick"),
    "pytorch_kv_reuse_4": Preset("eager", "bf16", _every(4), "prefix at every fourth tick"),
    "flash_fp16": Preset("turbo", "bf16", _every(2), "own kernels, prefix at every second tick; bf16 for fp16"),
    "flash_fp16_freq1": Preset("turbo", "bf16", RuntimeConfig(), "own kernels, everything at every tick"),
    "tensorrt": Preset("turbo", "bf16", RuntimeConfig(), "captured graphs of own kernels stand for the compiled ones"),
    "tensorrt_pipelined": Preset(
        "turbo",
        "bf16",
        RuntimeConfig(chunking=ChunkingConfig(delay=1)),
        "inference beside execution, its chunk a tick later",
    ),
    "full_trt_benchmark": Preset("turbo", "fp8", RuntimeConfig(), "every stage captured, products in fp8"),
    "tensorrt_w8a16": Preset("eager", "w8a16", RuntimeConfig(), "weights in int8, activations in bf16"),
    "turbo_titan": Preset("turbo", "bf16", _every(2), "one graph a tick, prefix at every second tick"),
    "turbo_titan_freq1": Preset("turbo", "bf16", RuntimeConfig(), "one graph a tick, everything at every tick"),
    "turbo_titan_freq3": Preset("turbo", "bf16", _every(3), "one graph a tick, prefix at every third tick"),
}
"""Names of earlier notes, each as the nearest thing that exists here, so that its row can be played again."""

PRESETS: dict[str, Preset] = {**RECOMMENDED, **NOTES}


def find_preset(name: str) -> Preset:
    """A preset by name; raises ValueError that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def find_runtime(name_or_file: str) -> RuntimeConfig:
    """The runtime of a preset, or one from a JSON file.

    Raises FileNotFoundError for a name that is neither, ValueError for a file that is none of ours.
    """
    if name_or_file in PRESETS:
        return PRESETS[name_or_file].runtime
    path = Path(name_or_file)
    if not path.is_file():
        raise FileNotFoundError(
            f"{name_or_file!r} is neither a file nor a preset; presets: {', '.join(PRESETS)}; docs/runtime.md says "
            "what a file holds"
        )
    return RuntimeConfig.load(path)
