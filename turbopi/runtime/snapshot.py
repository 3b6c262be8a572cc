"""What a prefix is made of, which tick each part of it comes from, and which mixtures a mode allows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..model import ModelInput, PrefixCache
from .config import ReuseConfig
from .similarity import Pixels, pixels_of

TEXT, STATE = "text", "state"
SAMPLE = 997
"""Every so many pixels are compared first: two frames of a moving scene differ in them."""


class MixtureError(ValueError):
    """A PrefixCache whose parts come from ticks that its mode does not let stand together."""


@dataclass(frozen=True, eq=False)
class PrefixInput:
    """One tick's prefix on the host.

    Its parts: each valid camera ("camera0", …), "text", the prompt's tokens before the state, and "state", the
    tokens from the state on, whose positions depend on it. Either of the last two may be empty.

    Attributes:
        cameras: slots of the valid cameras, in order.
        images: (cameras,3,S,S) of these slots, float32 or uint8.
        tokens: (n,) int64, valid prompt tokens.
        text: how many of them are text.
        state: (state_dim,) float32, normalised.
        rows: image tokens a camera.
    """

    cameras: tuple[int, ...]
    images: np.ndarray
    tokens: np.ndarray
    text: int
    state: np.ndarray
    rows: int

    @classmethod
    def of(cls, inputs: ModelInput, config: ModelConfig, text: int | None) -> PrefixInput:
        """Of one checked observation on the CPU; `text` None counts the whole prompt as text.

        Looks at the observation's own memory where it can: nobody may write into that later.
        """
        # By numpy: indexing a tensor takes ten times as long.
        cameras = tuple(slot for slot, valid in enumerate(inputs.image_mask.numpy()[0].tolist()) if valid)
        tokens = inputs.tokens.numpy()[0][inputs.token_mask.numpy()[0]]
        images = inputs.images.numpy()[0]
        first = cameras == tuple(range(len(cameras)))
        images = images[: len(cameras)] if first else images[list(cameras)]
        known = len(tokens) if text is None else min(text, len(tokens))
        return cls(cameras, images, tokens, known, inputs.state.numpy()[0], config.vision.tokens)

    @cached_property
    def pixels(self) -> Pixels:
        """What a gate on images compares."""
        return pixels_of(self.images)

    @property
    def parts(self) -> tuple[str, ...]:
        """In the order of their rows."""
        tail = ((TEXT,) if self.text else ()) + ((STATE,) if self.text < len(self.tokens) else ())
        return (*(f"camera{slot}" for slot in self.cameras), *tail)

    @property
    def length(self) -> int:
        """Rows in all."""
        return len(self.cameras) * self.rows + len(self.tokens)

    def span(self, part: str) -> slice:
        """The rows of a part."""
        images = len(self.cameras) * self.rows
        if part == TEXT:
            return slice(images, images + self.text)
        if part == STATE:
            return slice(images + self.text, self.length)
        place = self.cameras.index(int(part.removeprefix("camera")))
        return slice(place * self.rows, (place + 1) * self.rows)

    def reused(self, parts: Collection[str]) -> Tensor:
        """(length,) bool, the rows of these parts."""
        rows = torch.zeros(self.length, dtype=torch.bool)
        for part in parts:
            rows[self.span(part)] = True
        return rows

    def same_prompt(self, other: PrefixInput) -> bool:
        """Whether cameras and text are the same, so that rows lie in the same places."""
        return (
            self.cameras == other.cameras
            and self.text == other.text
            and np.array_equal(self.tokens[: self.text], other.tokens[: other.text])
        )

    def identical(self, other: PrefixInput) -> bool:
        """Whether nothing in the prefix differs, to the bit."""
        if self.cameras != other.cameras or not np.array_equal(self.tokens, other.tokens):
            return False
        return self.same_frames(other)

    def same_frames(self, other: PrefixInput) -> bool:
        """Whether no pixel of the same cameras differs."""
        if self.images.dtype != other.images.dtype:
            return False
        ours, theirs = self.images.ravel(), other.images.ravel()
        return np.array_equal(ours[::SAMPLE], theirs[::SAMPLE]) and np.array_equal(ours, theirs)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A PrefixCache and where it comes from.

    Attributes:
        cache: as the engine gave it.
        kept: the same in memory that nothing is computed over.
        seen: the tick that all parts were computed from; for mixed parts, the latest one.
        ids: of each part, the tick whose observation it is.
        image_tokens: (1,cameras,S,width) of stage 1, where the mode needs them.
    """

    cache: PrefixCache
    kept: PrefixCache
    seen: PrefixInput
    ids: Mapping[str, int]
    image_tokens: Tensor | None = None

    @property
    def tick(self) -> int:
        """The oldest part's."""
        return min(self.ids.values())

    @property
    def synchronised(self) -> bool:
        """Whether all parts come from one tick."""
        return len(set(self.ids.values())) <= 1


def check_mixture(ids: Mapping[str, int], tick: int, config: ReuseConfig | None) -> None:
    """Refuse a cache that the mode does not allow at `tick`.

    Raises MixtureError, which names the parts and the ticks that they come from.
    """
    mode = "full" if config is None else config.mode
    if mode == "full" and config is not None and not config.synchronised:
        return
    if mode == "full":
        old = set(ids)
    elif mode in ("vision_only", "layer_wise"):
        old = {part for part in ids if part not in (TEXT, STATE)}
    else:
        old = {STATE if mode == "state_only" else TEXT} & set(ids)
    together = {ids[part] for part in old}
    fresh = {part: origin for part, origin in ids.items() if part not in old and origin != tick}
    if len(together) > 1 or fresh:
        shown = ", ".join(f"{part} of tick {origin}" for part, origin in ids.items())
        raise MixtureError(
            f"mode {mode!r} at tick {tick} does not allow this mixture: {shown}; recompute the prefix, or choose "
            "synchronised=False"
        )
