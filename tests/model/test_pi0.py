import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from scipy import stats

from turbopi import InputError, ModelConfig, ModelInput, preset
from turbopi.audit.golden import hash_model, open_golden
from turbopi.model import Pi0
from turbopi.model.flow import noised, sample_time, time_schedule
from turbopi.model.numerics import parameter_dtype

DATA = Path(__file__).parents[1] / "data"


def make_input(config: ModelConfig, batch: int = 2, tokens: int = 9) -> ModelInput:
    g = torch.Generator().manual_seed(3)
    size = config.vision.image_size
    token_mask = torch.ones(batch, tokens, dtype=torch.bool)
    token_mask[0, 5:] = False
    image_mask = torch.tensor([[True, True, False]] * batch)
    return ModelInput(
        images=torch.rand(batch, 3, 3, size, size, generator=g) * 2 - 1,
        image_mask=image_mask,
        tokens=torch.randint(0, config.vocab_size, (batch, tokens), generator=g),
        token_mask=token_mask,
        state=torch.rand(batch, 32, generator=g),
    )


@pytest.fixture(params=["pi0-tiny", "pi05-tiny"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return preset(request.param)


@pytest.fixture
def model(config: ModelConfig) -> Pi0:
    return hash_model(config, 7, torch.float32)


def noise_for(config: ModelConfig, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, config.horizon, config.action_dim, generator=torch.Generator().manual_seed(5))


def test_the_stages_are_sample_actions(model: Pi0, config: ModelConfig) -> None:
    x, noise = make_input(config), noise_for(config)
    with torch.no_grad():
        tokens = model.encode_images(x.images, x.image_mask)
        cache = model.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
        actions = model.denoise(cache, x.state, noise, steps=3)
    assert tokens.shape == (2, 3, config.vision.tokens, config.vlm.width)
    longest = 2 * config.vision.tokens + 9
    assert cache.keys[0].shape == (2, 1, longest, config.vlm.head_dim)
    assert len(cache.keys) == len(cache.values) == config.vlm.depth
    assert cache.lengths.tolist() == [longest - 4, longest]
    assert torch.equal(actions, model.sample_actions(x, noise, steps=3))
    assert actions.shape == noise.shape
    assert actions.dtype == torch.float32


def test_a_full_batch_has_no_mask(model: Pi0, config: ModelConfig) -> None:
    x = make_input(config)
    x = dataclasses.replace(x, token_mask=torch.ones_like(x.token_mask))
    with torch.no_grad():
        cache = model.prefill(model.encode_images(x.images, x.image_mask), x.image_mask, x.tokens, x.token_mask)
    assert cache.valid is None
    assert bool(cache.visible.all())


def test_taps_yield_every_name_of_the_records(config: ModelConfig) -> None:
    golden = open_golden(DATA / "tiny" / f"openpi_{config.kind}_tiny_f32.safetensors")
    model = golden.build()
    inputs, noise = golden.inputs()
    with model.taps() as taps:
        actions = model.sample_actions(inputs, noise)
    assert {name for name, _, _ in golden.records()} <= set(taps)
    assert torch.equal(taps["actions"], actions)


def test_taps_change_nothing_and_end_with_their_context(model: Pi0, config: ModelConfig) -> None:
    x, noise = make_input(config), noise_for(config)
    plain = model.sample_actions(x, noise)
    seen: list[str] = []
    with model.taps(lambda name, value: seen.append(name)):
        assert torch.equal(model.sample_actions(x, noise), plain)
        with pytest.raises(RuntimeError, match="already being tapped"), model.taps():
            pass
    count = len(seen)
    assert count > 100
    model.sample_actions(x, noise)
    assert len(seen) == count


def test_taps_end_after_an_error(model: Pi0) -> None:
    with pytest.raises(ZeroDivisionError), model.taps():
        _ = 1 / 0
    with model.taps() as taps:
        assert taps == {}


def test_missing_cameras_are_not_computed(model: Pi0, config: ModelConfig) -> None:
    with model.taps() as taps:
        model.sample_actions(make_input(config), noise_for(config))
    assert "vision.cam1.projected" in taps
    assert "vision.cam2.projected" not in taps


# Flow matching


@pytest.mark.parametrize("mode", ["accumulated", "indexed"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 64, 200])
def test_time_schedule(steps: int, mode: str) -> None:
    times = time_schedule(steps, mode)
    assert len(times) == steps
    assert times[0] == 1.0
    assert times[-1] == pytest.approx(1 / steps, abs=1e-5)
    assert all(t == float(torch.tensor(t)) for t in times)


def test_time_schedules_differ_as_the_ports_do() -> None:
    assert time_schedule(10, "accumulated")[3] == float(torch.tensor(0.69999993))
    assert time_schedule(10, "indexed")[3] == float(torch.tensor(0.7))


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_is_an_error(steps: int) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1"):
        time_schedule(steps, "indexed")


def test_training_times_are_beta() -> None:
    times = sample_time(20_000, torch.Generator().manual_seed(1))
    assert float(times.min()) >= 0.001
    assert float(times.max()) <= 1.0
    assert stats.kstest((times.double().numpy() - 0.001) / 0.999, stats.beta(1.5, 1).cdf).pvalue > 0.01


def test_loss_is_the_flow_matching_error(model: Pi0, config: ModelConfig) -> None:
    x, noise, actions = make_input(config), noise_for(config), noise_for(config) * 0.3 + 0.1
    time = torch.tensor([0.25, 0.9])
    x_t = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
    with torch.no_grad():
        cache = model.prefill(model.encode_images(x.images, x.image_mask), x.image_mask, x.tokens, x.token_mask)
        expected = ((model.velocity(cache, x.state, x_t, time) - (noise - actions)) ** 2).mean(-1)
        loss = model.loss(x, actions, noise, time)
    assert loss.shape == (2, config.horizon)
    torch.testing.assert_close(loss, expected)


def test_loss_differentiates_to_every_parameter_that_inference_reads(model: Pi0, config: ModelConfig) -> None:
    x, noise = make_input(config), noise_for(config)
    model.loss(x, noise_for(config) * 0.5, noise, torch.tensor([0.3, 0.8])).mean().backward()
    last = config.vlm.depth - 1
    dead = re.compile(rf"vlm\.(norm|layers\.{last}\.(self_attn\.[qo]_proj|mlp|post_attention_layernorm))")
    for name, parameter in model.named_parameters():
        gradient = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        assert (gradient == 0.0) == bool(dead.match(name)), name


def test_loss_gradient_is_the_finite_difference(model: Pi0, config: ModelConfig) -> None:
    x, noise, actions, time = make_input(config), noise_for(config), noise_for(config) * 0.5, torch.tensor([0.3, 0.8])
    parameter = model.expert.layers[1].mlp.down_proj.weight
    model.loss(x, actions, noise, time).mean().backward()
    assert parameter.grad is not None
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    direction /= direction.norm()
    analytic = float((parameter.grad * direction).sum())
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            parameter += sign * 1e-2 * direction
            losses.append(model.loss(x, actions, noise, time).double().mean())
            parameter -= sign * 1e-2 * direction
    assert float(losses[0] - losses[1]) / 2e-2 == pytest.approx(analytic, rel=2e-2)


def test_a_fresh_model_learns(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = Pi0(config)
    x, noise = make_input(config), noise_for(config)
    actions = torch.linspace(-1, 1, config.horizon)[None, :, None].expand_as(noise)
    time = torch.tensor([0.5, 0.5])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = model.loss(x, actions, noise, time).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_noised_is_a_straight_path() -> None:
    actions, noise = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    x_t, target = noised(actions, noise, torch.tensor([0.25]))
    assert bool((x_t == 0.25).all())
    assert bool((target == 1).all())


# Bad input


NAN = math.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 3, 56, 57)}, r"images is \(2, 3, 3, 56, 57\) float32, expected \(any, 3, 3"),
        ({"images": torch.zeros(2, 2, 3, 56, 56)}, "images is"),
        ({"images": torch.zeros(2, 3, 3, 56, 56, dtype=torch.uint8)}, "uint8, expected"),
        ({"images": [1, 2]}, "images is a list, expected a torch tensor"),
        ({"images": torch.full((2, 3, 3, 56, 56), NAN)}, "images holds NaN"),
        ({"images": torch.full((2, 3, 3, 56, 56), 1.5)}, r"beyond \[-1, 1\]"),
        ({"image_mask": torch.ones(2, 3)}, "image_mask is .* expected .* bool"),
        ({"tokens": torch.zeros(2, 9, dtype=torch.int32)}, "tokens is"),
        ({"tokens": torch.full((2, 9), 1024)}, "tokens hold ids outside 0..1023"),
        ({"tokens": torch.full((2, 9), -1)}, "tokens hold ids"),
        ({"token_mask": torch.ones(2, 8, dtype=torch.bool)}, "token_mask is"),
        ({"state": torch.zeros(2, 8)}, r"state is \(2, 8\) float32, expected \(2, 32\)"),
        ({"state": torch.full((2, 32), math.inf)}, "state holds NaN or infinite"),
        (
            {"image_mask": torch.zeros(2, 3, dtype=torch.bool), "token_mask": torch.zeros(2, 9, dtype=torch.bool)},
            "neither a camera nor a prompt token",
        ),
    ],
)  # fmt: skip
def test_bad_input_names_what_is_wrong(change: dict[str, object], message: str) -> None:
    config = preset("pi05-tiny")
    model = hash_model(config, 7, torch.float32)
    x = dataclasses.replace(make_input(config), **change)
    with pytest.raises(InputError, match=message):
        model.sample_actions(x, noise_for(config))


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (torch.zeros(2, 9, 32), r"noise is \(2, 9, 32\) float32, expected \(2, 10, 32\) float32"),
        (torch.zeros(2, 10, 32, dtype=torch.float64), "float64"),
        (torch.full((2, 10, 32), NAN), "noise holds NaN"),
    ],
)
def test_bad_noise(noise: torch.Tensor, message: str) -> None:
    config = preset("pi0-tiny")
    with pytest.raises(InputError, match=message):
        hash_model(config, 7, torch.float32).sample_actions(make_input(config), noise)


def test_profiles_refuse_what_they_do_not_describe() -> None:
    with pytest.raises(ValueError, match="float32 only"):
        parameter_dtype("vlm.norm.weight", "jax", torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32 or bfloat16, not torch\.float16"):
        parameter_dtype("vlm.norm.weight", "exact", torch.float16)
