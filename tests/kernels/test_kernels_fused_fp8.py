"""The kernels of the fused denoise loop with E4M3 operands and results, against their twins."""

import pytest
import torch
from kernel_tools import DEVICE, assert_equal_up_to_rounding, assert_guard, guarded, seeded, up
from test_kernels_fp8 import INVERSE, NO_FP8, SAME, SHORT_SUMS, SLACK, assert_one_step, eighths, shapes
from test_kernels_fused import HOPPER

from turbopi import kernels
from turbopi.kernels import E4M3, GemmConfig, row_products_tma

pytestmark = pytest.mark.skipif(NO_FP8, reason="E4M3 needs compute capability 8.9")
TINY = GemmConfig(16, 16, 32, group_m=1, stages=2)
RINGS = [
    GemmConfig(64, 32, 128, warps=4, stages=8, descriptors=True),
    GemmConfig(64, 16, 256, warps=4, stages=2, descriptors=True),
]
# Rows, columns, depth.
PRODUCTS = [(1, 16, 48), (37, 48, 80)]
MANY = [(10, 1024, 4096), (50, 1024, 2048), (64, 1024, 4096), (100, 1024, 4096)]


def scaled(n: int, k: int):
    """Weights in E4M3 and the scale of each row, about as a calibration leaves them."""
    return eighths(n, k, scale=16.0), (seeded(n).abs() + 0.5) * k**-0.5 / 16


def check_parts(shape, splits, config):
    m, n, k = shape
    x, (w, scale) = eighths(m, k), scaled(n, k)
    parts, want = guarded(splits, m, n), guarded(splits, m, n)
    kernels.row_parts(x, w, parts, config, scale)
    kernels.row_parts_ref(up(x), up(w), want, scale=scale)
    assert_equal_up_to_rounding(parts.sum(0), want.sum(0), 100 * SHORT_SUMS if DEVICE == "cuda" else 1.0)
    assert_guard(parts)
    again = guarded(splits, m, n)
    kernels.row_parts(x, w, again, config, scale)
    assert torch.equal(parts, again)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", shapes(PRODUCTS, MANY))
def test_row_parts(shape, splits):
    check_parts(shape, splits, TINY)
    if DEVICE == "cuda":
        check_parts(shape, splits, None)


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("config", RINGS, ids=str)
@pytest.mark.parametrize("shape", MANY)
def test_row_parts_of_hopper(shape, config):
    check_parts(shape, 4, config)


def check_geglu(shape, config):
    m, f, k = shape
    x, (w, scale) = eighths(m, k), scaled(2 * f, k)
    out, want = guarded(m, f, dtype=E4M3), guarded(m, f, dtype=E4M3)
    kernels.row_geglu(x, w, out, config, scale, INVERSE)
    kernels.row_geglu_ref(up(x), up(w), want, scale=scale, inverse=INVERSE)
    assert_one_step(out, want, SAME, SLACK)
    plain, want_plain = guarded(m, f, dtype=torch.float16), guarded(m, f)
    kernels.row_geglu(x, w, plain, config, scale)
    kernels.row_geglu_ref(up(x), up(w), want_plain, scale=scale)
    assert_equal_up_to_rounding(plain, want_plain, 2 * SHORT_SUMS)
    assert_guard(plain)


@pytest.mark.parametrize("shape", shapes(PRODUCTS, [(50, 4096, 1024)]))
def test_row_geglu(shape):
    check_geglu(shape, TINY)
    if DEVICE == "cuda":
        check_geglu(shape, None)


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("config", RINGS, ids=str)
@pytest.mark.parametrize("shape", [(10, 4096, 1024), (50, 4096, 1024), (100, 512, 256)])
def test_row_geglu_of_hopper(shape, config):
    check_geglu(shape, config)


def test_what_geglu_of_hopper_takes():
    x, w = eighths(4, 256), eighths(192, 256)
    found = row_products_tma.obstacles(x, w, RINGS[1], half=96)
    assert not [words for words in found if "GPU" not in words]
    assert any("no multiple of" in words for words in row_products_tma.obstacles(x, w, RINGS[1], half=90))
    assert any("as the weight is" in words for words in row_products_tma.obstacles(x, up(w), RINGS[1]))


def check_qkv(shape, config):
    batch, rows, heads, kv_heads, head_dim, width = shape
    slots, dtype = rows + 11, torch.bfloat16 if config is not None and config.descriptors else torch.float32
    first = torch.arange(batch, dtype=torch.int32, device=DEVICE) * 4 + 3
    angles = seeded(slots, head_dim // 2)
    x, (w, scale) = eighths(batch * rows, width), scaled((heads + 2 * kv_heads) * head_dim, width)

    def run(op, dtype, x, w, *config):
        cache = [guarded(batch, kv_heads, slots, head_dim, dtype=dtype) for _ in range(2)]
        q = guarded(batch * rows, heads * head_dim, dtype=dtype)
        op(x, w, angles.cos(), angles.sin(), first, q, *cache, rows, *config, scale=scale)
        return q, *cache

    for got, want in zip(
        run(kernels.row_qkv, dtype, x, w, config), run(kernels.row_qkv_ref, torch.float32, up(x), up(w)), strict=True
    ):
        assert torch.equal(got.isnan(), want.isnan()), "exactly the rows' slots are written"
        factor = 1.0 if DEVICE == "cpu" else 2 * SHORT_SUMS if dtype == torch.bfloat16 else 100 * SHORT_SUMS
        assert_equal_up_to_rounding(got.nan_to_num(), want.nan_to_num(), factor)
        assert_guard(got)


# Samples, rows each, heads, key heads, head_dim, width.
@pytest.mark.parametrize("shape", shapes([(1, 5, 2, 1, 32, 48), (2, 9, 4, 2, 24, 32)], [(1, 50, 8, 1, 256, 1024)]))
def test_row_qkv(shape):
    check_qkv(shape, TINY)
    if DEVICE == "cuda":
        check_qkv(shape, None)


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("config", RINGS, ids=str)
@pytest.mark.parametrize("shape", [(1, 50, 8, 1, 256, 1024), (2, 51, 8, 1, 256, 1024), (3, 10, 8, 1, 256, 1024)])
def test_row_qkv_of_hopper(shape, config):
    check_qkv(shape, config)


# Splits, rows, width.
@pytest.mark.parametrize("shape", shapes([(1, 3, 40), (3, 2, 100)], [(8, 50, 1024)]))
def test_row_sum_norm(shape):
    _, rows, width = shape
    vectors = [seeded(width).roll(i) * 0.3 for i in range(3)]
    x = seeded(rows, width)
    results = []
    for op in (kernels.row_sum_norm, kernels.row_sum_norm_ref):
        stream, out = x.clone(), guarded(rows, width, dtype=E4M3)
        op(seeded(*shape), stream, *vectors, out, inverse=INVERSE)
        results.append((stream, out))
    (stream, out), (want_stream, want) = results
    assert_equal_up_to_rounding(stream, want_stream)
    assert_one_step(out, want)


@pytest.mark.parametrize("shape", shapes([(2, 5, 4, 2, 24, 45)], [(1, 50, 8, 1, 256, 1018)]))
def test_row_attention(shape):
    batch, rows, heads, kv_heads, head_dim, slots = shape
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q = seeded(batch * rows, heads * head_dim, dtype=dtype, scale=head_dim**-0.5)
    keys, values = (seeded(batch, kv_heads, slots, head_dim, dtype=dtype).roll(i, 2) for i in range(2))
    lengths = torch.full((batch,), slots - rows, dtype=torch.int32, device=DEVICE)
    partial = guarded(8, len(q) * heads, head_dim), guarded(8, len(q) * heads)
    out, want = guarded(*q.shape, dtype=E4M3), guarded(*q.shape, dtype=E4M3)
    kernels.row_attention(q, keys, values, lengths, out, rows, *partial, extra=rows, inverse=INVERSE)
    kernels.row_attention_ref(up(q), up(keys), up(values), lengths, want, rows, *partial, extra=rows, inverse=INVERSE)
    assert_one_step(out, want, SAME, SLACK)


def test_wrong_factors_are_refused():
    x, w = torch.zeros(4, 16), torch.zeros(8, 16)
    with pytest.raises(ValueError, match="inverse 2 belongs"):
        kernels.row_geglu(x, w, torch.zeros(4, 4), inverse=2.0)
    with pytest.raises(ValueError, match=r"scale has shape \(4,\), expected a contiguous \(8,\)"):
        kernels.row_parts(x, w, torch.zeros(1, 4, 8), scale=torch.ones(4))
    with pytest.raises(ValueError, match="inverse 2 belongs"):
        kernels.row_sum_norm(torch.zeros(1, 4, 16), x, None, None, None, x.clone(), inverse=2.0)
