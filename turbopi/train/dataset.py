"""Episodes as training batches, wholly on one device."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..model import ModelInput
from ..transforms import (
    DatasetStats,
    Normalizer,
    NormMode,
    NormStats,
    PromptFormat,
    PromptTokenizer,
    load_tokenizer,
)
from .augment import augment_images
from .episodes import Episode, load_episode

PROMPT_VARIANTS = 4
"""Spellings of each tick's state in the prompt, with different noise on the state."""


def dataset_stats(episodes: Sequence[Episode]) -> DatasetStats:
    """Mean, standard deviation and quantiles of states and actions over all ticks."""
    return DatasetStats(
        state=_stats(np.concatenate([e.state for e in episodes])),
        actions=_stats(np.concatenate([e.actions for e in episodes])),
    )


def _stats(values: np.ndarray) -> NormStats:
    values = values.astype(np.float64)
    return NormStats(
        values.mean(0), values.std(0), np.quantile(values, 0.01, axis=0), np.quantile(values, 0.99, axis=0)
    )


def load_episodes(files: Sequence[Path], workers: int) -> list[Episode]:
    """Read many episodes in parallel, in the order of `files`."""
    if workers < 2:
        return [load_episode(file) for file in files]
    # Not forked: torch has threads of its own by now, and a forked child could wait for them for ever.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(load_episode, files, chunksize=8))


@dataclass(frozen=True)
class NoiseConfig:
    """How training inputs are disturbed.

    Attributes:
        shift: largest displacement of an image, as a share of its side.
        colour: largest change of brightness, contrast and of each colour channel.
        state: standard deviation of noise on the normalised state, before it is spelled or embedded.
    """

    shift: float = 0.06
    colour: float = 0.15
    state: float = 0.02


def _check_frames(episodes: Sequence[Episode], size: int) -> None:
    """Raise ValueError unless all frames are of the same cameras, in the size that the model takes."""
    shapes = {episode.frames.shape[1:] for episode in episodes}
    if len(shapes) > 1 or {shape[1:3] for shape in shapes} != {(size, size)}:
        found = " and ".join(
            f"{cameras} cameras of {height} x {width} px" for cameras, height, width, _ in sorted(shapes)
        )
        raise ValueError(
            f"the demonstrations have frames of {found}, but the model takes {size} x {size}, all of the same cameras; "
            f"record them with `turbo-pi demos --image-size {size}`, or choose sizes of a model that takes these"
        )


class DemonstrationSet:
    """All ticks of all episodes on one device; batches are drawn uniformly over ticks.

    Targets are the next `horizon` actions, the last one repeated beyond an episode's end.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        config: ModelConfig,
        stats: DatasetStats,
        tokenizer: Path,
        device: torch.device,
        noise: NoiseConfig,
        seed: int,
    ) -> None:
        _check_frames(episodes, config.vision.image_size)
        self.config, self.device, self.noise = config, device, noise
        self.frames = torch.from_numpy(np.concatenate([e.frames for e in episodes])).to(device)
        lengths = np.array([len(e.state) for e in episodes])
        ends = np.repeat(np.cumsum(lengths), lengths)
        self.last = torch.from_numpy(ends - 1).to(device)
        mode: NormMode = "quantile" if config.kind == "pi05" else "mean_std"
        actions = Normalizer(stats.actions, mode, "openpi", "actions").normalize(
            np.concatenate([e.actions for e in episodes]).astype(np.float64)
        )
        self.actions = torch.zeros(len(actions), config.action_dim)
        self.actions[:, : actions.shape[1]] = torch.from_numpy(actions)
        self.actions = self.actions.to(device)
        states = Normalizer(stats.state, mode, "openpi", "state").normalize(
            np.concatenate([e.state for e in episodes]).astype(np.float64)
        )
        self.states = torch.zeros(len(states), config.state_dim)
        self.states[:, : states.shape[1]] = torch.from_numpy(states)
        self.states = self.states.to(device)
        prompts = [str(e.meta["prompt"]) for e in episodes for _ in range(len(e.state))]
        self.tokens = self._spell(prompts, states, tokenizer, seed).to(device)

    def __len__(self) -> int:
        """Ticks."""
        return len(self.frames)

    def _spell(self, prompts: Sequence[str], states: np.ndarray, tokenizer: Path, seed: int) -> Tensor:
        """(ticks, variants, T) int16 token ids, 0 beyond the prompt."""
        config = self.config
        text = PromptFormat(config.kind, "openpi", bool(config.state_in_prompt))
        spell = PromptTokenizer(load_tokenizer(tokenizer), text, config.max_tokens, config.vocab_size)
        variants = PROMPT_VARIANTS if config.state_in_prompt else 1
        rng = np.random.default_rng(seed)
        ids = np.zeros((len(prompts), variants, config.max_tokens), np.int16)
        for tick, (prompt, state) in enumerate(zip(prompts, states, strict=True)):
            for variant in range(variants):
                disturbed = state + self.noise.state * rng.standard_normal(state.shape) * (variant > 0)
                ids[tick, variant] = spell(prompt, disturbed)[0]
        return torch.from_numpy(ids)

    def batch(self, size: int, generator: torch.Generator) -> tuple[ModelInput, Tensor]:
        """A random batch: the input, augmented, of the cameras that are there; normalised actions (B,H,32) float32."""
        tick = torch.randint(len(self), (size,), generator=generator, device=self.device)
        variant = torch.randint(self.tokens.shape[1], (size,), generator=generator, device=self.device)
        tokens = self.tokens[tick, variant].long()
        frames = self.frames[tick].permute(0, 1, 4, 2, 3).float() / 255 * 2 - 1
        images = augment_images(frames, self.noise.shift, self.noise.colour, generator)
        image_mask = torch.ones(images.shape[:2], dtype=torch.bool, device=self.device)
        state = self.states[tick]
        state = state + self.noise.state * torch.randn(state.shape, generator=generator, device=self.device) * (
            state != 0
        )
        ahead = torch.arange(self.config.horizon, device=self.device)
        chunk = torch.minimum(tick[:, None] + ahead, self.last[tick][:, None])
        inputs = ModelInput(images, image_mask, tokens, tokens != 0, state)
        return inputs, self.actions[chunk]
