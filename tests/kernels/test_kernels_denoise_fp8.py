"""E4M3 weights packed for the denoise kernel: every lane finds what the matrix instruction wants of it."""

import itertools

import pytest
import torch
from kernel_tools import seeded
from torch import Tensor

from turbopi.kernels import E4M3
from turbopi.kernels.denoise import Cache, Layer, Schedule, Shape, denoise_ref, gate_order, pack, qkv_order
from turbopi.kernels.denoise_fp8 import (
    BF16_SHIFT,
    ScaledMatrix,
    bf16_bits,
    fold_scales,
    order_scale,
    pack_e4m3,
    product_ref,
)

SHAPE = Shape(64, 2, 4, 1, 32, 128, rows=3, longest=12)


def codes(rows: int, k: int) -> Tensor:
    """E4M3 numbers, every code but NaN's among them."""
    every = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    return every[torch.arange(rows * k) * 7919 % len(every)].view(rows, k).view(E4M3)


def by_lanes(packed: Tensor, rows: int, k: int, parts: int, native: bool) -> Tensor:
    """The matrix again, asked of each lane as PTX describes the instruction's A operand."""
    found = torch.full((rows, k), -1, dtype=torch.int16)
    units, steps, tiles, *_ = packed.shape
    for unit, step, tile, lane in itertools.product(*map(range, (units, steps, tiles, 32))):
        g, t = lane // 4, lane % 4
        group, part = unit // parts, unit % parts
        first = part * (k // parts) + step * 32 + t * 8
        for byte, code in enumerate(packed[unit, step, tile, lane].tolist()):
            half, register, element = byte // 8, byte // 2 % 4, byte % 2
            if native:
                # Registers of 4 bytes: a0 row g, a1 row g + 8, and the same of the other half of the step.
                lower, column = byte // 4 % 2, half * 4 + byte % 4
            else:
                # Of 2 values: a0 row g, a1 row g + 8, then a2 and a3 further along K.
                lower, column = register % 2, half * 4 + register // 2 * 2 + element
            found[(group * tiles + tile) * 16 + lower * 8 + g, first + column] = code
    return found


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("tiles", "parts"), [(1, 1), (4, 1), (1, 2), (2, 4)])
def test_every_lane_finds_its_weights(tiles: int, parts: int, native: bool) -> None:
    values = codes(64, 256)
    packed = pack_e4m3(values, tiles, parts, native=native)
    assert packed.numel() == values.numel()
    assert torch.equal(by_lanes(packed, 64, 256, parts, native).to(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize(("tiles", "parts"), [(1, 1), (4, 1), (2, 4)])
def test_a_lanes_bytes_are_its_bf16_numbers(tiles: int, parts: int) -> None:
    """Next to `pack`: two loads there, one here, the same numbers in the same order."""
    values = codes(64, 256)
    numbers = pack(values.to(torch.bfloat16), tiles, parts)
    lanes = pack_e4m3(values, tiles, parts).view(E4M3).to(torch.bfloat16)
    both_halves = numbers.movedim(3, 4).flatten(4)
    assert torch.equal(lanes.view(torch.int16), both_halves.contiguous().view(torch.int16))


def test_bits_in_other_places_are_the_number() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    numbers = every.view(E4M3).to(torch.bfloat16)
    factor = torch.tensor(2.0**BF16_SHIFT, dtype=torch.bfloat16)
    made = bf16_bits(every).double() * factor.double()
    real = ~numbers.isnan()
    assert torch.equal(made[real], numbers[real].double())
    assert made[127] == 480.0


def test_scales_follow_their_rows() -> None:
    for order, tiles in ((qkv_order(SHAPE), 1), (gate_order(SHAPE), 4)):
        values, scale, x = codes(len(order), 64), seeded(len(order)).cpu().abs(), seeded(3, 64).cpu().bfloat16()
        plain = product_ref(x, ScaledMatrix(values, scale))
        ordered = ScaledMatrix(values.view(torch.uint8)[order].view(E4M3), order_scale(scale, order, tiles).flatten())
        assert torch.equal(product_ref(x, ordered), plain[:, order])


def powers(*shape: int) -> Tensor:
    return torch.exp2((torch.arange(torch.Size(shape).numel()) % 5 - 12).float()).view(shape)


def loop(rows: int = 3, prefix: int = 5) -> tuple[Schedule, Cache, Tensor]:
    g = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=g)

    angles = torch.arange(SHAPE.longest)[:, None] / 10 ** (torch.arange(16) / 16)
    kept = (SHAPE.depth, 1, prefix + rows, 32)
    cache = Cache(
        random(*kept).bfloat16(), random(*kept).bfloat16(), torch.tensor([prefix]), angles.cos(), angles.sin()
    )
    schedule = Schedule(
        random(2, 5, 3, 64) * 0.3, random(32, 64) / 6, random(2, 64) / 9, random(32, 64) / 9, random(32)
    )
    return schedule, cache, random(rows, 32)


def layers() -> list[Layer]:
    sizes = ((192, 64), (64, 128), (256, 64), (64, 128))
    found = []
    for _ in range(SHAPE.depth):
        parts = (ScaledMatrix(codes(*size), powers(size[0])) for size in sizes)
        found.append(Layer(*parts))  # type: ignore[arg-type]
    return found


def test_the_twin_takes_scaled_matrices() -> None:
    """With scales that are powers of two bf16 holds the scaled weights exactly, and both twins agree to the bit."""
    narrow = layers()
    parts = ("qkv", "out", "gate_up", "down")
    wide = [Layer(*(getattr(layer, part).float().bfloat16() for part in parts)) for layer in narrow]
    answers = []
    for each in (narrow, wide):
        schedule, cache, x_t = loop()
        denoise_ref(each, schedule, cache, x_t)
        answers.append(x_t)
    assert torch.equal(*answers)


def test_scales_may_stand_in_the_gates() -> None:
    narrow = layers()
    parts = {name: [getattr(layer, name) for layer in narrow] for name in ("out", "down")}
    ones = [
        Layer(
            layer.qkv,
            *(
                ScaledMatrix(matrix.values, torch.ones_like(matrix.scale)) if name in parts else matrix
                for name, matrix in (("out", layer.out), ("gate_up", layer.gate_up), ("down", layer.down))
            ),
        )
        for layer in narrow
    ]
    answers = []
    for each, folded in ((narrow, False), (ones, True)):
        schedule, cache, x_t = loop()
        table = fold_scales(schedule.modulation, *([m.scale for m in parts[name]] for name in ("out", "down")))
        schedule = Schedule(table, *list(vars(schedule).values())[1:]) if folded else schedule
        denoise_ref(each, schedule, cache, x_t)
        answers.append(x_t)
    assert torch.equal(*answers)


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r"values are torch\.float32, expected torch\.float8_e4m3fn"):
        pack_e4m3(torch.zeros(16, 32), 1)
    with pytest.raises(ValueError, match="values are 16 x 32, expected multiples of 32 and 32"):
        pack_e4m3(torch.zeros(16, 32).to(E4M3), 2)
