"""Stage 1 of SigLIP's own size on the GPU: tiled products, as its tuned file cuts them, against kernel by kernel."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from turbo_support import relative

from turbopi import preset
from turbopi.engine.turbo.buckets import Bucket
from turbopi.engine.turbo.buffers import VisionBuffers, build, vision_specs
from turbopi.engine.turbo.ops import triton_ops
from turbopi.engine.turbo.tiled_vision import VisionStage
from turbopi.quant.fold import Affine, FoldedAffine, FoldedVision, FoldedVisionBlock
from turbopi.quant.fp8 import to_fp8_weight

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
WIDTH, HIDDEN, PROJECTED, TOKENS, DEPTH = 1152, 4352, 2048, 256, 2
REACH = 6.0
"""Of every product's input, about."""


def drawn(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to("cuda", dtype)


def tower(fp8: bool) -> FoldedVision:
    qkv, fc1 = drawn(3 * WIDTH, WIDTH, scale=0.03), drawn(HIDDEN, WIDTH, scale=0.03)
    qkv[:WIDTH] *= 72**-0.5
    out, fc2, bias = drawn(WIDTH, WIDTH, scale=0.02), drawn(WIDTH, HIDDEN, scale=0.01), drawn(WIDTH)
    none, biases = torch.zeros(1, WIDTH, device="cuda"), (drawn(3 * WIDTH, scale=0.1), drawn(HIDDEN))
    block = FoldedVisionBlock(FoldedAffine(qkv, biases[0]), out, none, FoldedAffine(fc1, biases[1]), fc2)
    if fp8:
        block = FoldedVisionBlock(
            FoldedAffine(to_fp8_weight(qkv, REACH), biases[0]),
            to_fp8_weight(out, REACH, bias),
            none,
            FoldedAffine(to_fp8_weight(fc1, REACH), biases[1]),
            to_fp8_weight(fc2, REACH, bias),
        )
    patch, position = (drawn(*shape, scale=0.04, dtype=torch.float32) for shape in ((WIDTH, 588), (TOKENS, WIDTH)))
    projector = Affine(drawn(PROJECTED, WIDTH, scale=0.03), drawn(PROJECTED))
    return FoldedVision(patch, position, (block,) * DEPTH, projector)


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_tiled_products_give_what_kernel_by_kernel_gives(images: int, fp8: bool) -> None:
    """Roundings in other places, which E4M3 makes 3 % of a value that is near the middle between two."""
    config, weights, ops = preset("pi05"), tower(fp8), triton_ops()
    specs = vision_specs(config, Bucket(1, images, config.max_tokens), BF16, fp8)
    b = build(VisionBuffers, lambda _, spec: torch.zeros(spec[0], dtype=spec[1], device="cuda"), specs)
    pixels = torch.randint(0, 256, (1, images, 3, 224, 224), device="cuda", dtype=torch.uint8)
    stage = VisionStage(replace(config.vision, depth=DEPTH), weights)
    stage.watched().run(ops, pixels, b)
    want = b.image_tokens.clone()
    stage.run(ops, pixels, b)
    (told,) = stage.told().values()
    if told not in ("norms behind products", "tiled products in E4M3"):
        pytest.skip(told)
    assert relative(b.image_tokens, want) <= (0.03 if fp8 else 0.01)
