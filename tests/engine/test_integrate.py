"""Times of one's own and steering: against the reference's loop, LeRobot's fixtures, and autograd."""

from pathlib import Path

import pytest
import torch
from captured_support import model, observation
from safetensors import safe_open

from turbopi import Pi0
from turbopi.audit.golden import open_golden
from turbopi.engine.eager import EagerEngine
from turbopi.engine.integrate import (
    EulerStep,
    FixedPrefix,
    Guidance,
    conditioned_velocity,
    guidance_strength,
    guided,
    steps_at,
    uniform_steps,
)
from turbopi.model import PrefixCache
from turbopi.runtime.guidance import guidance

KINDS = ["pi0-tiny", "pi05-tiny"]
RTC = sorted((Path(__file__).parents[1] / "data" / "rtc").glob("*.safetensors"))


def prepared(name: str, **changes: object) -> tuple[EagerEngine, PrefixCache, torch.Tensor, torch.Tensor]:
    engine = EagerEngine(model(name, **changes), "fp32")
    x, noise = observation(engine.config, [9, 14])
    tokens = engine.encode_images(x.images, x.image_mask)
    return engine, engine.prefill(tokens, x.image_mask, x.tokens, x.token_mask), x.state, noise


@pytest.mark.parametrize("numerics", ["exact", "lerobot"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_uniform_steps_are_the_references_bits(name: str, numerics: str, steps: int) -> None:
    engine, cache, state, noise = prepared(name, numerics=numerics)
    expected = engine.denoise(cache, state, noise, steps)
    assert torch.equal(engine.integrate(cache, state, noise, uniform_steps(engine.config, steps)), expected)


def test_given_times_step_from_each_to_the_next() -> None:
    assert steps_at((1.0, 0.5, 0.25)) == (EulerStep(1.0, -0.5), EulerStep(0.5, -0.25), EulerStep(0.25, -0.25))
    engine, cache, state, noise = prepared("pi05-tiny")
    x_t = noise
    for time, delta in ((1.0, -0.7), (0.3, -0.3)):
        x_t = x_t + delta * engine.model.velocity(cache, state, x_t, torch.full((2,), time))
    assert torch.allclose(engine.integrate(cache, state, noise, steps_at((1.0, 0.3))), x_t, atol=1e-6)


@pytest.mark.parametrize("times", [(), (0.9, 0.5), (1.0, 0.5, 0.5), (1.0, 0.5, 0.7), (1.0, 0.0)])
def test_times_that_are_no_schedule(times: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="times must begin at 1, decrease and stay above 0"):
        steps_at(times)


def rtc(path: Path) -> tuple[dict[str, torch.Tensor], Guidance, Pi0, PrefixCache, torch.Tensor]:
    with safe_open(path, "pt") as file:
        taps = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        schedule, delay, horizon, length, dims = file.metadata()["rtc"].split(",")
    assert taps["in.rtc_prev"].shape[1:] == (int(length), int(dims))
    golden = open_golden(path)
    reference = golden.build()
    x, noise = golden.inputs()
    assert torch.equal(noise, taps["in.noise"])
    tokens = reference.encode_images(x.images, x.image_mask)
    cache = reference.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
    steering = guidance(taps["in.rtc_prev"], tuple(noise.shape), int(delay), int(horizon), schedule, 10.0)  # type: ignore[arg-type]
    return taps, steering, reference, cache, x.state


@pytest.mark.parametrize("path", RTC, ids=lambda p: p.stem)
@torch.no_grad()
def test_guidance_is_lerobots(path: Path) -> None:
    """Each step to the bit from the fixture's own v_t, and the whole loop within a float32 run's noise."""
    taps, steering, reference, cache, state = rtc(path)
    steps = uniform_steps(reference.config, 10)
    for index, step in enumerate(steps):
        x_t, v_t = taps[f"step{index}.x_t"], taps[f"step{index}.v_t"]
        assert torch.equal(taps[f"step{index}.time"], torch.full((2,), step.time))
        after = taps["actions"] if index == 9 else taps[f"step{index + 1}.x_t"]
        assert torch.equal(x_t + step.delta * guided(x_t, v_t, step.time, steering), after), index
    engine = EagerEngine(reference, "fp32")
    actions = engine.integrate(cache, state, taps["in.noise"], steps, steering)
    assert float((actions - taps["actions"]).abs().max()) <= 5e-5
    free = engine.integrate(cache, state, taps["in.noise"], steps)
    assert float((free - taps["actions"]).abs().max()) > 0.1


def test_both_fixtures_are_here() -> None:
    assert len(RTC) == 2


def test_strength_begins_at_its_limit_and_follows_the_formula() -> None:
    assert guidance_strength(1.0, 10.0) == 10.0
    tau = 0.7
    assert guidance_strength(1 - tau, 10.0) == pytest.approx(
        (1 - tau) / tau * ((1 - tau) ** 2 + tau**2) / (1 - tau) ** 2
    )


def test_the_true_jacobian_is_autograds() -> None:
    """Against the Jacobian written out, for one sample; and it differs from taking the identity."""
    engine = EagerEngine(model("pi05-tiny"), "fp32")
    x, noise = observation(engine.config, [9])
    tokens = engine.encode_images(x.images, x.image_mask)
    cache = engine.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
    previous, weights = torch.randn(1, 10, 32), torch.linspace(1, 0, 10)
    steps = (EulerStep(0.6, -0.6),)

    def predicted(x_t: torch.Tensor) -> torch.Tensor:
        return x_t - 0.6 * engine.model.velocity(cache, x.state, x_t, torch.full((1,), 0.6))

    jacobian = torch.autograd.functional.jacobian(predicted, noise).reshape(320, 320)
    error = ((previous - predicted(noise)) * weights[:, None]).reshape(320)
    v_t = engine.model.velocity(cache, x.state, noise, torch.full((1,), 0.6))
    expected = noise - 0.6 * (v_t - guidance_strength(0.6, 10.0) * (error @ jacobian).reshape(1, 10, 32))
    ours = engine.integrate(cache, x.state, noise, steps, Guidance(previous, weights, 10.0, true_jacobian=True))
    assert torch.allclose(ours, expected, atol=1e-4)
    identity = engine.integrate(cache, x.state, noise, steps, Guidance(previous, weights, 10.0))
    assert float((identity - ours).abs().max()) > 1e-2


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_conditioning_on_nothing_is_the_velocity(name: str) -> None:
    engine, cache, state, noise = prepared(name)
    time = torch.tensor([0.4, 0.9])
    ours = conditioned_velocity(engine.model, cache, state, noise, time, 0)
    assert torch.allclose(ours, engine.model.velocity(cache, state, noise, time), atol=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_fixed_prefix_stays_and_the_rest_sees_it(name: str) -> None:
    engine, cache, state, noise = prepared(name)
    previous = torch.randn_like(noise)
    steps = uniform_steps(engine.config, 4)
    actions = engine.integrate(cache, state, noise, steps, FixedPrefix(previous, 3))
    assert torch.equal(actions[:, :3], previous[:, :3])
    other = engine.integrate(cache, state, noise, steps, FixedPrefix(previous + 1, 3))
    assert float((actions[:, 3:] - other[:, 3:]).abs().max()) > 1e-4
