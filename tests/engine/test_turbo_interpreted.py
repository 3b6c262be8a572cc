"""The turbo engine with its real kernels, in Triton's interpreter (or on a GPU): a very small model in float32."""

import dataclasses

import pytest
import torch
from captured_support import model, observation
from turbo_support import relative

from turbopi.config import GemmaConfig, VisionConfig
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo.ops import kernel_vision_attention, triton_ops

pytest.importorskip("triton")

VISION = VisionConfig(width=32, depth=1, mlp_dim=48, heads=2, patch_size=14, image_size=28)
VLM = GemmaConfig(width=48, depth=2, mlp_dim=64, heads=2, kv_heads=1, head_dim=32)
EXPERT = GemmaConfig(width=32, depth=2, mlp_dim=48, heads=2, kv_heads=1, head_dim=32)


@pytest.mark.filterwarnings(
    "ignore:.* encountered in:RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning"
)
@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-tiny"])
def test_kernels_put_together_are_the_reference(name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = model(name, device, vision=VISION, vlm=VLM, expert=EXPERT, horizon=3, max_tokens=16)
    ops = dataclasses.replace(triton_ops(), vision_attention=kernel_vision_attention)
    engine = TurboEngine(reference, "fp32", ops, None)
    x, noise = observation(reference.config, [5, 9], [(True, False, True), (True, False, False)])
    expected = reference.sample_actions(x.to(device), noise.to(device), 2)
    assert relative(engine.sample_actions(x, noise, 2), expected) <= 1e-5
