"""The kernels of the fused denoise loop against their twins; on a GPU also chained, each launched before its turn."""

import pytest
import torch
from kernel_tools import DEVICE, TOLERANCE, assert_equal_up_to_rounding, assert_guard, cases, guarded, seeded, up

from turbopi import kernels
from turbopi.kernels import (
    E4M3,
    AttentionConfig,
    GemmConfig,
    row_attention_cluster,
    row_attention_wgmma,
    row_products_tma,
)
from turbopi.kernels.attention import check_attention

TINY = GemmConfig(16, 16, 16, group_m=1, stages=2)
HOPPER = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9, reason="these kernels are Hopper's"
)
RINGS = [
    GemmConfig(64, 64, 128, warps=4, stages=4, descriptors=True),
    GemmConfig(64, 32, 64, warps=4, stages=2, descriptors=True),
]
# Rows, columns, depth.
PRODUCTS = cases([(1, 24, 40), (17, 33, 48), (37, 40, 100)], [(10, 1024, 4096), (50, 1024, 2048), (100, 1024, 4096)])


@pytest.mark.parametrize("config", [None, TINY], ids=["default", "tiny"])
@pytest.mark.parametrize("splits", [1, 3, 5])
@pytest.mark.parametrize(("dtype", "shape"), PRODUCTS)
def test_row_parts(dtype, shape, splits, config):
    m, n, k = shape
    x, w = seeded(m, k, dtype=dtype), seeded(n, k, dtype=dtype, scale=k**-0.5)
    # More splits than blocks of K: some parts are empty, and must be zeros.
    parts, want = guarded(splits, m, n), guarded(splits, m, n)
    kernels.row_parts(x, w, parts, config)
    kernels.row_parts_ref(up(x), up(w), want)
    assert_equal_up_to_rounding(parts.sum(0), want.sum(0))
    assert_guard(parts)


@pytest.mark.parametrize("config", [None, TINY], ids=["default", "tiny"])
@pytest.mark.parametrize(("dtype", "shape"), cases([(1, 24, 40), (17, 33, 48), (37, 40, 100)], [(50, 4096, 1024)]))
def test_row_geglu(dtype, shape, config):
    m, f, k = shape
    x, w = seeded(m, k, dtype=dtype), seeded(2 * f, k, dtype=dtype, scale=k**-0.5)
    out, want = guarded(m, f, dtype=dtype), guarded(m, f)
    kernels.row_geglu(x, w, out, config)
    kernels.row_geglu_ref(up(x), up(w), want)
    assert_equal_up_to_rounding(out, want)
    assert_guard(out)


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("config", RINGS, ids=str)
@pytest.mark.parametrize("shape", [(10, 1024, 4096, 8), (50, 1024, 2048, 8), (64, 128, 512, 1), (100, 1024, 4096, 8)])
def test_row_parts_of_hopper(shape, config):
    m, n, k, splits = shape
    x, w = seeded(m, k, dtype=torch.bfloat16), seeded(n, k, dtype=torch.bfloat16, scale=k**-0.5)
    parts, want = guarded(splits, m, n), guarded(splits, m, n)
    kernels.row_parts(x, w, parts, config)
    kernels.row_parts_ref(up(x), up(w), want)
    assert_equal_up_to_rounding(parts, want)
    assert_guard(parts)
    first = parts.clone()
    kernels.row_parts(x, w, parts, config)
    assert torch.equal(parts, first)


# Samples, rows each, heads, key heads, head_dim, width.
QKV = cases([(1, 5, 2, 1, 32, 40), (2, 9, 4, 2, 24, 33)], [(1, 50, 8, 1, 256, 1024), (2, 51, 8, 1, 256, 1024)])


@pytest.mark.parametrize("config", [None, TINY], ids=["default", "tiny"])
@pytest.mark.parametrize(("dtype", "shape"), QKV)
def test_row_qkv(dtype, shape, config):
    batch, rows, heads, kv_heads, head_dim, width = shape
    slots = rows + 11
    first = torch.arange(batch, dtype=torch.int32, device=DEVICE) * 4 + 3
    angles = seeded(slots, head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    x = seeded(batch * rows, width, dtype=dtype)
    w = seeded((heads + 2 * kv_heads) * head_dim, width, dtype=dtype, scale=width**-0.5)

    def run(op, dtype, x, w, **more):
        outputs = (
            guarded(batch * rows, heads * head_dim, dtype=dtype),
            guarded(batch, kv_heads, slots, head_dim, dtype=dtype),
            guarded(batch, kv_heads, slots, head_dim, dtype=dtype),
        )
        op(x, w, cos, sin, first, *outputs, rows, **more)
        return outputs

    got = run(kernels.row_qkv, dtype, x, w, config=config)
    for kernel, twin in zip(got, run(kernels.row_qkv_ref, torch.float32, up(x), up(w)), strict=True):
        assert torch.equal(kernel.isnan(), twin.isnan()), "exactly the rows' slots are written"
        assert_equal_up_to_rounding(kernel.nan_to_num(), twin.nan_to_num())
        assert_guard(kernel)


# Splits, rows, width.
SUMS = cases([(1, 3, 40), (3, 2, 100)], [(8, 50, 1024), (4, 100, 1024)])


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("dtype", "shape"), SUMS)
def test_row_sum_norm(dtype, shape, modulated):
    _, rows, width = shape
    parts, x, out = seeded(*shape), seeded(rows, width, dtype=dtype), guarded(rows, width, dtype=dtype)
    vectors = [seeded(width).roll(i) * 0.3 for i in range(3)] if modulated else [None] * 3
    want_x, want = up(x).clone(), guarded(rows, width)
    kernels.row_sum_norm(parts, x, *vectors, out)
    kernels.row_sum_norm_ref(parts, want_x, *vectors, want)
    # The norm reads the rounded stream.
    assert_equal_up_to_rounding(x, want_x)
    assert_equal_up_to_rounding(out, want, factor=2.0)
    for t in (x, out):
        assert_guard(t)


# Samples, queries each, heads, key heads, head_dim, slots.
ATTENTION = cases(
    [(1, 1, 1, 1, 32, 3), (2, 5, 4, 2, 24, 45), (1, 5, 8, 1, 64, 40)],
    [(1, 50, 8, 1, 256, 1018), (2, 51, 8, 1, 256, 1019), (1, 10, 8, 1, 256, 562)],
)


@pytest.mark.parametrize(("splits", "state_token", "config"), [(1, True, None), (3, True, None), (5, False, "tiny")])
@pytest.mark.parametrize(("dtype", "shape"), ATTENTION)
def test_row_attention(dtype, shape, splits, state_token, config):
    batch, rows, heads, kv_heads, head_dim, slots = shape
    q = seeded(batch * rows, heads * head_dim, dtype=dtype, scale=head_dim**-0.5)
    keys = seeded(batch, kv_heads, slots, head_dim, dtype=dtype)
    values = seeded(batch, kv_heads, slots, head_dim, dtype=dtype).roll(1, 2)
    extra = min(rows, slots - 1)
    lengths = torch.tensor([max(slots - extra - 7 * b, 1) for b in range(batch)], dtype=torch.int32, device=DEVICE)
    for b, length in enumerate(lengths.tolist()):
        keys[b, :, length + extra :] = float("nan")
        values[b, :, length + extra :] = float("nan")
    partial = guarded(splits, len(q) * heads, head_dim), guarded(splits, len(q) * heads)
    out, want = guarded(*q.shape, dtype=dtype), guarded(*q.shape)
    more = {"extra": extra, "state_token": state_token}
    config = AttentionConfig(16, 16, stages=1) if config else None
    kernels.row_attention(q, keys, values, lengths, out, rows, *partial, **more, config=config, ahead=keys)
    kernels.row_attention_ref(up(q), up(keys), up(values), lengths, want, rows, *partial, **more)
    assert_equal_up_to_rounding(out, want)
    for t in (out, *partial):
        assert_guard(t)


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("state_token", [False, True])
@pytest.mark.parametrize(
    ("shape", "splits"),
    [
        ((1, 50, 8, 1, 256, 1018), 8),
        ((2, 51, 8, 1, 256, 1019), 8),
        ((1, 11, 8, 1, 256, 562), 16),
        ((3, 5, 4, 2, 128, 500), 4),
        ((1, 10, 8, 1, 64, 90), 1),
    ],
)
def test_row_attention_of_hopper(shape, splits, state_token):
    keys = guarded(shape[0], shape[3], shape[5], shape[4], dtype=torch.bfloat16)
    assert row_attention_wgmma.runs(guarded(1, 1, dtype=torch.bfloat16), keys, splits)
    test_row_attention(torch.bfloat16, shape, splits, state_token, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
@pytest.mark.parametrize(
    ("batch", "rows", "slots", "state_token"),
    [(1, 50, 1018, False), (2, 51, 1019, True), (3, 10, 300, False), (1, 17, 40, True), (1, 4, 6, False)],
)
def test_row_attention_of_a_cluster(batch, rows, slots, state_token, dtype):
    q = seeded(batch * rows, 2048, dtype=torch.bfloat16, scale=1 / 8)
    keys, values = (seeded(batch, 1, slots, 256, dtype=torch.bfloat16).roll(i, 2).clone() for i in range(2))
    lengths = torch.tensor([max(slots - rows - 7 * b, 1) for b in range(batch)], dtype=torch.int32, device=DEVICE)
    for b, length in enumerate(lengths.tolist()):
        keys[b, :, length + rows :] = values[b, :, length + rows :] = float("nan")
    out, want, inverse = guarded(*q.shape, dtype=dtype), guarded(*q.shape), 100.0 if dtype == E4M3 else 1.0
    if found := row_attention_cluster.obstacles(q, keys, values, out):
        pytest.skip("; ".join(found))
    shape = check_attention(q, keys, values, lengths, out, rows)
    call = (q, keys, values, lengths, out, shape, rows, state_token, keys, inverse)
    row_attention_cluster.launch(*call)
    first = out.clone()
    row_attention_cluster.launch(*call)
    assert torch.equal(out.view(torch.uint8), first.view(torch.uint8))
    assert_guard(out)
    partial = guarded(1, len(q) * 8, 256), guarded(1, len(q) * 8)
    more = {"extra": rows, "state_token": state_token}
    kernels.row_attention_ref(up(q), up(keys), up(values), lengths, want, rows, *partial, **more)
    if dtype == E4M3:
        # Half a step of 1/8, beside what bfloat16 is allowed.
        error = (out.float() / inverse - want).abs()
        assert (error <= 0.07 * want.abs() + TOLERANCE[torch.bfloat16] * want.abs().max()).all()
        return
    assert_equal_up_to_rounding(out, want)


def test_what_a_cluster_does_not_attend_to_is_told():
    q, keys = seeded(4, 64), seeded(1, 2, 1100, 32)
    found = row_attention_cluster.obstacles(q[:, ::2], keys, keys, q)
    for words in ("weights in torch.float32", "2 key heads of 32", "1100 slots", "gaps", "a result in torch.float32"):
        assert any(words in one for one in found), words


def test_what_hopper_has_no_kernel_for_is_told():
    x, w = seeded(4, 64), seeded(96, 64)
    found = row_products_tma.obstacles(x, w, RINGS[0])
    assert any("x is torch.float32, expected torch.bfloat16 or torch.float8_e4m3fn" in words for words in found)
    assert any("no multiple of" in words for words in found)
    with pytest.raises(ValueError, match="no product through descriptors"):
        kernels.row_parts(x, w, guarded(1, 4, 96), RINGS[0])
    one = GemmConfig(64, 32, 16, stages=1, descriptors=True)
    found = row_products_tma.obstacles(x, w, one)
    assert any("a ring of one chunk" in words for words in found)
    deep = row_products_tma.obstacles(x, seeded(64, 1 << 14), RINGS[0])
    assert any("bytes of shared memory" in words for words in deep)


def test_wrong_shapes_are_refused():
    x, parts = torch.zeros(4, 16), torch.zeros(2, 4, 16)
    with pytest.raises(ValueError, match=r"parts is torch\.float32 \(2, 4, 16\), expected .* \(splits, 4, 8\)"):
        kernels.row_parts(x, torch.zeros(8, 16), parts)
    with pytest.raises(ValueError, match="both or neither"):
        kernels.row_sum_norm(parts, x, None, torch.zeros(16), None, x)
    with pytest.raises(ValueError, match=r"parts is torch\.float16"):
        kernels.row_sum_norm(parts.half(), x, None, None, None, x)
    with pytest.raises(ValueError, match=r"w_gate_up has shape \(8, 16\), expected \(32, 16\)"):
        kernels.row_geglu(x, torch.zeros(8, 16), x)
    cache, table, first = torch.zeros(1, 1, 9, 8), torch.zeros(9, 4), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="are 24 wide, expected 32"):
        kernels.row_qkv(x, torch.zeros(24, 16), table, table, first, x, cache, cache, 4)
