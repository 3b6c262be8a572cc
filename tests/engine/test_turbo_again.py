"""Turbo's fast ticks and steps one by one: CPU, float32, twins, against the reference."""

import math

import pytest
import torch
from captured_support import Rerun, model, observation, unfit
from turbo_support import STAGE_TOLERANCE, cloned, relative, twins

from turbopi.engine.eager import EagerEngine
from turbopi.engine.integrate import FixedPrefix, Guidance, steps_at, uniform_steps
from turbopi.engine.reuse import AgainEngine, SteppingEngine, copied
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo.ops import twin_ops
from turbopi.errors import InputError, NonFiniteActionsError

KINDS = ["pi0-tiny", "pi05-tiny"]


@pytest.mark.parametrize("name", KINDS)
def test_a_fast_tick_is_stage_three_over_the_last_whole_tick(name: str) -> None:
    reference = model(name)
    engine = twins(reference)
    assert isinstance(engine, AgainEngine)
    assert isinstance(engine, SteppingEngine)
    (x, noise), (y, other) = observation(engine.config, [9]), observation(engine.config, [9], seed=1)
    engine.sample_actions(x, noise, 2)
    cache = engine.last_cache()
    assert engine.holds(cache)
    eager = EagerEngine(reference, "fp32")
    whole = eager.prefill(eager.encode_images(x.images, x.image_mask), x.image_mask, x.tokens, x.token_mask)
    for state, start in ((y.state, other), (x.state, noise)):
        expected = eager.denoise(whole, state, start, 2)
        assert relative(engine.sample_again(cache, state, start, 2), expected) <= STAGE_TOLERANCE


def test_a_copy_outlives_other_ticks() -> None:
    engine = twins(model())
    x, noise = observation(engine.config, [9])
    engine.sample_actions(x, noise, 2)
    cache = engine.last_cache()
    kept = copied(cache)
    expected = engine.sample_again(cache, x.state, noise, 2)
    engine.sample_actions(*observation(engine.config, [30], seed=2), 2)
    assert not engine.holds(cache)
    assert not engine.holds(kept)
    with pytest.raises(RuntimeError, match="something was computed over this PrefixCache"):
        engine.sample_again(cache, x.state, noise, 2)
    assert torch.equal(engine.sample_again(kept, x.state, noise, 2), expected)


def test_there_is_no_last_cache_before_a_tick_or_behind_a_stage() -> None:
    engine = twins(model())
    with pytest.raises(RuntimeError, match="was not a whole tick; run one first"):
        engine.last_cache()
    x, noise = observation(engine.config, [9])
    engine.sample_actions(x, noise, 1)
    engine.prefill(engine.encode_images(x.images, x.image_mask), x.image_mask, x.tokens, x.token_mask)
    with pytest.raises(RuntimeError, match="was not a whole tick"):
        engine.last_cache()


def test_a_failed_tick_leaves_no_last_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Least of all the one of the observation before it."""
    engine = twins(model())
    x, noise = observation(engine.config, [9])
    engine.sample_actions(x, noise, 2)
    cache = engine.last_cache()
    y, _ = observation(engine.config, [9], seed=1)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        engine.sample_actions(y, noise, 0)
    assert engine.holds(cache)
    with monkeypatch.context() as broken:
        broken.setattr(engine, "_vision", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.sample_actions(y, noise, 2)
    assert not engine.holds(cache)
    with pytest.raises(RuntimeError, match="was not a whole tick"):
        engine.last_cache()
    engine.sample_actions(y, noise, 2)
    assert engine.holds(engine.last_cache())


def test_encoding_other_images_leaves_the_cache_alone() -> None:
    """A similarity gate looks at new image tokens before it decides to use the old cache."""
    engine = twins(model())
    x, noise = observation(engine.config, [20])
    engine.sample_actions(x, noise, 2)
    cache = engine.last_cache()
    expected = engine.sample_again(cache, x.state, noise, 2)
    y, _ = observation(engine.config, [20], seed=1)
    engine.encode_images(y.images, y.image_mask)
    assert torch.equal(engine.sample_again(cache, x.state, noise, 2), expected)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("guide", [False, True])
def test_integrate_is_eagers(name: str, guide: bool) -> None:
    reference = model(name)
    engine, eager = twins(reference), EagerEngine(reference, "fp32")
    x, noise = observation(engine.config, [9, 14])
    previous = torch.randn(noise.shape, generator=torch.Generator().manual_seed(3))
    steering = Guidance(previous, torch.linspace(1, 0, 10), 10.0) if guide else None
    tokens = eager.encode_images(x.images, x.image_mask)
    cache = eager.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
    for steps in (uniform_steps(engine.config, 5), steps_at((1.0, 0.6, 0.1))):
        expected = eager.integrate(cache, x.state, noise, steps, steering)
        own = engine.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
        assert relative(engine.integrate(own, x.state, noise, steps, steering), expected) <= 2 * STAGE_TOLERANCE
        assert relative(engine.integrate(cloned(cache), x.state, noise, steps, steering), expected) <= 2e-5


def test_recorded_steps_repeat_and_new_guidance_records_nothing() -> None:
    recorder = Rerun()
    engine = TurboEngine(model(), "fp32", twin_ops(), recorder)
    steps = uniform_steps(engine.config, 3)
    engine.warm_up_stages(2, torch.float32, steps, 10.0)
    engine.warm_up_again(2, 3)
    prepared = recorder.recorded
    plain, eager = twins(model()), EagerEngine(model(), "fp32")
    for seed in range(3):
        x, noise = observation(engine.config, [9 + 20 * seed], seed=seed)
        steering = Guidance(torch.randn_like(noise), torch.linspace(1, 0, 10), 10.0)
        tokens = engine.encode_images(x.images, x.image_mask)
        cache = engine.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
        whole = eager.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
        ours = engine.integrate(cache, x.state, noise, steps, steering)
        assert torch.equal(ours, engine.integrate(cache, x.state, noise, steps, steering))
        assert relative(ours, eager.integrate(whole, x.state, noise, steps, steering)) <= 2e-5
        assert plain.config == engine.config
    assert recorder.recorded == prepared


def test_a_kept_cache_of_any_length_records_nothing() -> None:
    """Its rows may fit buckets of other cameras: kept ones are copied into the smallest that holds them."""
    recorder = Rerun()
    engine = TurboEngine(model(), "fp32", twin_ops(), recorder)
    steps = uniform_steps(engine.config, 2)
    engine.warm_up_stages(2, torch.float32, steps, None)
    engine.warm_up_again(2, 2)
    prepared = recorder.recorded
    for length in range(1, engine.config.max_tokens + 1, 7):
        x, noise = observation(engine.config, [length])
        cache = engine.prefill(engine.encode_images(x.images, x.image_mask), x.image_mask, x.tokens, x.token_mask)
        expected = engine.integrate(cache, x.state, noise, steps)
        kept = copied(cache)
        assert relative(engine.sample_again(kept, x.state, noise, 2), expected) <= 1e-6
        assert relative(engine.integrate(kept, x.state, noise, steps), expected) <= 1e-6
    assert recorder.recorded == prepared


def test_steering_that_turbo_cannot_do() -> None:
    engine = twins(model())
    x, noise = observation(engine.config, [9])
    cache = engine.prefill(engine.encode_images(x.images, x.image_mask), x.image_mask, x.tokens, x.token_mask)
    steps = uniform_steps(engine.config, 2)
    for steering in (FixedPrefix(noise, 2), Guidance(noise, torch.ones(10), 10.0, true_jacobian=True)):
        with pytest.raises(ValueError, match="use the engine 'eager'"):
            engine.integrate(cache, x.state, noise, steps, steering)


def test_state_and_noise_that_do_not_fit_the_cache_are_refused() -> None:
    engine = twins(model())
    x, noise = observation(engine.config, [9, 20])
    engine.sample_actions(x, noise, 2)
    cache, steps = engine.last_cache(2), uniform_steps(engine.config, 2)
    for what, state, start in unfit(x, noise):
        with pytest.raises(InputError, match=f"^{what} is .*float.*, expected"):
            engine.sample_again(cache, state, start, 2)
        with pytest.raises(InputError, match=f"^{what} is .*float.*, expected"):
            engine.integrate(cache, state, start, steps)


def test_not_a_number_is_said() -> None:
    broken = model()
    engine = twins(broken)
    x, noise = observation(engine.config, [9])
    engine.sample_actions(x, noise, 1)
    cache = engine.last_cache()
    with torch.no_grad():
        noise[0, 0, 0] = math.inf
    with pytest.raises(NonFiniteActionsError):
        engine.sample_again(cache, x.state, noise, 1)
    with pytest.raises(NonFiniteActionsError):
        engine.sample_again(copied(cache), x.state, noise, 1)
