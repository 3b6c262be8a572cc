"""Attention against its twin, and the twin against torch's own."""

import math

import pytest
import torch
from kernel_tools import DEVICE, assert_equal_up_to_rounding, assert_guard, cases, guarded, seeded, up

from turbopi import kernels
from turbopi.kernels import AttentionConfig

# Samples, queries each, heads, key heads, head_dim, slots.
SHAPES = cases(
    [(1, 1, 1, 1, 32, 3), (2, 5, 4, 2, 24, 45), (1, 5, 8, 1, 64, 40), (2, 3, 2, 2, 72, 21)],
    [(1, 552, 8, 1, 256, 600), (1, 10, 8, 1, 256, 562), (2, 51, 8, 1, 256, 1019), (2, 256, 16, 16, 72, 256)],
)
TINY = AttentionConfig(16, 16, stages=1)


def operands(dtype, shape):
    batch, rows, heads, kv_heads, head_dim, slots = shape
    q = seeded(batch * rows, heads * head_dim, dtype=dtype)
    keys = seeded(batch, kv_heads, slots, head_dim, dtype=dtype)
    values = seeded(batch, kv_heads, slots, head_dim, dtype=dtype).roll(1, 2)
    # Ragged: the first sample is full, the next ones shorter; what stands in unused slots is NaN.
    extra = min(rows, slots - 1)
    lengths = torch.tensor([max(slots - extra - 7 * b, 1) for b in range(batch)], dtype=torch.int32, device=DEVICE)
    for b, length in enumerate(lengths.tolist()):
        keys[b, :, length + extra :] = float("nan")
        values[b, :, length + extra :] = float("nan")
    return q, keys, values, lengths, guarded(*q.shape, dtype=dtype), rows, extra


def twin(q, keys, values, lengths, out, rows, **more):
    want = guarded(*out.shape)
    kernels.attention_ref(up(q), up(keys), up(values), lengths, want, rows, **more)
    return want


@pytest.mark.parametrize(("config", "state_token"), [(None, False), (None, True), (TINY, True)], ids=str)
@pytest.mark.parametrize(("dtype", "shape"), SHAPES)
def test_attention(dtype, shape, config, state_token):
    *tensors, rows, extra = operands(dtype, shape)
    more = {"extra": extra, "state_token": state_token, "scale": shape[4] ** -0.5}
    kernels.attention(*tensors, rows, **more, config=config)
    assert_equal_up_to_rounding(tensors[-1], twin(*tensors, rows, **more))
    assert_guard(tensors[-1])


@pytest.mark.parametrize(("splits", "state_token"), [(1, True), (3, True), (5, False)])
@pytest.mark.parametrize(("dtype", "shape"), SHAPES)
def test_attention_split(dtype, shape, splits, state_token):
    *tensors, rows, extra = operands(dtype, shape)
    lines = shape[0] * rows * shape[2]
    partial, partial_lse = guarded(splits, lines, shape[4]), guarded(splits, lines)
    more = {"extra": extra, "state_token": state_token, "scale": shape[4] ** -0.5, "config": TINY}
    out = tensors[-1]
    kernels.attention_split(*tensors, rows, partial, partial_lse, **more)
    assert_equal_up_to_rounding(out, twin(*tensors, rows, **more))
    for t in (out, partial, partial_lse):
        assert_guard(t)
    first = out.clone()
    kernels.attention_split(*tensors, rows, partial, partial_lse, **more)
    assert torch.equal(out, first)


@pytest.mark.parametrize(("dtype", "shape"), cases([(2, 17, 2, 2, 72)], [(2, 256, 16, 16, 72), (3, 256, 16, 16, 72)]))
def test_attention_reads_a_merged_product_in_place(dtype, shape):
    images, rows, heads, _, head_dim = shape
    width = heads * head_dim
    qkv = seeded(images * rows, 3 * width, dtype=dtype)
    keys, values = (
        part.unflatten(0, (images, rows)).unflatten(-1, (heads, head_dim)).transpose(1, 2)
        for part in (qkv[:, width : 2 * width], qkv[:, 2 * width :])
    )
    out = guarded(images * rows, width, dtype=dtype)
    arguments = qkv[:, :width], keys, values, None, out, rows
    kernels.attention(*arguments, scale=head_dim**-0.5)
    assert_equal_up_to_rounding(out, twin(*arguments, scale=head_dim**-0.5))
    assert_guard(out)


def test_the_twin_is_softmax_attention():
    batch, rows, heads, kv_heads, head_dim, slots = 2, 5, 4, 2, 16, 9
    q, keys = torch.randn(batch * rows, heads * head_dim), torch.randn(batch, kv_heads, slots, head_dim)
    values, out = torch.randn_like(keys), torch.empty(batch * rows, heads * head_dim)
    lengths = torch.tensor([4, 2], dtype=torch.int32)
    visible = torch.arange(slots) < (lengths[:, None, None, None] + 3).expand(-1, 1, rows, 1)
    visible[:, :, 0] = torch.arange(slots) < lengths[:, None, None] + 1
    want = torch.nn.functional.scaled_dot_product_attention(
        q.view(batch, rows, heads, head_dim).transpose(1, 2), keys, values, visible, enable_gqa=True
    )
    kernels.attention_ref(q, keys, values, lengths, out, rows, 3, True, 1 / math.sqrt(head_dim))
    torch.testing.assert_close(out, want.transpose(1, 2).reshape(out.shape))


def test_a_query_without_keys_gives_zeros():
    q, cache, out = torch.randn(2, 16), torch.randn(2, 1, 4, 16), torch.full((2, 16), float("nan"))
    q, cache, out = q.to(DEVICE), cache.to(DEVICE), out.to(DEVICE)
    lengths = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    partial, partial_lse = guarded(2, 2, 16), guarded(2, 2)
    for op in (
        lambda: kernels.attention(q, cache, cache, lengths, out, 1, config=TINY),
        lambda: kernels.attention_ref(q, cache, cache, lengths, out, 1),
        lambda: kernels.attention_split(q, cache, cache, lengths, out, 1, partial, partial_lse, config=TINY),
    ):
        out.fill_(float("nan"))
        op()
        assert not out[0].any()
        assert out[1].all()


def test_large_logits_do_not_overflow():
    q, keys = seeded(2, 32, scale=100), seeded(1, 1, 40, 32, scale=100)
    out, want = guarded(2, 32), guarded(2, 32)
    kernels.attention(q, keys, keys, None, out, 2, config=TINY)
    kernels.attention_ref(q, keys, keys, None, want, 2)
    assert_equal_up_to_rounding(out, want)


def test_wrong_attention_is_refused():
    q, cache, lengths = torch.zeros(4, 32), torch.zeros(2, 1, 5, 16), torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected 2 samples as in keys"):
        kernels.attention(q, cache, cache, lengths, q, 4)
    with pytest.raises(ValueError, match=r"lengths is torch\.int64"):
        kernels.attention(q, cache, cache, lengths.long(), q, 2)
    with pytest.raises(ValueError, match="expected a multiple of 48"):
        kernels.attention(q, torch.zeros(2, 3, 5, 16), torch.zeros(2, 3, 5, 16), lengths, q, 2)
    with pytest.raises(ValueError, match="head_dim at most 256"):
        kernels.attention(
            torch.zeros(2, 512), torch.zeros(1, 1, 5, 512), torch.zeros(1, 1, 5, 512), None, torch.zeros(2, 512), 2
        )
    partial = torch.zeros(3, 8, 16)
    with pytest.raises(ValueError, match=r"partial_lse is torch\.float32 \(3, 9\)"):
        kernels.attention_split(q, cache, cache, lengths, q.clone(), 2, partial, torch.zeros(3, 9))
    with pytest.raises(ValueError, match=r"keys is torch\.float16"):
        kernels.attention(q, cache.half(), cache.half(), lengths, q, 2)
