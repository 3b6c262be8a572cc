"""The tiled product with GeGLU: its packing, its tilings and its twin on the CPU, the kernel on Hopper."""

import pytest
import torch
from kernel_tools import TOLERANCE, assert_guard, guarded, seeded
from torch import Tensor
from torch.nn import functional as F

from turbopi.kernels import TiledGeglu, geglu_obstacles, tile_geglu, tiled_geglu, tiled_geglu_ref
from turbopi.kernels._wgmma import SHARED_BYTES
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


def test_tiles_fill_the_gpu() -> None:
    """On 132 multiprocessors, the full model's prefix keeps the tensor cores at more than 93 % useful work."""
    for rows in (*range(528, 985, 8), 8 * 968, 32 * 552):
        tiling = Tiling.fit(FULL[0], rows, 132)
        rounds = -(-tiling.tiles(FULL[0], rows) // 132)
        assert rows * FULL[0] > 0.93 * rounds * tiling.tokens * 132 * 256
        assert tiling.tokens % 8 == 0
        assert tiling.slots >= 3
        assert tiling.shared_bytes <= SHARED_BYTES
    assert Tiling.fit(FULL[0], 552, 132) == Tiling(184, 4)


def test_the_compiler_is_told_every_register() -> None:
    found = Tiling(16, 4).definitions
    assert found["REGISTERS"] == '"{%0, %1, %2, %3, %4, %5, %6, %7}"'
    assert found["OPERANDS"].count('"+f"') == 8
    assert (found["INPUTS"], found["ADD"]) == ('"%8, %9"', '"%10"')
    text = defined(SOURCE, found)
    assert text.index("#define TOKENS 16\n") < text.index(f'#line 1 "{SOURCE.name}"\n') < text.index('extern "C"')


def test_what_is_in_the_way_is_said() -> None:
    found = geglu_obstacles(384, 96, torch.float32, torch.device("cpu"))
    for words in ("384 rows of gate and up", "96 columns", "weights in torch.float32", "capability 9.0"):
        assert any(words in one for one in found)
    with pytest.raises(ValueError, match="384 rows, expected a multiple of 256"):
        tile_geglu(torch.empty(384, 64))
    tiled, out = TiledGeglu(torch.empty(256, 64, dtype=torch.bfloat16)), torch.empty(3, 128)
    with pytest.raises(ValueError, match=r"capability 9\.0; x in torch\.float32"):
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
