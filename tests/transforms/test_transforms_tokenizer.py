"""The shipped tokenizer, both file formats, and where a tokenizer is looked for."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from turbopi.config import preset
from turbopi.errors import InputError
from turbopi.transforms import (
    JsonTokenizer,
    SentencePieceTokenizer,
    find_tokenizer,
    load_tokenizer,
    openpi_data_home,
    shipped_tokenizer,
)

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_tokenizer.py"
NEWLINE = 4


@pytest.fixture(scope="module")
def shipped() -> SentencePieceTokenizer:
    tokenizer = load_tokenizer(shipped_tokenizer())
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


def test_the_shipped_tokenizer_fits_the_small_models(shipped):
    assert shipped.vocab_size == 1024 == preset("pi0-tiny").vocab_size == preset("pi05-small").vocab_size
    model = sentencepiece.SentencePieceProcessor(model_file=str(shipped_tokenizer()))
    assert [model.pad_id(), model.eos_id(), model.bos_id(), model.unk_id()] == [0, 1, 2, 3]


# sentencepiece itself spells a space as U+2581, so that one character comes back as a space.
@given(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
@settings(max_examples=500, deadline=None)
def test_any_text_survives(shipped, text):
    ids = shipped.encode(text)
    assert all(NEWLINE <= i < 1024 for i in ids)  # never unknown, nor a control token
    assert shipped.decode(ids) == text


def test_the_one_character_that_does_not_survive(shipped):
    assert shipped.decode(shipped.encode("a\u2581b")) == "a b"


@pytest.mark.parametrize("text", ["\n", "a\nb", "\n\n", " \n ", "State: 1;\nAction: "])
def test_a_line_end_is_a_token_of_its_own(shipped, text):
    assert shipped.encode(text).count(NEWLINE) == text.count("\n")


def test_every_state_bin_is_spelled_digit_by_digit(shipped):
    digits = {shipped.encode(str(d))[0] for d in range(10)}
    assert len(digits) == 10
    for number in range(-1, 256):
        ids = shipped.encode(f" {number}")
        assert sum(i in digits for i in ids) == len(str(abs(number)))
        assert shipped.decode(ids) == f" {number}"


def test_prompts_of_the_tiny_models_fit(shipped):
    task = "pick up the black bowl in the top drawer of the wooden cabinet and place it on the plate"
    assert len(shipped.encode(task)) == 19
    state = " ".join(["128"] * 8)
    assert len(shipped.encode(f"Task: {task}, State: {state};\nAction: ")) < preset("pi05-tiny").max_tokens


def test_the_training_script_makes_the_shipped_file(tmp_path):
    spec = importlib.util.spec_from_file_location("train_tokenizer", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    data = script.train()
    assert data == script.train()
    if sentencepiece.__version__.startswith("0.2."):
        assert data == shipped_tokenizer().read_bytes()


def test_text_that_is_not_unicode_is_refused(shipped, json_path):
    for tokenizer in (shipped, load_tokenizer(json_path)):
        with pytest.raises(InputError, match="not valid Unicode text"):
            tokenizer.encode("lift \ud800")


def write_json(path: Path, bos: int = 2, image: int = 300) -> Path:
    """A tokenizer.json like PaliGemma's in small: byte fallback, "\\n" of its own, an image token beyond the rest."""
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": bos, "<unk>": 3, "\n": 4} | {f"<0x{b:02X}>": 5 + b for b in range(256)}
    vocab = {"<other>": 2} | vocab if bos != 2 else vocab
    vocab |= {"▁": 261, "a": 262, "b": 263, "▁a": 264}
    specials = {"<pad>": 0, "<eos>": 1, "<bos>": bos, "<unk>": 3, "<image>": image}
    added = [{"id": i, "content": t, "special": True} for t, i in specials.items()]
    added.append({"id": 4, "content": "\n", "special": False})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document = {
        "version": "1.0",
        "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": None,
        "added_tokens": [a | flags for a in sorted(added, key=lambda a: a["id"])],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [bos], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [["▁", "a"]],
        },
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def json_path(tmp_path: Path) -> Path:
    return write_json(tmp_path / "tokenizer.json")


def test_a_tokenizer_json(json_path):
    tokenizer = load_tokenizer(json_path)
    assert isinstance(tokenizer, JsonTokenizer)
    # No BOS is added and the file's own truncation to 3 is off.
    assert tokenizer.encode("b a\nab") == [263, 264, 4, 262, 263]
    assert tokenizer.decode([263, 264, 4, 262, 263]) == "b a\nab"
    assert tokenizer.encode("") == []


def test_special_tokens_in_a_prompt_are_plain_text(json_path):
    tokenizer = load_tokenizer(json_path)
    assert tokenizer.vocab_size == 265  # the image token's 300 is no text
    for text in ("<image>", "<eos>", "<bos>"):
        ids = tokenizer.encode(text)
        assert all(4 < i < 265 for i in ids)
        assert tokenizer.decode(ids) == text


def test_a_foreign_bos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has BOS id 270, expected 2"):
        load_tokenizer(write_json(tmp_path / "tokenizer.json", bos=270))


@pytest.mark.parametrize(
    ("name", "kind"), [("tokenizer.model", "a sentencepiece model"), ("tokenizer.json", "a tokenizer.json")]
)
def test_broken_files(tmp_path, name, kind):
    path = tmp_path / name
    path.write_bytes(b"not a tokenizer")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is not {kind}.*pass the tokenizer's path"):
        load_tokenizer(path)


def test_other_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*absent\.model"):
        load_tokenizer(tmp_path / "absent.model")
    (tmp_path / "tokenizer.txt").write_text("a")
    with pytest.raises(
        ValueError, match=r"cannot tell the kind .*tokenizer.txt, expected a name ending in .model or .json"
    ):
        load_tokenizer(tmp_path / "tokenizer.txt")


def test_where_a_tokenizer_is_looked_for(tmp_path):
    checkpoint, cache = tmp_path / "checkpoint", tmp_path / "cache"
    explicit, cached = tmp_path / "mine.model", cache / "big_vision" / "paligemma_tokenizer.model"
    checkpoint.mkdir()
    cached.parent.mkdir(parents=True)

    with pytest.raises(FileNotFoundError) as nothing:
        find_tokenizer(None, checkpoint, data_home=cache)
    for place in (checkpoint / "tokenizer.model", checkpoint / "tokenizer.json", cached):
        assert str(place) in str(nothing.value)
    assert "copy it into the checkpoint" in str(nothing.value)

    cached.touch()
    assert find_tokenizer(None, checkpoint, data_home=cache) == cached
    assert find_tokenizer(data_home=cache) == cached
    for name in ("tokenizer.json", "paligemma_tokenizer.model", "tokenizer.model"):
        (checkpoint / name).touch()
        assert find_tokenizer(None, checkpoint, data_home=cache) == checkpoint / name
    with pytest.raises(FileNotFoundError, match=r"looked at .*mine\.model; pass"):
        find_tokenizer(explicit, checkpoint, data_home=cache)
    explicit.touch()
    assert find_tokenizer(explicit, checkpoint, data_home=cache) == explicit


def test_openpis_cache(tmp_path, monkeypatch):
    assert openpi_data_home({"OPENPI_DATA_HOME": "/data/openpi"}) == Path("/data/openpi")
    assert openpi_data_home({}) == Path.home() / ".cache" / "openpi"
    assert openpi_data_home({"OPENPI_DATA_HOME": ""}) == Path.home() / ".cache" / "openpi"
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "big_vision"))):
        find_tokenizer()
