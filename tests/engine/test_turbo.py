"""The turbo engine's assembly against the reference: CPU, float32, twins, no graphs."""

import dataclasses
import math

import pytest
import torch
from captured_support import Rerun, model, observation
from turbo_support import STAGE_TOLERANCE, model_like, relative, twins, uint8_input, valid_part, with_gaps

from turbopi import InputError, Pi0, preset
from turbopi.engine import TickEngine, TimedEngine, create_engine, sample_actions
from turbopi.engine.eager import EagerEngine
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo import engine as turbo_engine
from turbopi.engine.turbo.buckets import Bucket, bucket_for_rows, lay_out, token_buckets
from turbopi.engine.turbo.checks import check_device
from turbopi.engine.turbo.ops import twin_ops
from turbopi.errors import NonFiniteActionsError

PRESETS = ["pi0-tiny", "pi05-tiny", "pi0-small", "pi05-small"]
ONE, TWO, THREE, LAST = (True, False, False), (True, True, False), (True, True, True), (False, False, True)
NONE = (False, False, False)
BATCHES = {
    "one": ([9], [TWO]),
    "one camera, the last": ([3], [LAST]),
    "no prompt": ([0], [TWO]),
    "no camera": ([7], [NONE]),
    "ragged": ([9, 20, 5], [TWO, ONE, (False, True, True)]),
    "one without cameras": ([4, 17], [NONE, THREE]),
    "equal": ([11, 11], [TWO, TWO]),
}


@pytest.fixture(params=PRESETS)
def reference(request: pytest.FixtureRequest) -> Pi0:
    return model(request.param)


# Against the reference


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@torch.no_grad()
def test_every_stage(reference: Pi0, batch: tuple[list[int], list[tuple[bool, ...]]]) -> None:
    engine, (x, noise) = twins(reference), observation(reference.config, *batch)
    expected_tokens = reference.encode_images(x.images, x.image_mask)
    tokens = engine.encode_images(x.images, x.image_mask)
    assert tokens.shape == expected_tokens.shape
    assert float((tokens - expected_tokens).abs().max()) <= STAGE_TOLERANCE * float(expected_tokens.abs().max() + 1)
    expected = reference.prefill(expected_tokens, x.image_mask, x.tokens, x.token_mask)
    cache = engine.prefill(expected_tokens, x.image_mask, x.tokens, x.token_mask)
    assert torch.equal(cache.lengths, expected.lengths)
    assert (cache.valid is None) == (expected.valid is None)
    for ours, theirs in zip(valid_part(cache), valid_part(expected), strict=True):
        assert ours.shape == theirs.shape
        assert relative(ours, theirs) <= STAGE_TOLERANCE
    actions = reference.denoise(expected, x.state, noise, 3)
    assert relative(engine.denoise(cache, x.state, noise, 3), actions) <= STAGE_TOLERANCE
    assert relative(engine.sample_actions(x, noise, 3), actions) <= STAGE_TOLERANCE


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_any_number_of_steps(reference: Pi0, steps: int) -> None:
    x, noise = observation(reference.config, [9, 14])
    actions = twins(reference).sample_actions(x, noise, steps)
    assert relative(actions, reference.sample_actions(x, noise, steps)) <= STAGE_TOLERANCE


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 63, 64])
@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-tiny"])
def test_prompts_at_the_edges_of_buckets(name: str, length: int) -> None:
    reference = model(name)
    x, noise = observation(reference.config, [length])
    actions = twins(reference).sample_actions(x, noise, 2)
    assert relative(actions, reference.sample_actions(x, noise, 2)) <= STAGE_TOLERANCE


def test_padding_may_stand_anywhere(reference: Pi0) -> None:
    x, noise = observation(reference.config, [9, 14])
    x = with_gaps(x)
    actions = twins(reference).sample_actions(x, noise, 2)
    assert relative(actions, reference.sample_actions(x, noise, 2)) <= STAGE_TOLERANCE


@pytest.mark.parametrize("numerics", ["exact", "openpi", "lerobot", "jax"])
@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-tiny"])
def test_numerics_profiles_are_honoured(name: str, numerics: str) -> None:
    reference = model(name, numerics=numerics)
    x, noise = observation(reference.config, [9])
    actions = twins(reference).sample_actions(x, noise, 10)
    assert relative(actions, reference.sample_actions(x, noise, 10)) <= STAGE_TOLERANCE


@pytest.mark.parametrize("numerics", ["exact", "openpi", "lerobot"])
@pytest.mark.parametrize("name", ["pi0-small", "pi05-small"])
def test_in_bfloat16_it_errs_as_little_as_the_reference(name: str, numerics: str) -> None:
    exact, rounded = model(name, numerics=numerics), model(name, numerics=numerics, dtype=torch.bfloat16)
    x, noise = observation(exact.config, [9, 33])
    truth = exact.sample_actions(x, noise, 10)
    ours = TurboEngine(rounded, "bf16", twin_ops(), None).sample_actions(x, noise, 10)
    # Profiles with rounded rotary frequencies are far from float32 in both.
    assert relative(ours, truth) <= 1.2 * relative(rounded.sample_actions(x, noise, 10), truth)


def test_one_request_leaves_nothing_behind(reference: Pi0) -> None:
    """Buckets share memory: what was computed before, and in which bucket, must not change a bit."""
    first, second = observation(reference.config, [9]), observation(reference.config, [40], [THREE], seed=1)
    fresh = twins(reference).sample_actions(*first, 3)
    engine = twins(reference)
    for request in (second, first, second):
        engine.sample_actions(*request, 3)
    assert torch.equal(engine.sample_actions(*first, 3), fresh)


def test_a_sample_does_not_depend_on_its_neighbours(reference: Pi0) -> None:
    x, noise = observation(reference.config, [9, 30])
    alone = dataclasses.replace(x, **{f.name: getattr(x, f.name)[:1] for f in dataclasses.fields(x)})
    engine = twins(reference)
    both, one = engine.sample_actions(x, noise, 2), engine.sample_actions(alone, noise[:1], 2)
    assert relative(both[:1], one) <= STAGE_TOLERANCE


def test_uint8_images_are_the_scaled_ones(reference: Pi0) -> None:
    x, noise = observation(reference.config, [9, 4], [TWO, ONE])
    grey, scaled = uint8_input(x)
    engine = twins(reference)
    assert torch.equal(engine.sample_actions(grey, noise, 2), engine.sample_actions(scaled, noise, 2))
    assert torch.equal(
        engine.encode_images(grey.images, x.image_mask), engine.encode_images(scaled.images, x.image_mask)
    )


# Buckets and graphs


def test_buckets_cover_every_prompt() -> None:
    assert token_buckets(preset("pi05"))[-3:] == (176, 192, 200)
    assert token_buckets(preset("pi0")) == (16, 32, 48)
    assert token_buckets(dataclasses.replace(preset("pi0"), max_tokens=7)) == (7,)


def test_the_smallest_bucket_is_chosen() -> None:
    config = preset("pi05")
    mask = torch.zeros(2, 200, dtype=torch.bool)
    mask[0, :40] = mask[1, :33] = True
    layout = lay_out(config, torch.tensor([TWO, ONE]), torch.ones(2, 200, dtype=torch.int64), mask)
    assert layout.bucket == Bucket(2, 2, 48)
    assert layout.lengths.tolist() == [552, 289]
    assert layout.places == [[0, 1], [0]]
    assert layout.prompt.sum(axis=1).tolist() == [40, 33]
    assert bucket_for_rows(config, 1, 552) == Bucket(1, 2, 48)
    assert bucket_for_rows(config, 1, 968) == Bucket(1, 3, 200)


def test_nothing_is_recorded_twice_within_a_bucket() -> None:
    reference, recorder = model("pi05-tiny"), Rerun()
    engine = TurboEngine(reference, "fp32", twin_ops(), recorder)
    engine.warm_up(cameras=2, steps=2, images=torch.float32)
    assert recorder.recorded == len(token_buckets(reference.config)) == 4
    for length in (1, 16, 17, 20, 64):
        x, noise = observation(reference.config, [length])
        assert relative(engine.sample_actions(x, noise, 2), reference.sample_actions(x, noise, 2)) <= STAGE_TOLERANCE
    assert recorder.recorded == 4
    told = engine.describe()
    assert (told["ops"], told["denoise_loop"], told["graphs"]) == ("twins", {"1": "rows"}, 4)
    assert "float32" in told["not_persistent"]["1"]
    engine.sample_actions(x, noise, 3)
    engine.sample_actions(uint8_input(x)[0], noise, 3)
    assert recorder.recorded == 6


def test_a_tick_in_parts_is_a_tick() -> None:
    reference = model("pi0-tiny")
    engine, (x, noise) = twins(reference), observation(reference.config, [9])
    expected = engine.sample_actions(x, noise, 2)
    tick = engine.place(x, noise, 2)
    assert tick.bucket == Bucket(1, 2, 16)
    tick.upload()
    for stage in ("encode_images", "prefill", "denoise"):
        tick.launch_stage(stage)
    assert torch.equal(tick.read(), expected)
    with pytest.raises(ValueError, match="unknown stage 'dream'"):
        tick.launch_stage("dream")


def test_a_call_in_one_piece_is_a_call_in_parts() -> None:
    """One recording a bucket takes the inputs from where the host writes them to where it reads the actions."""
    reference, recorder = model("pi05-tiny"), Rerun()
    engine = TurboEngine(reference, "fp32", twin_ops(), recorder)
    for seed, length in enumerate((9, 20, 9)):
        x, noise = observation(reference.config, [length], seed=seed)
        whole = engine.sample_actions(x, noise, 2)
        tick = engine.place(x, noise, 2)
        tick.upload()
        tick.launch()
        assert torch.equal(tick.read(), whole)
        tick.start()
        again = tick.read()
        assert torch.equal(again, whole)
        assert torch.equal(engine.sample_again(engine.last_cache(), x.state, noise, 2), whole)
    engine.sample_actions(*observation(reference.config, [9], seed=7), 2)
    assert not torch.equal(engine.sample_actions(x, 2 * noise, 2), again)
    assert recorder.recorded == 2 * 2 + 2  # of both buckets: the call, the tick alone, stage 3


def test_images_that_nobody_sees_are_not_taken_over() -> None:
    engine = twins(model("pi05-tiny"))
    x, noise = observation(engine.config, [9], [(True, False, True)])
    images = x.images.clone()
    images[:, 1] = math.nan
    hidden = dataclasses.replace(x, images=images)
    assert torch.equal(engine.sample_actions(hidden, noise, 2), engine.sample_actions(x, noise, 2))


def test_calls_are_timed_on_a_gpu_only() -> None:
    engine = twins(model("pi05-tiny"))
    assert isinstance(engine, TimedEngine)
    assert not engine.time_calls()
    with pytest.raises(RuntimeError, match="call time_calls"):
        engine.call_ms()


def test_sample_actions_of_any_engine() -> None:
    reference = model("pi05-tiny")
    x, noise = observation(reference.config, [9])
    eager, turbo = EagerEngine(reference, "fp32"), twins(reference)
    assert isinstance(turbo, TickEngine)
    assert not isinstance(eager, TickEngine)
    stage_ms: dict[str, float] = {}
    actions = sample_actions(eager, x, noise, 2, stage_ms)
    assert torch.equal(actions, reference.sample_actions(x, noise, 2))
    assert list(stage_ms) == ["encode_images", "prefill", "denoise"]
    untold: dict[str, float] = {}
    assert relative(sample_actions(turbo, x, noise, 2, untold), actions) <= STAGE_TOLERANCE
    assert untold == {}


# Bad input


def test_not_a_number_is_an_error(reference: Pi0) -> None:
    x, noise = observation(reference.config, [9])
    broken = model_like(reference)
    with torch.no_grad():
        broken.action_out_proj.bias[3] = math.nan
    engine = twins(broken)
    with pytest.raises(NonFiniteActionsError, match="NaN or infinite actions"):
        engine.sample_actions(x, noise, 1)


def test_input_is_checked(reference: Pi0) -> None:
    engine, (x, noise) = twins(reference), observation(reference.config, [9, 9])
    with pytest.raises(InputError, match="noise is"):
        engine.sample_actions(x, noise[:1], 1)
    with pytest.raises(InputError, match="state is"):
        engine.sample_actions(dataclasses.replace(x, state=x.state[:1]), noise, 1)
    with pytest.raises(InputError, match=r"float64, expected .* float32"):
        engine.sample_actions(dataclasses.replace(x, images=x.images.double()), noise, 1)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        engine.sample_actions(x, noise, 0)


def test_noise_is_judged_by_its_values_not_by_their_squares() -> None:
    engine = twins(model("pi05-tiny"))
    x, noise = observation(engine.config, [9])
    noise[0, 0, 0] = 1e30
    engine.place(x, noise, 2)
    noise[0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="noise holds NaN"):
        engine.place(x, noise, 2)


def test_stages_check_their_input(reference: Pi0) -> None:
    engine, config = twins(reference), reference.config
    x, noise = observation(config, [9, 9])
    with pytest.raises(InputError, match=r"images is .* float64, expected .* float32 or uint8"):
        engine.encode_images(x.images.double(), x.image_mask)
    tokens = engine.encode_images(x.images, x.image_mask)
    with pytest.raises(InputError, match="image_tokens is"):
        engine.prefill(tokens[:, :2], x.image_mask, x.tokens, x.token_mask)
    cache = engine.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
    with pytest.raises(InputError, match="state is"):
        engine.denoise(cache, x.state[:1], noise, 1)
    with pytest.raises(InputError, match="noise is"):
        engine.denoise(cache, x.state, noise[:1], 1)
    with pytest.raises(InputError, match="no samples"):
        engine.encode_images(x.images[:0], x.image_mask[:0])


def test_a_prompt_beyond_the_buckets_is_refused(reference: Pi0) -> None:
    x, noise = observation(reference.config, [9])
    slots = reference.config.max_tokens + 1
    long = dataclasses.replace(
        x, tokens=torch.ones(1, slots, dtype=torch.int64), token_mask=torch.ones(1, slots, dtype=torch.bool)
    )
    with pytest.raises(InputError, match=f"a prompt has {slots} tokens.*use the engine 'eager'"):
        twins(reference).sample_actions(long, noise, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"invalid_tokens": "masked"}, "load it with invalid_tokens='dropped'"),
        (
            {
                "vlm": dataclasses.replace(preset("pi0-tiny").vlm, head_dim=24),
                "expert": dataclasses.replace(preset("pi0-tiny").expert, head_dim=24),
            },
            "head_dim of 32, 64, 128, 256, the model's is 24; use the engine 'graphed' or 'eager'",
        ),
        ({"vision": dataclasses.replace(preset("pi0-tiny").vision, width=84)}, "the model's is 21"),
    ],
)
def test_models_that_cannot_be_run(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        twins(model("pi0-tiny", **changes))


def test_the_precision_must_be_the_models() -> None:
    with pytest.raises(ValueError, match=r"needs weights in torch\.bfloat16, the model holds torch\.float32"):
        TurboEngine(model(), "bf16", twin_ops(), None)


@pytest.mark.parametrize("where", ["fold_model", "Arena"])
def test_too_little_memory_names_the_other_engines(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 4 GiB")

    monkeypatch.setattr(turbo_engine, where, fail)
    reference = model()
    with pytest.raises(RuntimeError, match=r"too little memory for .* use the engine 'graphed' or 'eager'"):
        twins(reference).sample_actions(*observation(reference.config, [9]), 1)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(ValueError, match=r"8\.0 \(Ampere\) or later, Tesla T4 has 7\.5; use the engine 'graphed'"):
        check_device(torch.device("cuda"))


def test_without_a_gpu_the_engine_says_what_to_use() -> None:
    with pytest.raises(ValueError, match=r"'turbo' captures CUDA graphs and needs an NVIDIA GPU.*'eager'"):
        create_engine("turbo", model(), "fp32")
