"""The turbo engine with its real kernels, in Triton's interpreter (or on a GPU): a very small model in float32."""

import dataclasses

import pytest
import torch
from captured_support import model, observation
from fp8_support import quantisation_of
from turbo_support import relative

from turbopi.config import GemmaConfig, VisionConfig
from turbopi.engine import base
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo.ops import kernel_vision_attention, triton_ops, twin_ops

pytest.importorskip("triton")

VISION = VisionConfig(width=32, depth=1, mlp_dim=48, heads=2, patch_size=14, image_size=28)
VLM = GemmaConfig(width=48, depth=2, mlp_dim=64, heads=2, kv_heads=1, head_dim=32)
EXPERT = GemmaConfig(width=32, depth=2, mlp_dim=48, heads=2, kv_heads=1, head_dim=32)


REMARKS = pytest.mark.filterwarnings(
    "ignore:.* encountered in:RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning"
)


@REMARKS
@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-tiny"])
def test_kernels_put_together_are_the_reference(name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = model(name, device, vision=VISION, vlm=VLM, expert=EXPERT, horizon=3, max_tokens=16)
    ops = dataclasses.replace(triton_ops(), vision_attention=kernel_vision_attention)
    engine = TurboEngine(reference, "fp32", ops, None)
    x, noise = observation(reference.config, [5, 9], [(True, False, True), (True, False, False)])
    expected = reference.sample_actions(x.to(device), noise.to(device), 2)
    assert relative(engine.sample_actions(x, noise, 2), expected) <= 1e-5


@REMARKS
@pytest.mark.usefixtures("e4m3_in_the_interpreter")
@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-tiny"])
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="E4M3 needs capability 8.9"
)
def test_fp8_kernels_put_together_are_their_twins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With half of the expert in bf16's place, float32 here, so that producers write both."""
    monkeypatch.setitem(base.DTYPES, "fp8", torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = model(name, device, vision=VISION, vlm=VLM, expert=EXPERT, horizon=3, max_tokens=16)
    quantisation = quantisation_of(reference, exceptions={"expert.layers.1.*": "bf16"})
    x, noise = observation(reference.config, [5, 9], [(True, False, True), (True, False, False)])
    actions = [
        TurboEngine(reference, "fp8", ops, None, quantisation=quantisation).sample_actions(x, noise, 2)
        for ops in (triton_ops(), twin_ops())
    ]
    # A value or two rounded the other way, of some ten thousand; on a GPU sums of E4M3 products are shorter besides.
    assert relative(*actions) <= (1e-2 if device == "cpu" else 5e-2)
