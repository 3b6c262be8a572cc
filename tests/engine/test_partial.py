"""Part of a prefix recomputed, against the reference and against what reusing means."""

import dataclasses

import pytest
import torch
from captured_support import model, observation

from turbopi import ModelInput
from turbopi.engine.eager import EagerEngine
from turbopi.engine.partial import OldRows, PartialCache

KINDS = ["pi0-tiny", "pi05-tiny"]
DEPTH, IMAGE = 3, 32
"""Layers, and rows of the two cameras' 16 tokens each."""


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest) -> EagerEngine:
    return EagerEngine(model(request.param), "fp32")


def computed(engine: EagerEngine, x: ModelInput, layers: int = DEPTH, old: OldRows | None = None) -> PartialCache:
    tokens = engine.encode_images(x.images, x.image_mask)
    return engine.prefill_partial(tokens, x.image_mask, x.tokens, x.token_mask, layers, old)


def two_ticks(engine: EagerEngine) -> tuple[ModelInput, ModelInput]:
    first, _ = observation(engine.config, [9])
    second, _ = observation(engine.config, [9], seed=1)
    return first, second


@pytest.mark.parametrize("layers", [0, 1, DEPTH])
def test_all_rows_fresh_is_the_references_cache(engine: EagerEngine, layers: int) -> None:
    x, _ = two_ticks(engine)
    tokens = engine.encode_images(x.images, x.image_mask)
    expected = engine.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
    cache = computed(engine, x, layers)
    assert all(torch.equal(a, b) for a, b in zip(cache.keys, expected.keys, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(cache.values, expected.values, strict=True))
    assert torch.equal(cache.lengths, expected.lengths)
    assert cache.valid is None
    assert (cache.hidden is None) == (layers == DEPTH)


@pytest.mark.parametrize("layers", [1, DEPTH])
def test_rows_taken_from_the_same_observation_change_nothing(engine: EagerEngine, layers: int) -> None:
    x, _ = two_ticks(engine)
    whole = computed(engine, x, layers)
    reused = torch.arange(IMAGE + 9) < IMAGE
    cache = computed(engine, x, layers, OldRows(whole, reused))
    for ours, theirs in zip((*cache.keys, *cache.values), (*whole.keys, *whole.values), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)


def test_reused_rows_keep_their_bits_and_fresh_ones_see_them(engine: EagerEngine) -> None:
    first, second = two_ticks(engine)
    old, fresh = computed(engine, first), computed(engine, second)
    reused = torch.arange(IMAGE + 9) < IMAGE
    cache = computed(engine, second, DEPTH, OldRows(old, reused))
    for layer in range(DEPTH):
        assert torch.equal(cache.keys[layer][:, :, :IMAGE], old.keys[layer][:, :, :IMAGE])
    # The prompt's first layer depends on its tokens alone; behind it, on the old images.
    assert torch.allclose(cache.keys[0][:, :, IMAGE:], fresh.keys[0][:, :, IMAGE:], atol=1e-5)
    assert not torch.allclose(cache.keys[2][:, :, IMAGE:], fresh.keys[2][:, :, IMAGE:], atol=1e-3)


def test_no_layers_taken_over_is_the_old_embedding(engine: EagerEngine) -> None:
    """Layers 0: the image tokens are old, and everything behind them is computed from these."""
    first, second = two_ticks(engine)
    mixed = dataclasses.replace(second, images=first.images)
    reused = torch.arange(IMAGE + 9) < IMAGE
    cache = computed(engine, second, 0, OldRows(computed(engine, first, 0), reused))
    expected = computed(engine, mixed, 0)
    for ours, theirs in zip((*cache.keys, *cache.values), (*expected.keys, *expected.values), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)


def test_layers_in_between(engine: EagerEngine) -> None:
    """Below the layer the old rows keep their bits; from it on, every row is computed anew and sees the new prompt."""
    first, second = two_ticks(engine)
    old = computed(engine, first, 2)
    cache = computed(engine, second, 2, OldRows(old, torch.arange(IMAGE + 9) < IMAGE))
    for layer in (0, 1):
        assert torch.equal(cache.keys[layer][:, :, :IMAGE], old.keys[layer][:, :, :IMAGE])
    assert torch.allclose(cache.keys[2][:, :, :IMAGE], old.keys[2][:, :, :IMAGE], atol=1e-5)


@pytest.mark.parametrize("tokens", [5, 14])
def test_the_prompt_may_grow_and_shrink_behind_old_images(engine: EagerEngine, tokens: int) -> None:
    first, _ = two_ticks(engine)
    other, _ = observation(engine.config, [tokens])
    old = computed(engine, first)
    cache = computed(engine, other, DEPTH, OldRows(old, torch.arange(IMAGE + tokens) < IMAGE))
    assert cache.lengths.tolist() == [IMAGE + tokens]
    assert torch.equal(cache.values[2][:, :, :IMAGE], old.values[2][:, :, :IMAGE])


def test_what_does_not_fit_is_said(engine: EagerEngine) -> None:
    first, second = two_ticks(engine)
    old = computed(engine, first)
    with pytest.raises(
        ValueError, match="40 of 40 prefix rows are to be taken from an old cache of 41, but this obser"
    ):
        computed(engine, second, DEPTH, OldRows(old, torch.ones(40, dtype=torch.bool)))
    longer, _ = observation(engine.config, [12])
    with pytest.raises(ValueError, match="44 of 44 prefix rows are to be taken from an old cache of 41"):
        computed(engine, longer, DEPTH, OldRows(old, torch.ones(44, dtype=torch.bool)))
    with pytest.raises(ValueError, match="kept for 3 layers, 1 were asked for"):
        computed(engine, second, 1, OldRows(old, torch.ones(41, dtype=torch.bool)))
    with pytest.raises(ValueError, match="layers is 4; the prefix has 3"):
        computed(engine, second, 4)
    pair, _ = observation(engine.config, [9, 9])
    with pytest.raises(ValueError, match="for one observation with invalid_tokens='dropped', not for 2"):
        computed(engine, pair)


def test_an_embedded_prompt_gives_the_same_bits(engine: EagerEngine) -> None:
    x, _ = observation(engine.config, [9, 5])
    tokens = engine.encode_images(x.images, x.image_mask)
    expected = engine.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
    ours = engine.prefill_embedded(tokens, x.image_mask, engine.embed_prompt(x.tokens), x.token_mask)
    assert all(torch.equal(a, b) for a, b in zip(ours.keys, expected.keys, strict=True))
