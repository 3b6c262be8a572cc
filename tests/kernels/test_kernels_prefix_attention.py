"""The prefix's attention on warpgroup instructions: when it is chosen on any machine, the kernel itself on Hopper."""

import pytest
import torch
from kernel_tools import DEVICE, assert_equal_up_to_rounding, assert_guard, guarded, seeded
from torch import Tensor

from turbopi import kernels
from turbopi.engine.turbo import ops
from turbopi.kernels.tuning import PrefixAttentionConfig


def case(rows: int, lengths: list[int], slots: int, heads: int = 8, head_dim: int = 256) -> tuple[Tensor, ...]:
    """q, keys, values, lengths; slots behind the lengths hold NaN."""
    batch = len(lengths)
    q = seeded(batch * rows, heads * head_dim, dtype=torch.bfloat16, scale=1 / 8)
    keys, values = (seeded(batch, 1, slots + i, head_dim, dtype=torch.bfloat16)[:, :, :slots] for i in range(2))
    keys, values = keys.contiguous(), values.contiguous()
    for sample, length in enumerate(lengths):
        keys[sample, :, length:] = values[sample, :, length:] = float("nan")
    return q, keys, values, torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def test_what_is_in_the_way_is_said() -> None:
    q, keys, values, lengths = case(2, [3], 4, head_dim=32)
    found = kernels.prefix_attention_obstacles(q.float()[:, ::2], keys, values, None, q.float())
    for words in (
        "torch.float32",
        "key heads of 32, not one of 256",
        "gaps",
        "a result in torch.float32",
        "no lengths",
    ):
        assert any(words in one for one in found), words
    with pytest.raises(ValueError, match=r"the prefix attention cannot run: .*1 key heads of 32"):
        kernels.prefix_attention(q, keys, values, lengths, q.clone(), 2)
    with pytest.raises(ValueError, match="slots is 7, expected 4 to 6"):
        PrefixAttentionConfig(7)


@pytest.mark.parametrize(("named", "extra", "wanted"), [(True, 0, "prefix"), (True, 1, "plain"), (False, 0, "plain")])
def test_it_is_chosen_where_the_tuned_file_names_it(
    monkeypatch: pytest.MonkeyPatch, named: bool, extra: int, wanted: str
) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(ops.kernels, "prefix_attention", lambda *_, **__: chosen.append("prefix"))
    monkeypatch.setattr(ops.kernels, "attention", lambda *_, **__: chosen.append("plain"))
    monkeypatch.setattr(ops.kernels, "prefix_attention_obstacles", lambda *_: [])
    config = PrefixAttentionConfig() if named else None
    monkeypatch.setattr(ops.kernels, "prefix_attention_config", lambda *_: config)
    q, keys, values, lengths = case(2, [3], 4, head_dim=64)
    ops.cache_attention(q, keys, values, lengths, q, 2, extra)
    assert chosen == [wanted]


@pytest.mark.gpu
@pytest.mark.parametrize("slots_of_ring", [4, 6])
@pytest.mark.parametrize(
    ("rows", "lengths"), [(552, [552]), (968, [961]), (552, [552, 530, 17]), (13, [13]), (16, [1])]
)
def test_the_kernel_equals_its_twin(rows: int, lengths: list[int], slots_of_ring: int) -> None:
    """Bit for bit the same again, no byte beside its output, NaN in unused slots unseen."""
    q, keys, values, valid = case(rows, lengths, max(lengths) + 10)
    first, second = (guarded(*q.shape, dtype=torch.bfloat16) for _ in range(2))
    if found := kernels.prefix_attention_obstacles(q, keys, values, valid, first):
        pytest.skip("; ".join(found))
    for out in (first, second):
        kernels.prefix_attention(q, keys, values, valid, out, rows, config=PrefixAttentionConfig(slots_of_ring))
        assert_guard(out)
    assert torch.equal(first, second)
    want = torch.empty(q.shape, device=DEVICE)
    kernels.attention_ref(q.float(), keys.float(), values.float(), valid, want, rows)
    assert_equal_up_to_rounding(first, want)


@pytest.mark.gpu
def test_in_e4m3_it_is_rounded_once() -> None:
    q, keys, values, valid = case(64, [60], 64)
    out = torch.empty(q.shape, device=DEVICE, dtype=kernels.E4M3)
    if found := kernels.prefix_attention_obstacles(q, keys, values, valid, out):
        pytest.skip("; ".join(found))
    kernels.prefix_attention(q, keys, values, valid, out, 64, inverse=20.0)
    want = torch.empty(q.shape, device=DEVICE)
    kernels.attention_ref(q.float(), keys.float(), values.float(), valid, want, 64)
    assert (out.float() / 20 - want).norm() <= 0.04 * want.norm()
