"""Attention of an image's tokens on warpgroup instructions: when it is chosen anywhere, the kernel itself on Hopper."""

import json

import pytest
import torch
from kernel_tools import DEVICE, assert_equal_up_to_rounding, assert_guard, guarded, seeded
from torch import Tensor

from turbopi import kernels
from turbopi.engine.turbo import ops
from turbopi.kernels import tuning

BF16 = torch.bfloat16
HEADS, WIDTH, ROWS = 16, 1152, 256


def case(images: int, sharpness: float = 1.0) -> Tensor:
    """q, k and v; logits of a deviation of `sharpness`."""
    qkv = seeded(images * ROWS, 3 * WIDTH, dtype=BF16)
    qkv[:, :WIDTH] *= sharpness * 72**-0.5
    return qkv


def test_the_twin_is_the_attention_of_each_image():
    qkv, out, want = seeded(6, 3 * 32), torch.empty(6, 32, device=DEVICE), torch.empty(6, 32, device=DEVICE)
    kernels.vision_attention_ref(qkv, out, 4, 3)
    ops.sdpa_vision_attention(qkv, want, 4, 3)
    torch.testing.assert_close(out, ops.sdpa_vision_attention(qkv, want, 4, 3))
    with pytest.raises(ValueError, match="out is 32 wide, expected a multiple of 5 heads"):
        kernels.vision_attention_ref(qkv, out, 5, 3)
    with pytest.raises(ValueError, match="qkv has 6 rows, expected a multiple of rows_per_sample = 4"):
        kernels.vision_attention_ref(qkv, out, 4, 4)


def test_what_is_in_the_way_is_said():
    qkv, out = torch.empty(6, 3 * 36), torch.empty(6, 36)
    found = kernels.vision_attention_obstacles(qkv, out, 4, 3)
    for words in ("torch.float32", "heads of 9 and 3 rows an image, not 72 and 256", "a result in torch.float32"):
        assert any(words in one for one in found), words
    assert any("multiples of 16" in one for one in kernels.vision_attention_obstacles(qkv[:, 1:], out, 4, 3))
    with pytest.raises(ValueError, match=r"the vision attention cannot run: weights in torch\.float32"):
        kernels.vision_attention(qkv, out, 4, 3)


@pytest.mark.parametrize(("named", "wanted"), [(True, "vision"), (False, "plain")])
def test_it_is_chosen_where_the_tuned_file_names_it(monkeypatch, tmp_path, named, wanted):
    chosen = []
    monkeypatch.setattr(ops.kernels, "vision_attention", lambda *_, **__: chosen.append("vision"))
    monkeypatch.setattr(ops.kernels, "attention", lambda *_, **__: chosen.append("plain"))
    monkeypatch.setattr(ops.kernels, "vision_attention_obstacles", lambda *_: [])
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"configs": {"vision_attention": {"bfloat16 256x72": {}} if named else {}}}))
    monkeypatch.setattr(tuning, "gpu_file", lambda device: file)
    tuning.forget()

    class OnGpu:
        dtype, device = BF16, torch.device("cuda")

    is_named = kernels.vision_attention_named(OnGpu())
    monkeypatch.setattr(ops.kernels, "vision_attention_named", lambda like: is_named)
    ops.kernel_vision_attention(torch.empty(6, 96, dtype=BF16), torch.empty(6, 32, dtype=BF16), 4, 3)
    assert chosen == [wanted]
    tuning.forget()


@pytest.mark.gpu
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("images", [1, 2, 3, 7])
def test_the_kernel_equals_its_twin(images, sharpness):
    """Bit for bit the same again, launched early too, and no byte beside its output."""
    qkv = case(images, sharpness)
    outs = [guarded(images * ROWS, WIDTH, dtype=BF16) for _ in range(2)]
    if found := kernels.vision_attention_obstacles(qkv, outs[0], HEADS, ROWS):
        pytest.skip("; ".join(found))
    for out, early in zip(outs, (False, True), strict=True):
        kernels.vision_attention(qkv, out, HEADS, ROWS, early=early)
        assert_guard(out)
    assert torch.equal(*outs)
    want = torch.empty(images * ROWS, WIDTH, device=DEVICE)
    kernels.vision_attention_ref(qkv, want, HEADS, ROWS)
    assert_equal_up_to_rounding(outs[0], want)


@pytest.mark.gpu
def test_in_e4m3_it_is_rounded_once():
    qkv, out = case(2), torch.empty(2 * ROWS, WIDTH, device=DEVICE, dtype=kernels.E4M3)
    if found := kernels.vision_attention_obstacles(qkv, out, HEADS, ROWS):
        pytest.skip("; ".join(found))
    kernels.vision_attention(qkv, out, HEADS, ROWS, inverse=30.0)
    want = torch.empty(2 * ROWS, WIDTH, device=DEVICE)
    kernels.vision_attention_ref(qkv, want, HEADS, ROWS)
    assert (out.float() / 30 - want).norm() <= 0.04 * want.norm()
