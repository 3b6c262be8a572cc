"""The turbo engine on a GPU: kernels and graphs against the reference. `pytest -m gpu tests/engine`."""

import dataclasses
import math
import time

import pytest
import torch
from captured_support import model, observation
from turbo_support import cloned, relative, uint8_input, valid_part

from turbopi import Pi0
from turbopi.engine import create_engine
from turbopi.engine.eager import EagerEngine
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo.buckets import token_buckets
from turbopi.engine.turbo.ops import cublas_matmul, kernel_vision_attention, sdpa_vision_attention, twin_matmul
from turbopi.errors import NonFiniteActionsError

pytestmark = pytest.mark.gpu

PRESETS = ["pi0-tiny", "pi05-tiny", "pi0-small", "pi05-small", "pi05-libero-small"]
FLOAT32 = 2e-5
ONE, TWO, THREE = (True, False, False), (True, True, False), (True, True, True)
BATCHES = {
    "one": ([9], [TWO]),
    "no prompt": ([0], [TWO]),
    "no camera": ([7], [(False, False, False)]),
    "ragged": ([9, 20, 5], [TWO, ONE, (False, True, True)]),
    "equal": ([40] * 8, [THREE] * 8),
}


def turbo(reference: Pi0, precision: str = "fp32") -> TurboEngine:
    engine = create_engine("turbo", reference, precision)  # type: ignore[arg-type]
    assert isinstance(engine, TurboEngine)
    return engine


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_every_stage_in_float32(name: str, batch: tuple[list[int], list[tuple[bool, ...]]]) -> None:
    reference = model(name, device="cuda")
    engine, eager, (x, noise) = turbo(reference), EagerEngine(reference, "fp32"), observation(reference.config, *batch)
    expected_tokens = eager.encode_images(x.images, x.image_mask)
    tokens = engine.encode_images(x.images, x.image_mask)
    assert float((tokens - expected_tokens).abs().max()) <= FLOAT32 * float(expected_tokens.abs().max() + 1)
    expected = eager.prefill(expected_tokens, x.image_mask, x.tokens, x.token_mask)
    cache = engine.prefill(expected_tokens, x.image_mask, x.tokens, x.token_mask)
    for ours, theirs in zip(valid_part(cache), valid_part(expected), strict=True):
        assert relative(ours, theirs) <= FLOAT32
    actions = eager.denoise(expected, x.state, noise, 10)
    assert relative(engine.denoise(cache, x.state, noise, 10), actions) <= FLOAT32
    assert relative(engine.denoise(expected, x.state, noise, 10), actions) <= FLOAT32
    assert relative(engine.sample_actions(x, noise, 10), actions) <= FLOAT32


@pytest.mark.parametrize("name", PRESETS)
def test_in_bfloat16_it_errs_as_little_as_eager(name: str) -> None:
    exact, rounded = model(name, device="cuda"), model(name, device="cuda", dtype=torch.bfloat16)
    x, noise = observation(exact.config, [9, 33, 20, 40])
    truth = exact.sample_actions(x.to("cuda"), noise.cuda(), 10)
    plain = relative(rounded.sample_actions(x.to("cuda"), noise.cuda(), 10), truth)
    assert relative(turbo(rounded, "bf16").sample_actions(x, noise, 10), truth) <= 1.2 * plain


@pytest.mark.parametrize("name", ["pi05-small", "pi05-libero-small"])
def test_one_observation_is_denoised_in_one_kernel(name: str) -> None:
    """Near the truth like plain bf16 (one observation, so chance gets some room), and with the same bits again."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the persistent loop needs compute capability 9.0")
    exact, rounded = model(name, device="cuda"), model(name, device="cuda", dtype=torch.bfloat16)
    x, noise = observation(exact.config, [33])
    truth = exact.sample_actions(x.to("cuda"), noise.cuda(), 10)
    plain = relative(rounded.sample_actions(x.to("cuda"), noise.cuda(), 10), truth)
    engine = turbo(rounded, "bf16")
    actions = engine.sample_actions(x, noise, 10)
    assert engine.describe()["denoise_loop"] == {"1": "persistent"}
    assert relative(actions, truth) <= 1.5 * plain
    assert all(torch.equal(engine.sample_actions(x, noise, 10), actions) for _ in range(20))


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_call_is_one_graph_with_the_bits_of_its_parts(batch: tuple[list[int], list[tuple[bool, ...]]]) -> None:
    reference = model("pi05-small", device="cuda", dtype=torch.bfloat16)
    engine, timed = turbo(reference, "bf16"), turbo(reference, "bf16")
    assert timed.time_calls()
    for seed in range(3):
        x, noise = observation(reference.config, *batch, seed=seed)
        whole = engine.sample_actions(x, noise, 10)
        tick = engine.place(x, noise, 10)
        tick.upload()
        tick.launch()
        assert torch.equal(tick.read(), whole)
        assert torch.equal(timed.sample_actions(x, noise, 10), whole)
        assert 0 < timed.call_ms() < 1e3
        for stage in ("encode_images", "prefill", "denoise"):
            tick.launch_stage(stage)
        assert relative(tick.read(), whole) < 1e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["pi0-small", "pi05-small"])
def test_same_inputs_same_bits(name: str, precision: str) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    reference = model(name, device="cuda", dtype=dtype)
    engine = turbo(reference, precision)
    request, other = observation(reference.config, [9, 33]), observation(reference.config, [90, 70], [THREE] * 2, 1)
    first = engine.sample_actions(*request, 10)
    for _ in range(20):
        engine.sample_actions(*other, 10)
        assert torch.equal(engine.sample_actions(*request, 10), first)
    assert torch.equal(turbo(reference, precision).sample_actions(*request, 10), first)


def test_stages_and_the_tick_give_the_same_bits() -> None:
    reference = model("pi05-small", device="cuda", dtype=torch.bfloat16)
    engine, (x, noise) = turbo(reference, "bf16"), observation(reference.config, [9, 33])
    expected = engine.sample_actions(x, noise, 10)
    cache = engine.prefill(engine.encode_images(x.images, x.image_mask), x.image_mask, x.tokens, x.token_mask)
    kept = cloned(cache)
    assert torch.equal(engine.denoise(cache, x.state, noise, 10).cpu(), expected)
    assert relative(engine.denoise(kept, x.state, noise, 10), expected) <= 1e-2


def test_within_a_bucket_nothing_is_captured_again() -> None:
    reference = model("pi05-small", device="cuda", dtype=torch.bfloat16)
    engine = turbo(reference, "bf16")
    engine.warm_up(cameras=2, steps=10, images=torch.float32)
    captured = engine.describe()["graphs"]
    assert captured == len(token_buckets(reference.config))
    allocated = torch.cuda.memory_allocated()
    for length in range(1, reference.config.max_tokens + 1, 7):
        engine.sample_actions(*observation(reference.config, [length], seed=length), 10)
    assert engine.describe()["graphs"] == captured
    assert torch.cuda.memory_allocated() == allocated


def test_uint8_images_are_the_scaled_ones() -> None:
    reference = model("pi05-small", device="cuda")
    engine, (x, noise) = turbo(reference), observation(reference.config, [9], [THREE])
    grey, scaled = uint8_input(x)
    actions = engine.sample_actions(grey, noise, 10)
    assert relative(actions, engine.sample_actions(scaled, noise, 10)) <= 1e-5


def test_not_a_number_is_an_error() -> None:
    reference = model("pi05-tiny", device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        reference.action_out_proj.bias[3] = math.nan
    engine, request = turbo(reference, "bf16"), observation(reference.config, [9])
    with pytest.raises(NonFiniteActionsError, match="NaN or infinite actions"):
        engine.sample_actions(*request, 10)


def test_what_was_not_a_number_leaves_nothing_behind() -> None:
    """An id outside the vocabulary embeds as NaN; the next request must not see it in an unused slot."""
    reference = model("pi05-tiny", device="cuda")
    engine, (x, noise) = turbo(reference), observation(reference.config, [40])
    expected = engine.sample_actions(*observation(reference.config, [33]), 2)
    bad = dataclasses.replace(x, tokens=torch.full_like(x.tokens, 1 << 40))
    with pytest.raises(NonFiniteActionsError):
        engine.sample_actions(bad, noise, 2)
    assert torch.equal(engine.sample_actions(*observation(reference.config, [33]), 2), expected)


def test_batches_up_to_32() -> None:
    reference = model("pi05-small", device="cuda")
    engine = turbo(reference)
    x, noise = observation(reference.config, list(range(3, 35)))
    truth = reference.sample_actions(x.to("cuda"), noise.cuda(), 3)
    assert relative(engine.sample_actions(x, noise, 3), truth) <= FLOAT32


def test_the_full_size_is_ready_in_half_a_minute() -> None:
    reference = model("pi05", device="cuda", dtype=torch.bfloat16, horizon=10)
    start = time.perf_counter()
    engine = turbo(reference, "bf16")
    engine.warm_up(cameras=2, steps=10, images=torch.float32)
    x, noise = observation(reference.config, [40])
    actions = engine.sample_actions(x, noise, 10)
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 30
    truth = EagerEngine(reference, "bf16")
    tokens = truth.encode_images(x.images, x.image_mask)
    plain = truth.denoise(truth.prefill(tokens, x.image_mask, x.tokens, x.token_mask), x.state, noise, 10)
    # Both are bf16; how far each is from float32 is measured by the audit.
    assert relative(actions, plain) <= 5e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [(), ("bias",), ("residual",), ("bias", "gelu"), ("bias", "residual"), ("gelu",)])
def test_the_librarys_products_are_the_twins(parts: tuple[str, ...], dtype: torch.dtype) -> None:
    """Above all that the library's GELU is the tanh form."""
    g = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(n, 144, generator=g, device="cuda").to(dtype) for n in (200, 96))
    bias = torch.randn(96, generator=g, device="cuda").to(dtype) if "bias" in parts else None
    residual = torch.randn(200, 96, generator=g, device="cuda").to(dtype)
    outs = []
    for matmul in (cublas_matmul, twin_matmul):
        out = residual.clone()
        into = out if "residual" in parts else None
        matmul(x, weight, out, bias, "gelu" if "gelu" in parts else "none", into)
        outs.append(out)
    # Half a unit in the last place of bf16, relative to the whole; the erf form would be 4e-4 off in float32.
    assert relative(*outs) <= (1e-6 if dtype == torch.float32 else 4e-3)


def test_every_way_to_attend_in_vision() -> None:
    g = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(2 * 50, 3 * 144, generator=g, device="cuda") * 0.3
    outs = []
    for attend in (sdpa_vision_attention, kernel_vision_attention):
        outs.append(attend(qkv, torch.empty(100, 144, device="cuda"), 2, 50))
    assert relative(*outs) <= 1e-5
