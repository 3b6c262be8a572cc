"""The tiled product with GeGLU: its packing, its tilings and its twin on the CPU, the kernel on Hopper."""

from pathlib import Path

import pytest
import torch
from kernel_tools import TOLERANCE, assert_guard, guarded, seeded
from torch import Tensor
from torch.nn import functional as F

from turbopi.kernels import E4M3, TiledGeglu, geglu_obstacles, store_ref, tile_geglu, tiled_geglu, tiled_geglu_ref
from turbopi.kernels._wgmma import SHARED_BYTES, tile_definitions
from turbopi.kernels.cuda_module import defined
from turbopi.kernels.tiled_geglu import SOURCE, Tiling, geglu_order

FULL = (32768, 2048)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = (x.float() @ weight.float().T).chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def as_threads_store(sums: Tensor) -> Tensor:
    """Sums (M,2F) of reordered rows to (M,F): where the accumulators of wgmma lie, and where `store` puts them."""
    out = torch.full((len(sums), sums.shape[1] // 2), float("nan"))
    for group in range(sums.shape[1] // 128):
        for warp in range(4):
            for g in range(8):
                for block in range(2):
                    row = group * 128 + block * 64 + warp * 16 + g
                    unit = group * 64 + warp * 16 + g * 2 + block
                    out[:, unit] = F.gelu(sums[:, row], approximate="tanh") * sums[:, row + 8]
    return out


def test_a_thread_holds_gate_and_up_of_neighbours() -> None:
    x, weight = torch.randn(5, 64), torch.randn(512, 64)
    assert torch.equal(geglu_order(512).sort().values, torch.arange(512))
    torch.testing.assert_close(as_threads_store(x @ tile_geglu(weight).rows.T), plain(x, weight))


def test_the_twin_is_geglu_of_the_plain_weight() -> None:
    x, weight, out = torch.randn(7, 64), torch.randn(256, 64), torch.empty(7, 128)
    tiled_geglu_ref(x, tile_geglu(weight), out)
    torch.testing.assert_close(out, plain(x, weight))


def in_e4m3(rows: int, features: int, k: int) -> tuple[Tensor, TiledGeglu]:
    """Operands whose products have the size of the plain test's."""
    x = seeded(rows, k, scale=32.0).to(E4M3)
    weight = seeded(features, k, scale=60.0).to(E4M3)  # far from 448, behind which it would be NaN
    scale = 1.5 * k**-0.5 / 1920 * (0.5 + torch.rand(features, generator=torch.Generator().manual_seed(0)))
    return x, tile_geglu(weight, scale.to(x.device), 1 / 32)


def test_the_twin_scales_sums_of_e4m3() -> None:
    x, tiled = in_e4m3(7, 256, 128)
    assert tiled.e4m3
    assert tiled.nbytes == 256 * 128 + 4 * 256
    assert tiled.scale is not None
    order = geglu_order(256)
    weight = torch.empty(256, 128)
    weight[order] = tiled.rows.float() * tiled.scale[:, None]
    want, out = plain(x, weight), torch.empty(7, 128)
    tiled_geglu_ref(x, tiled, out)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    narrow, rounded = torch.empty(7, 128, dtype=E4M3), torch.empty(7, 128, dtype=E4M3)
    tiled_geglu_ref(x, tiled, narrow, 20.0)
    store_ref(out, rounded, 20.0)
    assert torch.equal(narrow.float(), rounded.float())


def test_a_scale_belongs_to_e4m3() -> None:
    with pytest.raises(ValueError, match=r"a scale belongs to a weight in torch\.float8_e4m3fn"):
        tile_geglu(torch.empty(256, 64), torch.ones(256))
    with pytest.raises(ValueError, match="a scale belongs"):
        tile_geglu(torch.empty(256, 128).to(E4M3))
    with pytest.raises(ValueError, match="scale has shape"):
        tile_geglu(torch.empty(256, 128).to(E4M3), torch.ones(255))
    with pytest.raises(ValueError, match="inverse 2 belongs to an output"):
        tiled_geglu(torch.empty(3, 64), tile_geglu(torch.empty(256, 64)), torch.empty(3, 128), 2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
def test_tiles_fill_the_gpu(dtype: torch.dtype) -> None:
    """On 132 multiprocessors, the full model's prefix keeps the tensor cores at more than 90 % useful work."""
    for rows in (*range(528, 985, 8), 8 * 968, 32 * 552):
        tiling = Tiling.fit(FULL[0], rows, 132, dtype)
        rounds = -(-tiling.tiles(FULL[0], rows) // 132)
        assert rows * FULL[0] > 0.9 * rounds * tiling.tokens * 132 * 256
        assert tiling.tokens % 8 == 0
        assert tiling.slots >= 3
        assert tiling.shared_bytes <= SHARED_BYTES
    assert Tiling.fit(FULL[0], 552, 132) == Tiling(184, 4)


def test_the_compiler_is_told_every_register() -> None:
    found = tile_definitions(16, 4, torch.bfloat16)
    assert found["REGISTERS"] == '"{%0, %1, %2, %3, %4, %5, %6, %7}"'
    assert found["OPERANDS"].count('"+f"') == 8
    assert (found["INPUTS"], found["ADD"]) == ('"%8, %9"', '"%10"')
    text = defined(SOURCE, found)
    assert text.index("#define TOKENS 16\n") < text.index(f'#line 1 "{SOURCE.name}"\n') < text.index('extern "C"')
    assert (tile_definitions(16, 4, E4M3)["E4M3"], found["E4M3"]) == (1, 0)


def test_what_a_source_includes_stands_in_it_once(tmp_path: Path) -> None:
    for name, text in (
        ("a.cu", '#include "b.cuh"\n#include "c.cuh"\na\n'),
        ("b.cuh", '#include "c.cuh"\nb\n'),
        ("c.cuh", "c\n"),
    ):
        (tmp_path / name).write_text(text)
    lines = defined(tmp_path / "a.cu", {"X": 1}).splitlines()
    assert [line for line in lines if "line" not in line] == ["#define X 1", "c", "b", "a"]
    assert lines[-2:] == ['#line 3 "a.cu"', "a"]


def test_what_is_in_the_way_is_said() -> None:
    found = geglu_obstacles(384, 96, torch.float32, torch.device("cpu"))
    for words in ("384 rows of gate and up", "96 columns", "weights in torch.float32", "capability 9.0"):
        assert any(words in one for one in found)
    assert "64 columns are not a multiple of 128" in geglu_obstacles(256, 64, E4M3, torch.device("cpu"))
    with pytest.raises(ValueError, match="384 rows, expected a multiple of 256"):
        tile_geglu(torch.empty(384, 64))
    tiled, out = TiledGeglu(torch.empty(256, 64, dtype=torch.bfloat16)), torch.empty(3, 128)
    with pytest.raises(ValueError, match=r"capability 9\.0; x in torch\.float32, weights in"):
        tiled_geglu(torch.empty(3, 64), tiled, out)
    with pytest.raises(ValueError, match=r"out has shape \(3, 127\)"):
        tiled_geglu(torch.empty(3, 64), tiled, out[:, :127])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "features", "k"),
    [(1, 256, 64), (100, 512, 512), (333, 8192, 1024), *((rows, *FULL) for rows in (16, 552, 560, 592, 968, 7744))],
)
def test_the_kernel_equals_its_twin(rows: int, features: int, k: int) -> None:
    """Within bfloat16's rounding, bit for bit the same again, and no byte beside its output."""
    if found := geglu_obstacles(features, k, torch.bfloat16, torch.device("cuda")):
        pytest.skip("; ".join(found))
    x = seeded(rows, k, dtype=torch.bfloat16)
    weight = tile_geglu(seeded(features, k, dtype=torch.bfloat16, scale=1.5 * k**-0.5))
    first, second = (guarded(rows, features // 2, dtype=torch.bfloat16) for _ in range(2))
    for out in (first, second):
        tiled_geglu(x, weight, out)
        assert_guard(out)
    assert torch.equal(first, second)
    want = torch.empty(rows, features // 2, device="cuda")
    tiled_geglu_ref(x, weight, want)
    error = first.float() - want
    assert error.abs().max() <= TOLERANCE[torch.bfloat16] * want.abs().max()
    assert error.norm() <= 2e-3 * want.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "features", "k"),
    [(1, 256, 128), (100, 512, 512), (333, 8192, 1024), *((rows, *FULL) for rows in (16, 560, 592, 968, 7744))],
)
def test_the_kernel_in_e4m3_equals_its_twin(rows: int, features: int, k: int) -> None:
    """Within E4M3's rounding, which sums kept in the tensor cores' registers shift a little; the same bits again."""
    if found := geglu_obstacles(features, k, E4M3, torch.device("cuda")):
        pytest.skip("; ".join(found))
    x, weight = in_e4m3(rows, features, k)
    first, second = (guarded(rows, features // 2, dtype=E4M3) for _ in range(2))
    for out in (first, second):
        tiled_geglu(x, weight, out, 30.0)
        assert_guard(out)
    assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    want, rounded = torch.empty(rows, features // 2, device="cuda"), torch.empty_like(first)
    tiled_geglu_ref(x, weight, want)
    store_ref(want, rounded, 30.0)
    error, alone = ((out.float() - 30.0 * want).norm() for out in (first, rounded))
    assert error <= 1.05 * alone + 1e-3 * 30.0 * want.norm()
