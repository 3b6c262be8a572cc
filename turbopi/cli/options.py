"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ..policy import Policy


@dataclass(frozen=True)
class PolicyOptions:
    """Which policy, and how to run it.

    Attributes:
        checkpoint: directory of an openpi, lerobot or JAX checkpoint.
        robot: libero, droid, aloha, or lerobot (a lerobot checkpoint's features). Default: what the checkpoint says.
        engine: way to run the stages.
        steps: flow-matching evaluations per chunk.
        precision: fp32 or bf16. Default: bf16 on a GPU, fp32 on a CPU.
        device: auto, cpu, cuda, cuda:1, ...
        seed: of the noise.
        numerics: named numerics profile. Default: the checkpoint's, else exact.
        invalid_tokens: dropped or masked. Default: the checkpoint's, else dropped.
        asset_id: which norm stats, where the checkpoint has several.
        tokenizer: a .model or tokenizer.json file. Default: the checkpoint's, else the one in openpi's cache.
        state_in_prompt: whether the prompt spells the state. Default: as the checkpoint says, else as is customary.
        prompt: task for observations that have none.
    """

    checkpoint: Path
    robot: str | None = None
    engine: str = "eager"
    steps: int = 10
    precision: Literal["fp32", "bf16"] | None = None
    device: str = "auto"
    seed: int = 0
    numerics: Literal["exact", "openpi", "lerobot", "jax"] | None = None
    invalid_tokens: Literal["dropped", "masked"] | None = None
    asset_id: str | None = None
    tokenizer: Path | None = None
    state_in_prompt: bool | None = None
    prompt: str | None = None

    def load(self) -> Policy:
        """The policy that these options describe."""
        from ..policy import load_policy

        return load_policy(
            self.checkpoint,
            robot=self.robot,
            engine=self.engine,
            steps=self.steps,
            precision=self.precision,
            seed=self.seed,
            device=self.device,
            numerics=self.numerics,
            invalid_tokens=self.invalid_tokens,
            asset_id=self.asset_id,
            tokenizer=self.tokenizer,
            state_in_prompt=self.state_in_prompt,
            default_prompt=self.prompt,
        )
