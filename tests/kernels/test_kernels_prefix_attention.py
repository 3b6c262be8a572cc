"""The prefix's attention on warpgroup instructions: when it is chosen on any machine, the kernel itself on Hopper."""

from importlib import import_module

import pytest
import torch
from kernel_tools import DEVICE, assert_equal_up_to_rounding, assert_guard, guarded, seeded
from torch import Tensor

from turbopi import kernels
from turbopi.engine.turbo import ops
from turbopi.kernels._wgmma import SHARED_BYTES
from turbopi.kernels.tuning import PrefixAttentionConfig

attention = import_module("turbopi.kernels.prefix_attention")
Tiling = attention.Tiling


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
    with pytest.raises(ValueError, match=r"the prefix attention cannot run: .*1 key heads of 32.*a scale of -1"):
        kernels.prefix_attention(q, keys, values, lengths, q.clone(), 2, scale=-1.0)
    with pytest.raises(ValueError, match="columns is 256, expected 64 or 128"):
        PrefixAttentionConfig(256)


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


@pytest.mark.parametrize(
    ("rows", "batch", "slots", "wanted"),
    [
        (560, 1, 570, Tiling(3, 192, False)),
        (592, 1, 602, Tiling(3, 208, False)),
        (640, 1, 650, Tiling(2, 112, True)),
        (968, 1, 1018, Tiling(2, 128, True)),
        (968, 8, 1018, Tiling(1, 128, True)),
        (13, 1, 20, Tiling(3, 128, False)),
        (13, 1, 700, Tiling(2, 128, True)),
    ],
)
def test_a_tiling_by_rows_and_slots(rows: int, batch: int, slots: int, wanted: object) -> None:
    tiling = Tiling.fit(8 * rows, batch, slots, 132)
    assert tiling == wanted
    assert tiling.many or tiling.parts * tiling.keys >= slots
    assert tiling.slots >= 6
    assert tiling.slots % 2 == 0
    assert tiling.shared_bytes <= SHARED_BYTES
    assert attention.definitions(tiling, 128, False)["SLOTS"] == tiling.slots


def run(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, tiling: object, columns: int) -> None:
    if found := kernels.prefix_attention_obstacles(q, keys, values, lengths, out):
        pytest.skip("; ".join(found))
    config, rows = PrefixAttentionConfig(columns), len(q) // len(lengths)
    kernels.prefix_attention(q, keys, values, lengths, out, rows, config=config, tiling=tiling)


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", [None, Tiling(1, 128, True), Tiling(2, 96, True), Tiling(3, 208, False)])
@pytest.mark.parametrize(
    ("rows", "lengths"), [(552, [552]), (968, [961]), (552, [552, 530, 17]), (13, [13]), (16, [1]), (64, [0, 3, 64])]
)
@pytest.mark.parametrize("columns", [64, 128])
def test_the_kernel_equals_its_twin(rows: int, lengths: list[int], tiling: object, columns: int) -> None:
    """Bit for bit the same again, no byte beside its output, unused slots unseen, whether NaN or large."""
    slots = max(lengths) + 10
    if isinstance(tiling, Tiling) and not tiling.many and slots > tiling.parts * tiling.keys:
        pytest.skip("more keys than such a cluster takes")
    q, keys, values, valid = case(rows, lengths, slots)
    first, second = (guarded(*q.shape, dtype=torch.bfloat16) for _ in range(2))
    run(first, q, keys, values, valid, tiling, columns)
    for sample, length in enumerate(lengths):
        keys[sample, :, length:], values[sample, :, length:] = 300.0, -1e30
    run(second, q, keys, values, valid, tiling, columns)
    for out in (first, second):
        assert_guard(out)
    assert torch.equal(first, second)
    want = torch.empty(q.shape, device=DEVICE)
    kernels.attention_ref(q.float(), keys.float(), values.float(), valid, want, rows)
    assert_equal_up_to_rounding(first, want)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "slots"), [(64, 64), (968, 1018)])
def test_in_e4m3_it_is_rounded_once(rows: int, slots: int) -> None:
    q, keys, values, valid = case(rows, [rows - 4], slots)
    out = torch.empty(q.shape, device=DEVICE, dtype=kernels.E4M3)
    if found := kernels.prefix_attention_obstacles(q, keys, values, valid, out):
        pytest.skip("; ".join(found))
    kernels.prefix_attention(q, keys, values, valid, out, rows, inverse=20.0)
    want = torch.empty(q.shape, device=DEVICE)
    kernels.attention_ref(q.float(), keys.float(), values.float(), valid, want, rows)
    assert (out.float() / 20 - want).norm() <= 0.04 * want.norm()
