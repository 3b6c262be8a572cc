"""Prompts: the text that each port builds from a task (and the state), and its tokens (SPEC 2.5)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import ModelKind
from ..errors import InputError
from .normalize import CONVENTIONS, Convention
from .tokenizer import BOS_ID, Tokenizer

_log = logging.getLogger(__name__)
_BIN_EDGES = np.linspace(-1, 1, 257)[:-1]


def parse_prompt(value: Any, name: str = "prompt") -> str:
    """The task as text: a str, UTF-8 bytes, or a numpy scalar or one-element array of either.

    Raises:
        InputError: anything else.
    """
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "USO":
        value = value.item()
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is bytes that are not UTF-8: {error}; send the task as text") from error
    if not isinstance(value, str):
        raise InputError(f"{name} is a {type(value).__name__}, expected text; send the task as one str")
    return str(value)


def clean_task(task: str) -> str:
    """Trim the ends; underscores and inner line ends become spaces. The case is kept."""
    return task.strip().replace("_", " ").replace("\n", " ")


def state_bins(state: np.ndarray) -> np.ndarray:
    """Number of the 1/128-wide bin of each normalised value: 0..255, and -1 below -1 (nothing is clipped there).

    Args:
        state: (dims,) normalised and not padded (trap 37).

    Returns:
        (dims,) int64.
    """
    return np.digitize(state, _BIN_EDGES) - 1


@dataclass(frozen=True)
class PromptFormat:
    """Which text a model was trained on.

    Attributes:
        kind: the model's.
        convention: "openpi", or "lerobot", which leaves π0's task as it is and always spells π0.5's state.
        state_in_prompt: whether the normalised state is spelled out, as bins.
    """

    kind: ModelKind
    convention: Convention
    state_in_prompt: bool

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise ValueError(f"prompt convention must be one of {', '.join(CONVENTIONS)}, got {self.convention!r}")
        if self.kind == "pi0" and self.state_in_prompt:
            raise ValueError("π0 takes its state as a token of its own, never in the prompt; set state_in_prompt=False")
        if self.kind == "pi05" and self.convention == "lerobot" and not self.state_in_prompt:
            raise ValueError(
                "lerobot's π0.5 always spells the state in the prompt; for a model trained without it choose "
                "prompt_convention='openpi'"
            )

    @property
    def name(self) -> str:
        """For reports: "openpi pi05, state in prompt"."""
        return f"{self.convention} {self.kind}{', state in prompt' if self.state_in_prompt else ''}"

    def parts(self, task: str, state: np.ndarray) -> tuple[str, ...]:
        """The texts that are encoded one after the other.

        openpi encodes the final line end by itself: a tokenizer that merges line ends would read it differently.
        """
        if self.state_in_prompt:
            numbers = " ".join(map(str, state_bins(state)))
            return (f"Task: {clean_task(task)}, State: {numbers};\nAction: ",)
        if self.convention == "lerobot":
            return (task if task.endswith("\n") else task + "\n",)
        return (clean_task(task), "\n")


@dataclass(frozen=True, eq=False)
class PromptTokenizer:
    """A task to the model's token slots.

    Attributes:
        tokenizer: of the model.
        text: the prompt's format.
        max_tokens: slots, T.
        vocab_size: rows of the model's token embedding.

    Raises ValueError when made, if the tokenizer can give ids that the model has no row for.
    """

    tokenizer: Tokenizer
    text: PromptFormat
    max_tokens: int
    vocab_size: int
    _warned: list[int] = field(default_factory=list, init=False, repr=False)
    _text: dict[tuple[str, int], int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tokenizer.vocab_size > self.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens but the model's embedding only "
                f"{self.vocab_size} rows: they do not belong together; pass the tokenizer that the model was "
                "trained with"
            )

    def __call__(self, task: str, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of one prompt.

        Args:
            task: as the client sent it.
            state: (dims,) normalised, not padded.

        Returns:
            tokens (T,) int64, 0 beyond the prompt, and mask (T,) bool. A longer prompt is cut at the right, with a
            warning in the log the first time.

        Raises:
            InputError: the text gives a token that the model has no row for.
        """
        ids = [BOS_ID]
        for part in self.text.parts(task, state):
            ids += self.tokenizer.encode(part)
        if max(ids) >= self.vocab_size:
            raise InputError(f"the prompt gives token {max(ids)}, the model knows 0..{self.vocab_size - 1}; reword it")
        if len(ids) > self.max_tokens:
            self._warn_cut(len(ids))
        ids = ids[: self.max_tokens]
        tokens = np.zeros(self.max_tokens, np.int64)
        tokens[: len(ids)] = ids
        return tokens, np.arange(self.max_tokens) < len(ids)

    def text_tokens(self, task: str, dims: int) -> int:
        """How many tokens of the prompt do not depend on the state's `dims` values; all, where it is not spelled.

        Found by spelling different states: a tokenizer may join a number with what stands before it. The last task's
        answer is remembered.
        """
        if (task, dims) not in self._text:
            self._text.clear()
            self._text[task, dims] = self._count_text(task, dims)
        return self._text[task, dims]

    def _count_text(self, task: str, dims: int) -> int:
        states = [np.full(dims, value) for value in (-2.0, -1.0, 0.0, 2.0)]
        spelled = [tokens[mask] for tokens, mask in (self(task, state) for state in states)]
        shortest = min(map(len, spelled))
        first = np.array([ids[:shortest] for ids in spelled])
        differ = np.flatnonzero((first != first[0]).any(axis=0))
        return int(differ[0]) if len(differ) else shortest

    def _warn_cut(self, length: int) -> None:
        if self._warned:
            return
        self._warned.append(length)
        _log.warning(
            "a prompt of %d tokens was cut to the model's %d; its end is lost, shorten the task "
            "(further cuts by this policy are not reported)",
            length,
            self.max_tokens,
        )
