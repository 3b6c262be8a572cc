"""The tiled linear layer in E4M3, and the norm between such products: twins on any machine, the kernels on Hopper."""

from dataclasses import replace

import pytest
import torch
from kernel_tools import DEVICE, assert_guard, guarded, seeded
from torch import Tensor

from turbopi.kernels import (
    E4M3,
    LinearTiling,
    Norm,
    VisionTilings,
    early_norm,
    early_norm_obstacles,
    layer_norm_ref,
    linear_ref,
    store_ref,
    tiled_linear,
    tiled_linear_obstacles,
    tiled_linear_ref,
)

BF16 = torch.bfloat16
INVERSE = 60.0


def rounded(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal values in E4M3."""
    return store(seeded(*shape, scale=scale), 1.0)


def store(values: Tensor, inverse: float) -> Tensor:
    out = guarded(*values.shape, dtype=E4M3)
    store_ref(values.float(), out, inverse)
    return out


def columns(features: int, k: int) -> Tensor:
    """Scales of E4M3's sums, each another."""
    return (0.5 + torch.arange(features, device=DEVICE) % 7 / 7) * k**-0.5


def steps_apart(a: Tensor, b: Tensor) -> float:
    """The share of values that were rounded to another E4M3 number."""
    return float((a.view(torch.uint8) != b.view(torch.uint8)).float().mean())


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "e4m3"])
def test_the_twin_scales_columns_and_rounds_once(narrow):
    x, weight, scale, bias = rounded(10, 96), rounded(40, 96), columns(40, 96), seeded(40)
    out, want = (torch.empty(10, 40, device=DEVICE, dtype=E4M3 if narrow else torch.float32) for _ in range(2))
    inverse = INVERSE if narrow else 1.0
    tiled_linear_ref(x, weight, out, LinearTiling(1, 8), bias, "gelu", scale=scale, inverse=inverse)
    linear_ref(x, weight, want, bias, "gelu", scale=scale, inverse=inverse)
    assert torch.equal(out.float(), want.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": None}, "a scale, and out in torch.float8_e4m3fn, belong to operands in torch.float8_e4m3fn"),
        (
            {"x": torch.zeros(8, 64, dtype=BF16), "scale": None},
            "weight is torch.float8_e4m3fn, expected the dtype of x",
        ),
        ({"inverse": 2.0}, "inverse 2 belongs to an output in"),
        ({"residual": True, "out": torch.zeros(8, 64, dtype=E4M3)}, "a stream is not kept in torch.float8_e4m3fn"),
        ({"tiling": LinearTiling(2, 16, 2)}, "2 parts of 1 blocks of K"),
        ({"norm": Norm(torch.zeros(64), torch.zeros(8, 4, 2))}, "a norm behind sums of E4M3"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes, message):
    given = {"x": torch.zeros(8, 64, dtype=E4M3), "weight": torch.zeros(64, 64, dtype=E4M3)}
    given |= {"out": torch.zeros(8, 64, dtype=BF16), "tiling": LinearTiling(1, 16), "scale": torch.ones(64)} | changes
    if changes.get("residual"):
        given["residual"] = torch.zeros(8, 64, dtype=BF16)
    with pytest.raises(ValueError, match=message):
        tiled_linear_ref(**given)


def test_tilings_of_a_block_in_e4m3():
    whole, apart = LinearTiling(1, 64), LinearTiling(4, 48, 4)
    found = VisionTilings(LinearTiling(2, 112), LinearTiling(1, 96), LinearTiling(2, 136), LinearTiling(1, 72), whole)
    assert found.obstacles(1152, 4352, 2048, e4m3=True) == []
    assert replace(found, qkv=apart).obstacles(1152, 4352, 2048, e4m3=True) == []
    assert replace(found, qkv=apart).obstacles(1152, 4352, 2048) != []


def test_what_is_in_the_norms_way_is_said():
    x, out = torch.zeros(4, 20, dtype=BF16), torch.zeros(4, 20)
    found = early_norm_obstacles(x, out)
    assert "a result in torch.float32" in found
    assert "rows or addresses that are not multiples of 16 bytes" in found
    with pytest.raises(ValueError, match="the early norm cannot run"):
        early_norm(x, out)


GPU_CASES = [
    (8, 64, 64, LinearTiling(1, 64), "bias"),
    (100, 208, 208, LinearTiling(1, 72), "gelu"),
    (500, 4352, 1152, LinearTiling(2, 136), "gelu"),
    (512, 3456, 1152, LinearTiling(2, 112), "bias"),
    (512, 1152, 1152, LinearTiling(1, 72), "stream"),
    (500, 1152, 1152, LinearTiling(1, 96), "stream"),
    (768, 1152, 4352, LinearTiling(1, 128), "stream"),
    (512, 1152, 4352, LinearTiling(2, 96, 2), "stream"),
    (768, 1152, 4352, LinearTiling(3, 96, 3), "stream"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "features", "k", "tiling", "epilogue"), GPU_CASES, ids=str)
def test_the_kernel_equals_its_twin(rows, features, k, tiling, epilogue):
    """Sums of E4M3 are kept to about 14 bits; the same bits again, and no byte beside the output."""
    x, weight, scale = rounded(rows, k), rounded(features, k), columns(features, k)
    bias, stream = seeded(features, dtype=BF16), seeded(rows, features, dtype=BF16)
    if found := tiled_linear_obstacles(x, weight):
        pytest.skip("; ".join(found))
    narrow, onto = epilogue == "gelu", epilogue == "stream"
    activation = "gelu" if narrow else "none"
    outs = []
    for _ in range(2):
        outs.append(guarded(rows, features, dtype=E4M3 if narrow else BF16))
        more = {"scale": scale, "inverse": INVERSE if narrow else 1.0}
        if onto:
            more["residual"] = outs[-1].copy_(stream)
        tiled_linear(x, weight, outs[-1], tiling, bias, activation, **more)
        assert_guard(outs[-1])
    assert torch.equal(*(out.view(torch.uint8) for out in outs))
    want = torch.empty(rows, features, device=DEVICE)
    plain = LinearTiling(1, 8)
    tiled_linear_ref(x, weight, want, plain, bias, activation, stream if onto else None, scale=scale)
    if narrow:
        assert steps_apart(outs[0], store(want, INVERSE)) <= 0.04
    else:
        assert (outs[0].float() - want).norm() <= 4e-3 * want.norm()


@pytest.mark.gpu
def test_the_early_norm_equals_its_twin():
    x = seeded(500, 1152, dtype=BF16, scale=2.0) + 1
    out, want = guarded(500, 1152, dtype=E4M3), torch.empty(500, 1152, device=DEVICE, dtype=E4M3)
    if found := early_norm_obstacles(x, out):
        pytest.skip("; ".join(found))
    early_norm(x, out, inverse=INVERSE)
    layer_norm_ref(x, want, inverse=INVERSE)
    assert_guard(out)
    assert steps_apart(out, want) <= 2e-3
