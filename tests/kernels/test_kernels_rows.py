"""The row-wise kernels against their twins."""

import pytest
import torch
from kernel_tools import DEVICE, assert_equal_up_to_rounding, assert_guard, cases, guarded, seeded, up

from turbopi import kernels

ROWS = cases([(1, 8), (5, 37), (3, 64), (2, 1100)], [(552, 2048), (968, 2048), (512, 1152), (50, 1024), (51, 1000)])


def modulation(width, wanted=True):
    return [seeded(width) * (i + 1) if wanted else None for i in range(2)]


@pytest.mark.parametrize(("dtype", "shape"), ROWS)
def test_layer_norm(dtype, shape):
    x, out, want = seeded(*shape, dtype=dtype) + 3, guarded(*shape, dtype=dtype), guarded(*shape)
    kernels.layer_norm(x, out)
    kernels.layer_norm_ref(up(x), want)
    torch.testing.assert_close(want, torch.nn.functional.layer_norm(up(x), shape[1:], eps=1e-6), atol=2e-5, rtol=1e-5)
    assert_equal_up_to_rounding(out, want, factor=4)
    assert_guard(out)


# Rows, width, rows of the offset.
OFFSETS = cases([(5, 37, 1), (6, 64, 3), (2, 1100, 2)], [(512, 1152, 1), (512, 1152, 256), (768, 1152, 256)])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("dtype", "shape"), OFFSETS)
def test_layer_norm_of_what_lacks_an_offset(dtype, shape, kept):
    rows, width, period = shape
    # As the patch embedding, x is float32 whatever the stream is.
    x, offset = seeded(rows, width, dtype=torch.float32 if kept else dtype), seeded(period, width, scale=2)
    out, stream = guarded(rows, width, dtype=dtype), guarded(rows, width, dtype=dtype)
    before = x.clone()
    kernels.layer_norm(x, out, offset, stream if kept else None)
    whole, want = up(x) + offset.repeat(rows // period, 1), guarded(rows, width)
    kernels.layer_norm_ref(whole, want)
    assert_equal_up_to_rounding(out, want, factor=4)
    assert torch.equal(x, before)
    if kept:
        assert_equal_up_to_rounding(stream, whole)
    else:
        assert stream.isnan().all()
    twin = guarded(rows, width)
    kernels.layer_norm_ref(up(x), twin, offset, whole)
    torch.testing.assert_close(twin, want)
    assert_guard(out)
    assert_guard(stream)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("dtype", "shape"), ROWS)
def test_rms_norm(dtype, shape, modulated):
    x, out, want = seeded(*shape, dtype=dtype), guarded(*shape, dtype=dtype), guarded(*shape)
    scale, shift = modulation(shape[1], modulated)
    kernels.rms_norm(x, out, scale, shift)
    kernels.rms_norm_ref(up(x), want, scale, shift)
    assert_equal_up_to_rounding(out, want)
    assert_guard(out)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("dtype", "shape"), ROWS)
def test_gated_residual_norm(dtype, shape, gated, modulated):
    x, update, out = seeded(*shape, dtype=dtype), seeded(*shape, dtype=dtype, scale=2), guarded(*shape, dtype=dtype)
    gate = seeded(shape[1]) if gated else None
    scale, shift = modulation(shape[1], modulated)
    stream, normed = x.clone(), guarded(*shape)
    kernels.gated_residual_norm(x, update, gate, scale, shift, out)
    kernels.gated_residual_norm_ref(stream, update, gate, scale, shift, normed)
    assert_equal_up_to_rounding(x, stream.float())
    # From the kernel's own stream: one rounding of it apart, the norms may differ by more than one.
    kernels.rms_norm_ref(up(x), normed, scale, shift)
    assert_equal_up_to_rounding(out, normed)
    assert_guard(x)
    assert_guard(out)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("dtype", "shape"), ROWS)
def test_gated_residual(dtype, shape, gated):
    x, update = seeded(*shape, dtype=dtype), seeded(*shape, dtype=dtype, scale=2)
    gate = seeded(shape[1]) if gated else None
    want = up(x).clone()
    kernels.gated_residual(x, update, gate)
    kernels.gated_residual_ref(want, up(update), gate)
    assert_equal_up_to_rounding(x, want)
    assert_guard(x)


@pytest.mark.parametrize(
    ("dtype", "shape"), cases([(1, 8), (3, 37), (2, 2100)], [(552, 16384), (50, 4096), (512, 4304)])
)
def test_gelu_and_geglu(dtype, shape):
    rows, width = shape
    # Wide enough to reach both flat ends of the tanh.
    gate_up, out, want = seeded(rows, 2 * width, dtype=dtype, scale=6), guarded(*shape, dtype=dtype), guarded(*shape)
    kernels.geglu(gate_up, out)
    kernels.geglu_ref(up(gate_up), want)
    assert_equal_up_to_rounding(out, want)
    assert_guard(out)
    x = seeded(*shape, dtype=dtype, scale=6)
    kernels.gelu(x, out)
    kernels.gelu_ref(up(x), want)
    assert_equal_up_to_rounding(out, want)


def test_gelu_has_no_overflow():
    x = torch.tensor([[-1e30, -200.0, -0.0, 0.0, 200.0, 1e30]], device=DEVICE)
    out = torch.empty_like(x)
    kernels.gelu(x, out)
    assert torch.equal(out, torch.tensor([[0.0, 0.0, 0.0, 0.0, 200.0, 1e30]], device=DEVICE))


# Samples, rows each, query heads, key heads, head_dim.
ROPE = cases(
    [(1, 1, 1, 1, 8), (2, 5, 4, 2, 24), (1, 37, 2, 1, 16)],
    [(1, 552, 8, 1, 256), (3, 100, 8, 1, 256), (2, 50, 8, 1, 256)],
)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("dtype", "shape"), ROPE)
def test_rotate_and_store(dtype, shape, scaled):
    batch, rows, heads, kv_heads, head_dim = shape
    slots = rows + 11
    first = torch.arange(batch, dtype=torch.int32, device=DEVICE) * 4 + 3
    angles = seeded(slots, head_dim // 2)
    cos, sin = seeded(slots, head_dim // 2).copy_(angles.cos()), seeded(slots, head_dim // 2).copy_(angles.sin())
    qkv = seeded(batch * rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    scale = seeded(qkv.shape[1]).exp() if scaled else None

    def run(op, dtype, qkv):
        outputs = (
            guarded(batch * rows, heads * head_dim, dtype=dtype),
            guarded(batch, kv_heads, slots, head_dim, dtype=dtype),
            guarded(batch, kv_heads, slots, head_dim, dtype=dtype),
        )
        op(qkv, cos, sin, first, *outputs, rows, scale)
        return outputs

    got = run(kernels.rotate_and_store, dtype, qkv)
    for kernel, twin in zip(got, run(kernels.rotate_and_store_ref, torch.float32, up(qkv)), strict=True):
        assert torch.equal(kernel.isnan(), twin.isnan()), "exactly the rows' slots are written"
        assert_equal_up_to_rounding(kernel.nan_to_num(), twin.nan_to_num())
        assert_guard(kernel)


def test_rotation_is_that_of_the_reference():
    from turbopi.model.gemma import RotaryEmbedding, rotate

    rows, head_dim = 5, 16
    cos, sin = RotaryEmbedding(head_dim, False)(torch.arange(3, 3 + rows)[None], torch.float32)
    q = torch.randn(rows, 3 * head_dim)
    table_cos, table_sin = RotaryEmbedding(head_dim, False)(torch.arange(20)[None], torch.float32)
    tables = [t[0, 0, :, : head_dim // 2].contiguous() for t in (table_cos, table_sin)]
    keys, values, out = torch.zeros(1, 1, 20, head_dim), torch.zeros(1, 1, 20, head_dim), torch.zeros(rows, head_dim)
    kernels.rotate_and_store_ref(q, *tables, torch.tensor([3], dtype=torch.int32), out, keys, values, rows)
    heads = q.view(1, rows, 3, head_dim).transpose(1, 2)
    torch.testing.assert_close(out, rotate(heads[:, :1], cos, sin)[0, 0])
    torch.testing.assert_close(keys[0, 0, 3:8], rotate(heads[:, 1:2], cos, sin)[0, 0])
    assert torch.equal(values[0, 0, 3:8], heads[0, 2])


# Images, side in patches, patch, columns past 3·p².
PATCHES = cases([(1, 2, 3, 0), (2, 3, 5, 5)], [(2, 16, 14, 0), (3, 16, 14, 4)])


@pytest.mark.parametrize("layout", ["planar", "interleaved", "float"])
@pytest.mark.parametrize(("dtype", "shape"), PATCHES)
def test_patches(dtype, shape, layout):
    count, side, patch, more = shape
    size = side * patch
    images = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1)).byte().to(DEVICE)
    floats = images.float() / 255 * 2 - 1
    if layout == "interleaved":
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    elif layout == "float":
        images = floats
    out = guarded(count * side * side, 3 * patch * patch + more, dtype=dtype)
    kernels.patches(images, out)
    want = guarded(*out.shape)
    kernels.patches_ref(images, want)
    assert_equal_up_to_rounding(out, want)
    assert_guard(out)
    # On the CPU: a GPU's convolution rounds to TF32.
    weight = torch.randn(7, 3, patch, patch)
    convolved = torch.nn.functional.conv2d(floats.cpu(), weight, stride=patch).flatten(2).transpose(1, 2).flatten(0, 1)
    product = want[:, : 3 * patch * patch].cpu() @ weight.flatten(1).T
    torch.testing.assert_close(product, convolved, atol=1e-4, rtol=1e-4)
    assert not want[:, 3 * patch * patch :].any()


@pytest.mark.parametrize(("dtype", "shape"), PATCHES)
def test_grey_levels_stay_as_they_are(dtype, shape):
    count, side, patch, more = shape
    size, width = side * patch, 3 * patch * patch + more
    images = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1)).byte().to(DEVICE)
    out, want = (guarded(count * side * side, 3 * width, dtype=dtype) for _ in range(2))
    kernels.patches(images, out, 3)
    kernels.patches_ref(images, want, 3)
    assert torch.equal(out, want)
    assert_guard(out)
    scaled = torch.empty(len(out), width, device=DEVICE)
    kernels.patches_ref(images.float(), scaled)
    assert torch.equal(out.float(), scaled.repeat(1, 3))
    with pytest.raises(ValueError, match="expected uint8, which has grey levels"):
        kernels.patches(images.float(), out, 3)


# Samples, actions, tokens before them, action_dim, width.
ACTIONS = cases([(1, 1, 0, 32, 40), (2, 3, 1, 7, 33), (1, 5, 0, 32, 200)], [(1, 10, 0, 32, 1024), (4, 50, 1, 32, 1024)])


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(("dtype", "shape"), ACTIONS)
def test_action_in(dtype, shape, activation):
    samples, horizon, before, action_dim, width = shape
    x_t, weight, bias = seeded(samples * horizon, action_dim), seeded(width, action_dim), seeded(width)
    out = guarded(samples * (horizon + before), width, dtype=dtype)
    want = guarded(*out.shape)
    kernels.action_in(x_t, weight, bias, out, horizon, activation)
    kernels.action_in_ref(x_t, weight, bias, want, horizon, activation)
    assert torch.equal(out.isnan(), want.isnan()), "rows before the actions are left alone"
    assert want.isnan().sum() == samples * before * width
    assert_equal_up_to_rounding(out.nan_to_num(), want.nan_to_num())
    assert_guard(out)


@pytest.mark.parametrize(("dtype", "shape"), ACTIONS)
def test_action_out(dtype, shape):
    samples, horizon, before, action_dim, width = shape
    x_t, weight, bias = seeded(samples * horizon, action_dim), seeded(action_dim, width), seeded(action_dim)
    normed = seeded(samples * (horizon + before), width, dtype=dtype)
    want = x_t.clone()
    kernels.action_out(normed, weight, bias, x_t, horizon)
    kernels.action_out_ref(normed, weight, bias, want, horizon)
    assert_equal_up_to_rounding(x_t, want)
    assert_guard(x_t)


EMBED = cases([(1, 1, 8), (2, 5, 37)], [(1, 200, 2048), (3, 40, 2048)])


@pytest.mark.parametrize(("dtype", "shape"), EMBED)
def test_embed_tokens(dtype, shape):
    batch, count, width = shape
    rows, vocabulary = count + 6, 23
    tokens = torch.arange(batch * count, device=DEVICE).view(batch, count) % vocabulary
    tokens[0, -1], tokens[-1, 0] = vocabulary, -1
    # The last sample's tokens reach past its rows.
    first = torch.arange(2, 2 + 5 * batch, 5, dtype=torch.int32, device=DEVICE)
    table, out = seeded(vocabulary, width, dtype=dtype), guarded(batch * rows, width, dtype=dtype)
    want = guarded(*out.shape)
    kernels.embed_tokens(tokens, table, 45.2548, out, first, rows)
    kernels.embed_tokens_ref(tokens, up(table), 45.2548, want, first, rows)
    assert torch.equal(out.isnan(), want.isnan()), "unknown ids are NaN, other rows untouched"
    assert_equal_up_to_rounding(out.nan_to_num(), want.nan_to_num())
    assert_guard(out)


def test_wrong_buffers_are_refused():
    x, wide = torch.zeros(4, 8), torch.zeros(4, 9)
    first = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"out has shape \(4, 9\), expected \(4, 8\)"):
        kernels.layer_norm(x, wide)
    with pytest.raises(ValueError, match="offset has 3 rows, expected a divisor of the 4 rows"):
        kernels.layer_norm(x, x, torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"offset is torch\.float16"):
        kernels.layer_norm(x, x, torch.zeros(1, 8).half())
    with pytest.raises(ValueError, match=r"stream has shape \(4, 9\)"):
        kernels.layer_norm(x, x, stream=wide)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.rms_norm(wide[:, :8], x)
    with pytest.raises(ValueError, match="both or neither"):
        kernels.rms_norm(x, x, scale=torch.ones(8))
    with pytest.raises(ValueError, match=r"gate is torch\.float16"):
        kernels.gated_residual(x, x, torch.ones(8).half())
    with pytest.raises(ValueError, match=r"update is torch\.float16"):
        kernels.gated_residual(x, x.half())
    with pytest.raises(ValueError, match="uint8 or float32"):
        kernels.patches(torch.zeros(1, 3, 4, 4).double(), x)
    with pytest.raises(ValueError, match="4 rows for 1 images of 5x5"):
        kernels.patches(torch.zeros(1, 3, 5, 5), x)
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        kernels.action_in(torch.zeros(4, 2), torch.zeros(8, 2), torch.zeros(8), x, activation="relu")
    with pytest.raises(ValueError, match="3 actions in chunks of 2"):
        kernels.action_out(x, torch.zeros(2, 8), torch.zeros(2), torch.zeros(3, 2), horizon=2)
    with pytest.raises(ValueError, match="int64"):
        kernels.embed_tokens(torch.zeros(1, 2).int(), x, 1.0, x, first, 4)
    with pytest.raises(ValueError, match="multiple of rows_per_sample = 3"):
        kernels.embed_tokens(torch.zeros(1, 2).long(), x, 1.0, x, first, 3)
    cache, table = torch.zeros(1, 1, 3, 8), torch.zeros(4, 4)
    with pytest.raises(ValueError, match="do not fit keys"):
        kernels.rotate_and_store(torch.zeros(4, 24), table, table, first, x, cache, cache, 4)
