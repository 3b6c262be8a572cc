"""Tokenizers: text to ids, from a sentencepiece `.model` or a Hugging Face `tokenizer.json`, and where to find one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from ..errors import InputError

BOS_ID = 2
"""Id that starts every prompt, in PaliGemma's vocabulary and in our own (SPEC 2.5)."""

CHECKPOINT_FILES = ("tokenizer.model", "paligemma_tokenizer.model", "tokenizer.json")
"""Names under which a checkpoint directory may carry its tokenizer, in the order of looking."""

_OPENPI_FILE = Path("big_vision") / "paligemma_tokenizer.model"
_REMEDY = (
    "pass the tokenizer's path, or copy it into the checkpoint as tokenizer.model (sentencepiece; openpi keeps it at "
    "~/.cache/openpi/big_vision/paligemma_tokenizer.model) or as tokenizer.json (PaliGemma's, from a Hugging Face copy)"
)


class Tokenizer(Protocol):
    """What the prompt needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without a beginning-of-sequence id."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that ordinary text can give."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece `.model` file, such as PaliGemma's."""

    def __init__(self, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is not a sentencepiece model: {error}; {_REMEDY}") from error
        _check_bos(self._processor.bos_id(), path)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS. Raises InputError for text that is not valid Unicode."""
        return list(self._processor.encode(_checked(text)))

    def decode(self, ids: Sequence[int]) -> str:
        """The inverse of `encode`."""
        return str(self._processor.decode(list(ids)))

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self._processor.get_piece_size())


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`, such as PaliGemma's or Gemma's.

    Special tokens spelled out in a prompt are read as plain text, as sentencepiece does: a prompt cannot smuggle in an
    end of sequence, or PaliGemma's image placeholder, whose id lies beyond the model's embedding.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}; {_REMEDY}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        _check_bos(self._tokenizer.token_to_id("<bos>"), path)
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self._vocab_size = 1 + max((i for i in vocab.values() if i not in special), default=BOS_ID)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS. Raises InputError for text that is not valid Unicode."""
        return list(self._tokenizer.encode(_checked(text), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The inverse of `encode`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    @property
    def vocab_size(self) -> int:
        """One more than the highest id of a token that is not special."""
        return self._vocab_size


def _check_bos(bos: int | None, path: Path) -> None:
    if bos != BOS_ID:
        raise ValueError(
            f"{path} has BOS id {bos}, expected {BOS_ID} as in PaliGemma's vocabulary; "
            "this tokenizer does not belong to a π0 or π0.5 model"
        )


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not valid Unicode text: {error}; send UTF-8") from error
    return text


def load_tokenizer(path: Path) -> SentencePieceTokenizer | JsonTokenizer:
    """Open a tokenizer by its ending: `.model` or `.json`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, unreadable contents, or a BOS id other than 2.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; {_REMEDY}")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return JsonTokenizer(path)
    raise ValueError(f"cannot tell the kind of tokenizer {path}, expected a name ending in .model or .json; {_REMEDY}")


def shipped_tokenizer() -> Path:
    """The small tokenizer that ships with Turbo-Pi (vocabulary 1024), for small models trained with it."""
    return Path(__file__).parents[1] / "assets" / "robot_tokenizer.model"


def openpi_data_home(environment: Mapping[str, str] = os.environ) -> Path:
    """openpi's download cache: $OPENPI_DATA_HOME, or ~/.cache/openpi."""
    return Path(environment.get("OPENPI_DATA_HOME") or "~/.cache/openpi").expanduser()


def find_tokenizer(
    explicit: Path | None = None, checkpoint: Path | None = None, *, data_home: Path | None = None
) -> Path:
    """Where the tokenizer of a model is: the path given, else in its checkpoint, else in openpi's cache.

    Args:
        explicit: a path that the user chose; no other place is looked at then.
        checkpoint: the checkpoint's directory.
        data_home: openpi's cache; None asks `openpi_data_home`.

    Returns:
        An existing file.

    Raises:
        FileNotFoundError: names every place that was looked at, and the remedy.
    """
    if explicit is not None:
        places = [Path(explicit)]
    else:
        places = [] if checkpoint is None else [Path(checkpoint) / name for name in CHECKPOINT_FILES]
        places.append((openpi_data_home() if data_home is None else Path(data_home)) / _OPENPI_FILE)
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no tokenizer found; looked at {', '.join(map(str, places))}; {_REMEDY}")
