"""Prompt texts of both ports, state bins, and token slots."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transforms_support import LetterTokenizer

from turbopi.errors import InputError
from turbopi.transforms import PromptFormat, PromptTokenizer, clean_task, state_bins
from turbopi.transforms.prompt import parse_prompt

STATE = np.array([-1.5, -1.0, 0.0, 0.999, 2.0])
DIRTY = " Put_the\nBowl \n"


@pytest.mark.parametrize(
    ("form", "task", "parts"),
    [
        (PromptFormat("pi0", "openpi", False), DIRTY, ("Put the Bowl", "\n")),
        (PromptFormat("pi05", "openpi", False), DIRTY, ("Put the Bowl", "\n")),
        (
            PromptFormat("pi05", "openpi", True),
            DIRTY,
            ("Task: Put the Bowl, State: -1 0 128 255 255;\nAction: ",),
        ),
        (
            PromptFormat("pi05", "lerobot", True),
            DIRTY,
            ("Task: Put the Bowl, State: -1 0 128 255 255;\nAction: ",),
        ),
        (PromptFormat("pi0", "lerobot", False), DIRTY, (DIRTY,)),
        (PromptFormat("pi0", "lerobot", False), "open_it ", ("open_it \n",)),
    ],
)
def test_texts(form, task, parts):
    assert form.parts(task, STATE) == parts


def test_formats_that_no_port_has():
    with pytest.raises(ValueError, match="π0 takes its state as a token"):
        PromptFormat("pi0", "openpi", True)
    with pytest.raises(ValueError, match="prompt_convention='openpi'"):
        PromptFormat("pi05", "lerobot", False)
    with pytest.raises(ValueError, match="prompt convention must be one of openpi, lerobot, got 'jax'"):
        PromptFormat("pi0", "jax", False)
    assert PromptFormat("pi05", "openpi", True).name == "openpi pi05, state in prompt"
    assert PromptFormat("pi0", "lerobot", False).name == "lerobot pi0"


@given(hnp.arrays(np.float64, st.integers(1, 14), elements=st.floats(-3, 3)))
@settings(max_examples=100, deadline=None)
def test_bins_hold_their_values(state):
    bins = state_bins(state)
    assert bins.min() >= -1
    assert bins.max() <= 255
    low = -1 + bins / 128
    assert ((bins == -1) == (state < -1)).all()
    inside = bins >= 0
    assert (state[inside] >= low[inside]).all()
    below_top = inside & (bins < 255)
    assert (state[below_top] < low[below_top] + 1 / 128).all()


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_cleaning_twice_changes_no_more_than_the_ends(task):
    clean = clean_task(task)
    assert "_" not in clean
    assert "\n" not in clean
    assert clean_task(clean) == clean.strip()


@pytest.mark.parametrize(
    "value",
    [
        "lift é",
        "lift é".encode(),
        np.str_("lift é"),
        np.array("lift é"),
        np.array(["lift é".encode()]),
        np.bytes_("lift é".encode()),
    ],
)
def test_text_in_every_form(value):
    task = parse_prompt(value)
    assert task == "lift é"
    assert type(task) is str


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"\xff", "prompt is bytes that are not UTF-8"),
        (3, "prompt is a int, expected text"),
        (None, "prompt is a NoneType"),
        (["lift"], "prompt is a list"),
        (np.array(["lift", "put"]), "prompt is a ndarray"),
        (np.array(3.0), "prompt is a ndarray"),
    ],
)
def test_what_is_not_text(value, said):
    with pytest.raises(InputError, match=said):
        parse_prompt(value)


def make(max_tokens: int, vocab_size: int = 2000) -> PromptTokenizer:
    return PromptTokenizer(LetterTokenizer(), PromptFormat("pi0", "openpi", False), max_tokens, vocab_size)


def test_tokens_are_padded_on_the_right():
    tokens, mask = make(8)("ab", STATE)
    assert tokens.tolist() == [2, 1097, 1098, 1010, 0, 0, 0, 0]
    assert mask.tolist() == [True] * 4 + [False] * 4
    assert tokens.dtype == np.int64
    assert mask.dtype == bool


def test_long_prompts_are_cut_on_the_right_and_reported_once(caplog):
    prompt = make(4)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            tokens, mask = prompt("abcdef", STATE)
    assert tokens.tolist() == [2, 1097, 1098, 1099]
    assert mask.all()
    assert [record.getMessage()[:49] for record in caplog.records] == [
        "a prompt of 8 tokens was cut to the model's 4; it"
    ]
    caplog.clear()
    make(4)("ab", STATE)  # exactly full
    assert not caplog.records


def test_a_tokenizer_too_large_for_the_model_is_refused():
    with pytest.raises(ValueError, match="has 2000 tokens but the model's embedding only 1999 rows"):
        make(4, vocab_size=1999)


def test_a_token_beyond_the_embedding_is_refused():
    with pytest.raises(InputError, match=r"token 2008, the model knows 0\.\.1999"):
        make(40)("\u03f0", STATE)
