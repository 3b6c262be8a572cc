"""E4M3 in the denoise kernel: its packing and its twin on the CPU, the kernel on a GPU of compute capability 9.0."""

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbopi.kernels import E4M3, E4M3_MAX
from turbopi.kernels.denoise import (
    DenoiseKernel,
    Plan,
    Shape,
    denoise_ref,
    gate_order,
    pack,
    packed,
    qkv_order,
)
from turbopi.kernels.denoise_fp8 import ScaledMatrix, pack_e4m3

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from denoise_loop import Case

TINY = Shape(64, 2, 4, 1, 32, 128, rows=3, longest=12)
FULL = Shape(1024, 3, 8, 1, 256, 4096, 10, longest=978)
SMALL = Shape(192, 6, 8, 1, 32, 640, 10, longest=288)
GROUPED = Shape(256, 2, 8, 2, 64, 512, 7, longest=200)


def codes(rows: int, k: int) -> Tensor:
    """E4M3 numbers, every code but NaN's among them."""
    every = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    return every[torch.arange(rows * k) * 7919 % len(every)].view(rows, k).view(E4M3)


def by_lanes(found_packed: Tensor, rows: int, k: int, parts: int) -> Tensor:
    """The matrix again, asked of each lane as PTX describes m16n8k16's A operand, one half of a step after another."""
    found = torch.full((rows, k), -1, dtype=torch.int16)
    units, steps, tiles, *_ = found_packed.shape
    for unit, step, tile, lane in itertools.product(*map(range, (units, steps, tiles, 32))):
        g, t = lane // 4, lane % 4
        first = unit % parts * (k // parts) + step * 32 + t * 8
        for byte, code in enumerate(found_packed[unit, step, tile, lane].tolist()):
            # Registers of 2 values: a0 row g, a1 row g + 8, then a2 and a3 further along K.
            half, register, element = byte // 8, byte // 2 % 4, byte % 2
            column = first + half * 4 + register // 2 * 2 + element
            found[(unit // parts * tiles + tile) * 16 + register % 2 * 8 + g, column] = code
    return found


@pytest.mark.parametrize(("tiles", "parts"), [(1, 1), (4, 1), (1, 2), (2, 4)])
def test_every_lane_finds_its_weights(tiles: int, parts: int) -> None:
    values = codes(64, 256)
    found = pack_e4m3(values, tiles, parts)
    assert found.numel() == values.numel()
    assert torch.equal(by_lanes(found, 64, 256, parts).to(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize(("tiles", "parts"), [(1, 1), (4, 1), (2, 4)])
def test_a_lanes_bytes_are_its_numbers_in_bf16(tiles: int, parts: int) -> None:
    """Next to `pack`: two loads there, one here, the same numbers in the same order."""
    values = codes(64, 256)
    numbers = pack(values.to(torch.bfloat16), tiles, parts)
    lanes = pack_e4m3(values, tiles, parts).view(E4M3).to(torch.bfloat16)
    both_halves = numbers.movedim(3, 4).flatten(4)
    assert torch.equal(lanes.view(torch.int16), both_halves.contiguous().view(torch.int16))


def test_scales_follow_their_rows() -> None:
    """As the kernel finds them: row by row as the matrices are packed, one layer after another."""
    layers = Case(TINY, 5, 1, device="cpu", fp8=True).layers
    found = packed(TINY, layers)
    assert found["scales"].shape == (2, 6 * 32 + 64 + 256 + 64)
    orders = {"qkv": qkv_order(TINY), "gate_up": gate_order(TINY)}
    for index, layer in enumerate(layers):
        at = 0
        for number, name in enumerate(("qkv", "out", "gate_up", "down")):
            matrix = getattr(layer, name)
            rows = orders.get(name, torch.arange(len(matrix.scale)))
            assert torch.equal(found["scales"][index, at : at + len(rows)], matrix.scale[rows])
            assert found["inverses"][index, number] == pytest.approx(matrix.inverse)
            at += len(rows)
        tiles = by_lanes(found["gate_up"][index], 256, 64, 1).to(torch.uint8)
        assert torch.equal(tiles, layer.gate_up.values.view(torch.uint8)[orders["gate_up"]])


def test_a_product_rounds_its_input_and_saturates_it() -> None:
    matrix = ScaledMatrix(codes(16, 32), torch.full((16,), 0.5), 4.0)
    x = torch.linspace(-200, 200, 96).view(3, 32)
    rounded = (x * 4).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float()
    assert torch.equal(matrix.product(x), rounded @ matrix.values.float().T * 0.5)


@pytest.mark.parametrize("shape", [TINY, GROUPED], ids=["tiny", "two key heads"])
def test_the_twin_costs_what_e4m3_costs(shape: Shape) -> None:
    case = Case(shape, 5, 3, device="cpu", fp8=True)
    ours, exact = case.noise.clone(), case.noise.clone()
    denoise_ref(case.layers, case.schedule, case.cache, ours)
    denoise_ref(case.exact, case.schedule, case.cache, exact)
    error = float((ours - exact).norm() / (exact - case.noise).norm())
    assert 2e-3 < error < 0.1


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r"values are torch\.float32, expected torch\.float8_e4m3fn"):
        pack_e4m3(torch.zeros(16, 32), 1)
    with pytest.raises(ValueError, match="values are 16 x 32, expected multiples of 32 and 32"):
        pack_e4m3(torch.zeros(16, 32).to(E4M3), 2)


def test_formats_are_not_mixed() -> None:
    case = Case(TINY, 5, 1, device="cpu", fp8=True)
    with pytest.raises(ValueError, match="in bfloat16 or in E4M3, not some of each"):
        packed(TINY, [case.layers[0], case.exact[1]])
    mixed = dataclasses.replace(case.layers[0], down=case.exact[0].down)
    with pytest.raises(ValueError, match="in bfloat16 or in E4M3, not some of each"):
        packed(TINY, [mixed])


def test_less_to_tell() -> None:
    """Half the words for attention's output and the hidden units."""
    wide = Plan(FULL, 128, 16, 64, 7, 1)
    narrow = dataclasses.replace(wide, fp8=True)
    assert wide.mail_words - narrow.mail_words == 10 * (2048 + 4096) // 4
    assert (wide.definitions["FP8"], narrow.definitions["FP8"]) == (0, 1)


GPU_CASES = [
    pytest.param(dataclasses.replace(FULL, depth=1), 552, 1, None, id="one layer"),
    pytest.param(FULL, 552, 10, None, id="full"),
    pytest.param(FULL, 968, 2, None, id="longest prefix"),
    pytest.param(FULL, 3, 2, 560, id="keys of most CTAs are missing"),
    pytest.param(dataclasses.replace(FULL, rows=16, longest=984), 600, 3, 700, id="sixteen rows"),
    pytest.param(dataclasses.replace(FULL, rows=1, longest=969), 40, 2, None, id="one row"),
    pytest.param(SMALL, 128, 10, None, id="small"),
    pytest.param(GROUPED, 77, 4, 190, id="two key heads, seven rows"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "prefix", "steps", "slots"), GPU_CASES)
def test_the_kernel_equals_its_twin(shape: Shape, prefix: int, steps: int, slots: int | None) -> None:
    """Nearer to its twin than E4M3 is to bfloat16, no further from that than the twin, and the same bits each time.

    A sum that differs in its last bit rounds some inputs to the other side, by a sixteenth: errors are larger than in
    bfloat16.
    """
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    case = Case(shape, prefix, steps, slots=slots, fp8=True)
    kernel = DenoiseKernel(shape, case.layers, torch.device("cuda"))
    answers = []
    for _ in range(5):
        x_t = case.noise.clone()
        kernel.run(case.schedule, case.cache, x_t)
        answers.append(x_t)
    torch.cuda.synchronize()
    assert all(torch.equal(answers[0], answer) for answer in answers)
    twin, exact = case.noise.clone(), case.noise.clone()
    denoise_ref(case.layers, case.schedule, case.cache, twin)
    denoise_ref(case.exact, case.schedule, case.cache, exact)
    cost = float((twin - exact).norm())
    assert float((answers[0] - twin).norm()) < 0.9 * cost
    assert float((answers[0] - exact).norm()) < 1.2 * cost


@pytest.mark.gpu
def test_what_is_no_number_comes_out() -> None:
    """NaN is a code of E4M3 and no empty word: the loop ends, and nobody takes its answer for one."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    case = Case(SMALL, 128, 2, fp8=True)
    kernel = DenoiseKernel(SMALL, case.layers, torch.device("cuda"))
    x_t = case.noise.clone()
    x_t[3, 5] = float("nan")
    kernel.run(case.schedule, case.cache, x_t)
    torch.cuda.synchronize()
    assert x_t.isnan().any()
