"""The tiled linear layer: its tilings, its norm behind the sums on any machine, the kernel itself on Hopper."""

import json
from pathlib import Path

import pytest
import torch
from kernel_tools import DEVICE, TOLERANCE, assert_guard, guarded, seeded
from torch.nn import functional as F

from turbopi.kernels import (
    LinearTiling,
    Norm,
    VisionTilings,
    linear_ref,
    moments_of,
    tiled_linear,
    tiled_linear_obstacles,
    tiled_linear_ref,
    tuning,
    vision_tilings,
)
from turbopi.kernels._wgmma import SHARED_BYTES

BF16 = torch.bfloat16


def test_tiles_are_counted_in_whole_clusters():
    assert LinearTiling(2, 136).ctas(512, 4352) == 4 * 32
    assert LinearTiling(2, 72, splits=2).ctas(512, 1152) == 4 * 16 * 2
    assert LinearTiling(3, 64).ctas(552, 2560) == 3 * 40
    for tiling in (
        LinearTiling(1, 8),
        LinearTiling(4, 48, 4),
        LinearTiling(2, 256),
        LinearTiling(2, 112, most_slots=4),
    ):
        assert tiling.shared_bytes <= SHARED_BYTES
        assert 3 <= tiling.slots <= tiling.most_slots


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 5}, "groups is 5, expected 1 to 4"),
        ({"columns": 100}, "columns is 100, expected a multiple of 8"),
        ({"columns": 264}, "columns is 264"),
        ({"splits": 3}, "splits is 3, expected 1, or as many as there are groups: 2"),
        ({"most_slots": 2}, "most_slots is 2, expected 3 to 8"),
        ({"groups": 4, "columns": 256, "splits": 4}, "a tile of 256 by 256 does not fit"),
    ],
)
def test_bad_tilings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearTiling(**{"groups": 2, "columns": 128, **arguments})


def test_the_compiler_is_told_every_register():
    found = LinearTiling(1, 16).definitions
    assert found["REGISTERS"] == '"{%0, %1, %2, %3, %4, %5, %6, %7}"'
    assert found["OPERANDS"].count('"+f"') == 8
    assert found["INPUTS"] == '"%8, %9"'


@pytest.mark.parametrize("tiles", [1, 4, 24])
def test_a_norm_behind_the_sums_is_the_norm_in_front(tiles):
    """Also of rows far from zero, where sums of squares would cancel."""
    x, weight, bias = seeded(10, 96) + 100 * seeded(10, 1), seeded(40, 96, scale=0.1), seeded(40)
    out, want = torch.empty(10, 40, device=DEVICE), torch.empty(10, 40, device=DEVICE)
    norm = Norm(weight.sum(1), moments_of(x, tiles).contiguous())
    tiled_linear_ref(x, weight, out, LinearTiling(1, 8), bias, "gelu", norm=norm)
    linear_ref(F.layer_norm(x.double(), (96,), eps=1e-6).float(), weight, want, bias, "gelu")
    torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3)


def test_moments_are_of_what_was_stored():
    x, weight, stream = seeded(6, 32, dtype=BF16), seeded(64, 32, dtype=BF16), seeded(6, 64, dtype=BF16)
    moments = torch.empty(6, 4, 2, device=DEVICE)
    tiled_linear_ref(x, weight, stream, LinearTiling(1, 16), residual=stream, moments=moments)
    tiles = stream.float().view(6, 4, 16)
    torch.testing.assert_close(moments[..., 0], tiles.sum(-1))
    torch.testing.assert_close(moments[..., 1], tiles.var(-1, unbiased=False) * 16)


def test_what_is_in_the_way_is_said():
    x, weight, out = torch.empty(8, 64), torch.empty(8, 64, dtype=BF16), torch.empty(8, 8, dtype=BF16)
    assert "weights in torch.float32" in tiled_linear_obstacles(x, weight, out)
    assert any("multiples of 16 bytes" in one for one in tiled_linear_obstacles(weight[:, 1:], weight, out))
    assert any("multiples of 16 bytes" in one for one in tiled_linear_obstacles(weight, weight, out, weight[0, :7]))
    moments = torch.empty(8, 1, 2)
    for arguments, message in (
        ({"tiling": LinearTiling(2, 8, 2)}, "2 parts of 1 blocks of K"),
        ({"out": out[:, :7]}, r"out has shape \(8, 7\)"),
        ({"activation": "relu"}, "unknown activation 'relu'"),
        ({"tiling": LinearTiling(1, 16), "moments": moments}, "moments of 8 columns in tiles of 16"),
        ({"moments": moments.bfloat16()}, "moments is torch.bfloat16"),
        ({"moments": torch.empty(8, 2, 2)}, "moments has 2 tiles, expected 1"),
        ({"norm": Norm(torch.empty(8), torch.empty(8, 3, 2))}, "a norm by 3 tiles of moments with K = 64"),
        ({"norm": Norm(torch.empty(7), moments)}, r"the norm's sums has shape \(7,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            tiled_linear_ref(**{"x": weight, "weight": weight, "out": out, "tiling": LinearTiling(1, 8), **arguments})
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"the tiled product cannot run: no GPU of compute capability 9\.0"):
            tiled_linear(weight, weight, out, LinearTiling(1, 8))


def test_tilings_of_a_block_are_of_a_gpu_and_of_its_rows(tmp_path, monkeypatch):
    part = {"groups": 2, "columns": 128}
    entry = dict.fromkeys(("qkv", "out", "fc1", "fc2", "projector"), part) | {"fc2": part | {"splits": 2}, "grey": True}
    file = tmp_path / "nvidia-h200.json"
    file.write_text(json.dumps({"configs": {"tiled_vision": {"bfloat16 512x1152x4352": entry}}}))
    monkeypatch.setattr(tuning, "gpu_file", lambda device: file)

    class OnGpu:
        dtype, device, shape = BF16, torch.device("cuda"), (1152, 4352)

    tuning.forget()
    found = vision_tilings(OnGpu(), 512)
    assert found.fc2 == LinearTiling(2, 128, 2)
    assert found.grey
    assert found.obstacles(1152, 4352, 2048) == []
    assert "moments of 1160 columns in tiles of 128" in found.obstacles(1160, 4352, 2048)
    assert vision_tilings(OnGpu(), 513) is None
    assert vision_tilings(torch.empty(1152, 4352, dtype=BF16), 512) is None
    tuning.forget()


START = Path(__file__).parents[2] / "benchmarks" / "vision_start.json"


@pytest.mark.parametrize("file", [START, *sorted(tuning.TUNED.glob("*.json"))], ids=lambda f: f.name)
def test_shipped_tilings_fit_siglip(file):
    found = json.loads(file.read_text())
    for name, entry in (found if file == START else found["configs"].get("tiled_vision", {})).items():
        assert name.endswith("x1152x4352")
        assert VisionTilings.read(entry).obstacles(1152, 4352, 2048, name.startswith("float8")) == []


GPU_CASES = [
    (8, 64, 64, LinearTiling(1, 64), "bias"),
    (100, 200, 200, LinearTiling(1, 72), "gelu"),
    (300, 1160, 1152, LinearTiling(3, 64, most_slots=4), "bias"),
    (512, 3456, 1152, LinearTiling(2, 112), "bias"),
    (512, 4352, 1152, LinearTiling(2, 136), "gelu"),
    (512, 1152, 1152, LinearTiling(1, 72), "stream"),
    (512, 1152, 4352, LinearTiling(2, 72, 2), "stream"),
    (500, 1152, 4304, LinearTiling(3, 128, 3), "stream"),
    (256, 1152, 4352, LinearTiling(4, 48, 4), "stream"),
    (768, 4352, 1152, LinearTiling(4, 104), "gelu"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "features", "k", "tiling", "epilogue"), GPU_CASES, ids=str)
def test_the_kernel_equals_its_twin(rows, features, k, tiling, epilogue):
    """Within bfloat16's rounding, bit for bit the same again, and no byte beside its output."""
    x, stream = seeded(rows, k, dtype=BF16), seeded(rows, features, dtype=BF16)
    weight = seeded(features, k, dtype=BF16, scale=1.5 * k**-0.5)
    if found := tiled_linear_obstacles(x, weight):
        pytest.skip("; ".join(found))
    norm, moments = None, [None, None]
    if epilogue != "stream" and tiling.splits == 1:
        norm = Norm(weight.float().sum(1), moments_of(x, 4).contiguous())
    if epilogue == "stream" and features % tiling.columns == 0:
        moments = [guarded(rows, features // tiling.columns, 2) for _ in range(2)]
    bias, activation = seeded(features, dtype=BF16), "gelu" if epilogue == "gelu" else "none"
    outs = [guarded(rows, features, dtype=BF16) for _ in range(2)]
    for out, left in zip(outs, moments, strict=True):
        out.copy_(stream)
        torch.cuda.synchronize()
        added = out if epilogue == "stream" else None
        tiled_linear(x, weight, out, tiling, bias, activation, added, norm, left)
        assert_guard(out)
    assert torch.equal(outs[0], outs[1])
    want = torch.empty(rows, features, device=DEVICE)
    tiled_linear_ref(x, weight, want, tiling, bias, activation, stream if epilogue == "stream" else None, norm)
    error = outs[0].float() - want
    assert error.abs().max() <= TOLERANCE[BF16] * want.abs().max()
    assert error.norm() <= 2e-3 * want.norm()
    if moments[0] is not None:
        assert_guard(moments[0])
        torch.testing.assert_close(moments[0], moments_of(outs[0], moments[0].shape[1]), rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
def test_rows_may_lie_apart():
    weight = seeded(64, 128, dtype=BF16)
    if found := tiled_linear_obstacles(weight):
        pytest.skip("; ".join(found))
    x, out, want = seeded(40, 256, dtype=BF16), guarded(40, 96, dtype=BF16), torch.empty(40, 64, device=DEVICE)
    tiled_linear(x[:, 64:192], weight, out[:, 16:80], LinearTiling(1, 32))
    linear_ref(x[:, 64:192], weight, want)
    assert (out[:, 16:80].float() - want).norm() <= 2e-3 * want.norm()
    assert out[:, :16].isnan().all()
    assert out[:, 80:].isnan().all()
