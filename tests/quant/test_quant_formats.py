import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbopi.quant.formats import (
    BLOCK,
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    INT8_MAX,
    balance,
    e4m3_scale,
    group_size,
    int8_scale,
    nvfp4_tensor_scale,
    pack_int4,
    round_e2m1,
    through_nvfp4,
    to_e4m3,
    to_int4,
    to_int8,
    to_nvfp4,
    unpack_int4,
)

E4M3_ALL = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
E4M3_FINITE = E4M3_ALL[E4M3_ALL.isfinite()]
E2M1_ALL = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])
HUGE = torch.tensor([1e4, -1e4, 3e38, -3e38, float("inf"), float("-inf")])


def nearest(x: float, grid: list[float]) -> float:
    """By definition: the nearest of the sorted non-negative grid, the even index on a tie."""
    best = min(abs(abs(x) - g) for g in grid)
    places = [i for i, g in enumerate(grid) if abs(abs(x) - g) == best]
    index = next((i for i in places if i % 2 == 0), places[0])
    return grid[index] if x >= 0 else -grid[index]


def test_e4m3_holds_each_of_its_values_exactly() -> None:
    assert len(E4M3_FINITE) == 254
    assert float(E4M3_FINITE.max()) == E4M3_MAX
    rounded = to_e4m3(E4M3_FINITE, 1.0).float()
    assert torch.equal(rounded, E4M3_FINITE)
    assert torch.equal(rounded.signbit(), E4M3_FINITE.signbit())


def test_e4m3_rounds_to_nearest_and_ties_to_even() -> None:
    grid = sorted({abs(v) for v in E4M3_FINITE.tolist()})
    middles = [(a + b) / 2 for a, b in itertools.pairwise(grid)]
    points = torch.tensor([m * f for m in middles for f in (1.0, 1 - 1e-4, 1 + 1e-4)])
    expected = torch.tensor([nearest(v, grid) for v in points.tolist()])
    assert torch.equal(to_e4m3(points, 1.0).float(), expected)
    assert torch.equal(to_e4m3(-points, 1.0).float(), -expected)


def test_nothing_wraps() -> None:
    assert torch.equal(to_e4m3(HUGE, 1.0).float(), HUGE.sign() * E4M3_MAX)
    assert torch.equal(to_int8(HUGE, 1.0), (HUGE.sign() * INT8_MAX).to(torch.int8))
    assert torch.equal(round_e2m1(HUGE), HUGE.sign() * E2M1_MAX)
    # Beyond the calibrated range: both scales of NVFP4 at their ends.
    beyond = to_nvfp4(torch.full((1, BLOCK), 1e6), nvfp4_tensor_scale(torch.tensor(1.0))).dequantised()
    assert torch.allclose(beyond, torch.tensor(1.0))
    assert to_e4m3(torch.tensor(float("nan")), 1.0).float().isnan()


def test_int8_ties_go_to_even_and_its_values_are_exact() -> None:
    whole = torch.arange(-INT8_MAX, INT8_MAX + 1).float()
    assert torch.equal(to_int8(whole * 0.25, 0.25), whole.to(torch.int8))
    assert to_int8(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), 1.0).tolist() == [0, 2, 2, 0, -2]


def test_e2m1_rounds_as_defined() -> None:
    assert torch.equal(round_e2m1(E2M1_ALL), E2M1_ALL)
    points = torch.linspace(-7, 7, 14 * 64 + 1)  # holds every middle exactly
    expected = torch.tensor([nearest(min(max(v, -6.0), 6.0), list(E2M1_VALUES)) for v in points.tolist()])
    assert torch.equal(round_e2m1(points), expected)
    assert round_e2m1(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])).tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_int4_packs_every_pair() -> None:
    pairs = torch.tensor(list(itertools.product(range(-8, 8), repeat=2)), dtype=torch.int8)
    assert pack_int4(pairs).dtype == torch.uint8
    assert torch.equal(unpack_int4(pack_int4(pairs)), pairs)
    assert len(set(pack_int4(pairs).flatten().tolist())) == 256


@pytest.mark.parametrize(("width", "size"), [(2048, 128), (1152, 128), (192, 64), (96, 32), (4304, 16)])
def test_group_sizes_follow_the_width(width: int, size: int) -> None:
    assert group_size(width) == size


def test_widths_that_do_not_fit_are_said() -> None:
    with pytest.raises(ValueError, match="multiple of 16, got 40; leave the product in bf16 or w8a16"):
        to_int4(torch.ones(2, 40))
    with pytest.raises(ValueError, match="multiple of 16, got 24; leave the product in bf16"):
        to_nvfp4(torch.ones(2, 24), torch.tensor(1.0))


matrices = st.integers(0, 2**31 - 1).map(
    lambda seed: torch.randn(4, 128, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
)


@settings(deadline=None, max_examples=25)
@given(matrices)
def test_rounding_twice_is_rounding_once(x: torch.Tensor) -> None:
    scale = e4m3_scale(x.abs().amax())
    once = to_e4m3(x, scale)
    assert torch.equal(to_e4m3(once.float() * scale, scale).view(torch.uint8), once.view(torch.uint8))
    scale = int8_scale(x.abs().amax(1))[:, None]
    assert torch.equal(to_int8(to_int8(x, scale).float() * scale, scale), to_int8(x, scale))
    four = to_int4(x)
    again = to_int4(four.dequantised(torch.float32))
    assert torch.allclose(again.dequantised(torch.float32), four.dequantised(torch.float32), rtol=1e-2)
    tensor_scale = nvfp4_tensor_scale(x.abs().amax())
    fp4 = to_nvfp4(x, tensor_scale).dequantised()
    assert torch.equal(through_nvfp4(x, tensor_scale), fp4)
    assert torch.allclose(to_nvfp4(fp4, tensor_scale).dequantised(), fp4, rtol=0.07)


@settings(deadline=None, max_examples=25)
@given(matrices)
def test_errors_stay_within_half_a_step(x: torch.Tensor) -> None:
    amax = x.abs().amax()
    e4m3 = to_e4m3(x, e4m3_scale(amax)).float() * e4m3_scale(amax)
    assert bool(((e4m3 - x).abs() <= (x.abs() * 2.0**-4).clamp_min(e4m3_scale(amax) * 2.0**-10) * 1.0001).all())
    int8 = to_int8(x, int8_scale(amax)).float() * int8_scale(amax)
    assert float((int8 - x).abs().max()) <= 0.5001 * float(int8_scale(amax))
    four = to_int4(x)
    step = four.scale.float().repeat_interleave(128, 1)
    assert bool(((four.dequantised(torch.float32) - x).abs() <= 0.53 * step).all())
    blocks = to_nvfp4(x, nvfp4_tensor_scale(amax))
    block = x.unflatten(1, (-1, BLOCK)).abs().amax(2).repeat_interleave(BLOCK, 1)
    # Between 4 and 6 half a step is 1/6 of the block's largest; its scale, in E4M3, may be 1/16 off, or sub-normal.
    bound = block * (1 / 6 + 1 / 16) + float(nvfp4_tensor_scale(amax)) * E2M1_MAX * 2.0**-10
    assert bool(((blocks.dequantised() - x).abs() <= bound * 1.001).all())


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30, 1e30])
def test_zero_and_constant_tensors(value: float) -> None:
    x = torch.full((2, 128), value)
    amax = x.abs().amax()
    scales = {"e4m3": e4m3_scale(amax), "int8": int8_scale(amax), "nvfp4": nvfp4_tensor_scale(amax)}
    assert all(float(scale) > 0 for scale in scales.values())
    for rounded in (
        to_e4m3(x, scales["e4m3"]).float() * scales["e4m3"],
        to_int8(x, scales["int8"]).float() * scales["int8"],
        to_int4(x).dequantised(torch.float32),
        to_nvfp4(x, scales["nvfp4"]).dequantised(),
    ):
        assert torch.allclose(rounded, x, rtol=6e-3, atol=0)
        assert bool(rounded.isfinite().all())


def test_a_zero_block_among_others_is_zero() -> None:
    x = torch.cat((torch.zeros(1, BLOCK), torch.full((1, BLOCK), 6.0)), dim=1)
    result = to_nvfp4(x, nvfp4_tensor_scale(torch.tensor(6.0)))
    assert torch.equal(result.dequantised(), x)
    assert result.packed.shape == (1, BLOCK)
    assert result.block_scale.float().tolist() == [[0.0, E4M3_MAX]]


def test_balancing_changes_no_product_and_evens_out_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator) * torch.logspace(-2, 2, 64)
    weight = torch.randn(16, 64, generator=generator)
    divisor = balance(x.abs().amax(0), weight.abs().amax(0))
    assert torch.allclose((x / divisor) @ (weight * divisor).T, x @ weight.T, rtol=1e-4, atol=1e-3)
    spread = (x / divisor).abs().amax(0)
    assert float(spread.max() / spread.min()) < 0.05 * float(x.abs().amax(0).max() / x.abs().amax(0).min())
    assert torch.equal(balance(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])), torch.ones(2))
    with pytest.raises(ValueError, match="from 0 to 1"):
        balance(torch.ones(1), torch.ones(1), 1.5)
