"""Caches that the turbo engine hands out, and those that come from elsewhere: CPU, float32, twins, no graphs."""

import dataclasses

import pytest
import torch
from captured_support import model, observation
from turbo_support import STAGE_TOLERANCE, cloned, model_like, relative, twins

from turbopi import Pi0
from turbopi.engine.turbo import TurboEngine
from turbopi.model import PrefixCache

THREE = (True, True, True)


@pytest.fixture(params=["pi0-tiny", "pi05-tiny", "pi0-small", "pi05-small"])
def reference(request: pytest.FixtureRequest) -> Pi0:
    return model(request.param)


def prefilled(engine: TurboEngine, lengths: list[int], seed: int = 0) -> tuple[PrefixCache, torch.Tensor, torch.Tensor]:
    x, noise = observation(engine.config, lengths, seed=seed)
    tokens = engine.encode_images(x.images, x.image_mask)
    return engine.prefill(tokens, x.image_mask, x.tokens, x.token_mask), x.state, noise


@pytest.mark.parametrize("masked", ["dropped", "masked"])
@pytest.mark.parametrize("lengths", [[9], [9, 20], [12, 12]])
def test_a_cache_from_the_reference(reference: Pi0, lengths: list[int], masked: str) -> None:
    other = model_like(reference, invalid_tokens=masked)
    x, noise = observation(reference.config, lengths)
    with torch.no_grad():
        tokens = other.encode_images(x.images, x.image_mask)
        cache = other.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
        expected = other.denoise(cache, x.state, noise, 2)
    assert relative(twins(reference).denoise(cache, x.state, noise, 2), expected) <= STAGE_TOLERANCE


def test_a_clone_outlives_the_next_prefill(reference: Pi0) -> None:
    engine = twins(reference)
    cache, state, noise = prefilled(engine, [9, 20])
    expected, kept = engine.denoise(cache, state, noise, 2), cloned(cache)
    assert torch.equal(engine.denoise(cache, state, noise, 2), expected)
    prefilled(engine, [5, 40], seed=1)
    assert relative(engine.denoise(kept, state, noise, 2), expected) <= STAGE_TOLERANCE


@pytest.mark.parametrize("then", ["prefill", "tick", "foreign"])
def test_a_cache_that_was_computed_over_is_refused(reference: Pi0, then: str) -> None:
    engine = twins(reference)
    cache, state, noise = prefilled(engine, [9])
    if then == "prefill":
        prefilled(engine, [40], seed=1)
    elif then == "tick":
        engine.sample_actions(*observation(engine.config, [9], seed=1), 1)
    else:
        engine.denoise(cloned(cache), state, noise, 1)
    with pytest.raises(RuntimeError, match="computed over this PrefixCache"):
        engine.denoise(cache, state, noise, 1)


def test_a_cache_that_was_computed_over_is_refused_with_other_lengths_too(reference: Pi0) -> None:
    engine = twins(reference)
    cache, state, noise = prefilled(engine, [9])
    prefilled(engine, [9], seed=1)
    with pytest.raises(RuntimeError, match="computed over this PrefixCache"):
        engine.denoise(dataclasses.replace(cache, lengths=cache.lengths.clone()), state, noise, 1)


@pytest.mark.parametrize("part", ["keys", "values", "valid", "lengths"])
def test_what_was_put_into_a_cache_is_what_is_read(reference: Pi0, part: str) -> None:
    """The bucket that the changed cache is copied into is a smaller one, over the memory of its own."""
    engine = twins(reference)
    x, noise = observation(engine.config, [9, 40], [THREE, (True, False, False)])
    cache = engine.prefill(engine.encode_images(x.images, x.image_mask), x.image_mask, x.tokens, x.token_mask)
    assert cache.valid is not None
    other = tuple(torch.randn_like(layer) for layer in cache.keys)
    fewer = dataclasses.replace(cache, valid=cache.valid.roll(1, dims=1) & cache.valid)
    changed = {
        "keys": dataclasses.replace(cache, keys=other),
        "values": dataclasses.replace(cache, values=other),
        "valid": dataclasses.replace(fewer, lengths=fewer.visible.sum(dim=1)),
        "lengths": dataclasses.replace(cache, lengths=cache.lengths.clone()),
    }[part]
    with pytest.raises(ValueError, match="keeps no mask, so both must agree"):
        engine.denoise(fewer, x.state, noise, 2)
    plain = cloned(changed)
    with torch.no_grad():
        expected = reference.denoise(plain, x.state, noise, 2)
    assert not engine.holds(changed)
    assert relative(engine.denoise(changed, x.state, noise, 2), expected) <= STAGE_TOLERANCE


def test_other_batch_sizes_and_images_leave_a_cache_alone(reference: Pi0) -> None:
    engine = twins(reference)
    cache, state, noise = prefilled(engine, [9])
    expected = engine.denoise(cache, state, noise, 2)
    prefilled(engine, [40, 3], seed=1)
    x, _ = observation(engine.config, [30], [THREE], seed=2)
    engine.encode_images(x.images, x.image_mask)
    assert torch.equal(engine.denoise(cache, state, noise, 2), expected)


def test_lengths_that_are_not_the_valid_tokens_are_refused(reference: Pi0) -> None:
    engine = twins(reference)
    cache, state, noise = prefilled(engine, [9])
    shifted = dataclasses.replace(cache, lengths=cache.lengths + 1)
    with pytest.raises(ValueError, match="keeps no mask, so both must agree"):
        engine.denoise(shifted, state, noise, 1)


def test_a_cache_that_is_too_long_is_refused(reference: Pi0) -> None:
    engine, config = twins(reference), reference.config
    rows = config.prefix_slots + 1
    layer = torch.zeros(1, config.vlm.kv_heads, rows, config.vlm.head_dim)
    cache = PrefixCache((layer,) * config.vlm.depth, (layer,) * config.vlm.depth, torch.tensor([rows]), None)
    _, noise = observation(config, [1])
    with pytest.raises(ValueError, match=f"holds {rows} tokens, the turbo engine at most"):
        engine.denoise(cache, torch.zeros(1, config.state_dim), noise, 1)
