"""Options that several commands share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..policy import Policy


DEFAULT_ENGINE = "eager"


@dataclass(frozen=True)
class PolicyOptions:
    """Which policy, and how to run it.

    Attributes:
        checkpoint: directory of an openpi, lerobot or JAX checkpoint.
        robot: libero, droid, aloha, or lerobot (a lerobot checkpoint's features). Default: what the checkpoint says.
        engine: way to run the stages. Default: the preset's, else eager. vision=A,prefill=B,denoise=C mixes several;
            "A>B>C" takes the first that passes its audit here; onnx:DIR and tensorrt:DIR run what `turbo-pi export`
            wrote.
        steps: flow-matching evaluations per chunk. Default: the runtime's, else 10.
        precision: fp32 or bf16, or quantised. Default: bf16 on a GPU, fp32 on a CPU.
        device: auto, cpu, cuda, cuda:1, ...
        seed: of the noise. Default: the runtime's, else 0.
        numerics: named numerics profile. Default: the checkpoint's, else exact.
        invalid_tokens: dropped or masked. Default: the checkpoint's, else dropped.
        asset_id: which norm stats, where the checkpoint has several.
        tokenizer: a .model or tokenizer.json file. Default: the checkpoint's, else the one in openpi's cache.
        state_in_prompt: whether the prompt spells the state. Default: as the checkpoint says, else as is customary.
        prompt: task for observations that have none.
        plan: JSON file that says which products a quantised precision leaves in another format.
        calibration: JSON file of `turbo-pi calibrate`. Default: calibration.json in the checkpoint.
        runtime: what a tick computes: a preset's name or a JSON file, see docs/runtime.md. It has its own steps.
        preset: engine, precision and runtime of that name together: safe, balanced, fast, or a back end's.
    """

    checkpoint: Path
    robot: str | None = None
    engine: str | None = None
    steps: int | None = None
    precision: Literal["fp32", "bf16", "fp8", "int8", "w8a16", "w4a16", "nvfp4"] | None = None
    device: str = "auto"
    seed: int | None = None
    numerics: Literal["exact", "openpi", "lerobot", "jax"] | None = None
    invalid_tokens: Literal["dropped", "masked"] | None = None
    asset_id: str | None = None
    tokenizer: Path | None = None
    state_in_prompt: bool | None = None
    prompt: str | None = None
    plan: Path | None = None
    calibration: Path | None = None
    runtime: str | None = None
    preset: str | None = None

    def load(self) -> Policy:
        """The policy that these options describe."""
        from ..policy import load_policy

        return load_policy(self.checkpoint, seed=self.seed, **self.keywords())

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of `load_policy`, but for the path and the seed.

        Raises ValueError for an unknown preset or one that contradicts other options, FileNotFoundError for a runtime
        that is neither a preset nor a file.
        """
        from ..runtime import RuntimeConfig

        options = dataclasses.asdict(self)
        for name in ("checkpoint", "seed", "preset"):
            del options[name]
        options["default_prompt"] = options.pop("prompt")
        options["engine"] = self.engine or DEFAULT_ENGINE
        options |= self.tick()
        if self.steps is None:
            options["steps"] = (options["runtime"] or RuntimeConfig).steps
        if ">" in options["engine"]:
            from .selecting import choose_engine

            options["engine"] = choose_engine(self, options)
        return options

    def tick(self) -> dict[str, Any]:
        """The runtime that --runtime names; with engine and precision what --preset names. Raises as `keywords`."""
        from ..runtime.presets import find_preset, find_runtime

        if self.preset is None:
            return {} if self.runtime is None else {"runtime": find_runtime(self.runtime)}
        if self.runtime is not None:
            raise ValueError("give --preset or --runtime: a preset has a runtime of its own")
        found = find_preset(self.preset)
        if self.engine not in (None, found.engine) or self.precision not in (None, found.precision):
            raise ValueError(
                f"preset {self.preset!r} is engine {found.engine!r} in {found.precision}; leave --engine and "
                "--precision away, or use its runtime alone with --runtime"
            )
        return {"engine": found.engine, "precision": found.precision, "runtime": found.runtime}
