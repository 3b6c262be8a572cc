"""Two observations at a time, on a CPU one after the other: the same actions, one submission later."""

import pytest
import torch
from captured_support import model, observation
from turbo_support import twins

from turbopi.engine.eager import EagerEngine
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo.loops import LoopName
from turbopi.engine.turbo.ops import triton_ops
from turbopi.engine.turbo.pipeline import OverlapPipeline


@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-tiny"])
def test_every_observation_gets_its_own_actions(name: str) -> None:
    engine = twins(model(name))
    pipeline = OverlapPipeline(engine, 2)
    asked = [observation(engine.config, [length], seed=seed) for seed, length in enumerate((9, 30, 9, 17))]
    expected = [twins(model(name)).sample_actions(x, noise, 2) for x, noise in asked]
    got = [pipeline.submit(x, noise) for x, noise in asked]
    assert got[0] is None
    for ours, theirs in zip([*got[1:], pipeline.drain()], expected, strict=True):
        assert ours is not None
        assert torch.equal(ours, theirs)
    assert pipeline.drain() is None


def test_the_engines_own_buffers_stay_as_they_are() -> None:
    engine = twins(model())
    x, noise = observation(engine.config, [9])
    engine.sample_actions(x, noise, 2)
    cache = engine.last_cache()
    expected = engine.sample_again(cache, x.state, noise, 2)
    pipeline = OverlapPipeline(engine, 2)
    pipeline.warm_up(2, torch.float32)
    pipeline.submit(*observation(engine.config, [20], seed=1))
    assert engine.holds(cache)
    assert torch.equal(engine.sample_again(cache, x.state, noise, 2), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("first_loop", ["persistent", "fused", "rows"])
def test_on_two_streams_many_observations_keep_their_order(first_loop: LoopName) -> None:
    from turbopi.engine.capture import CudaGraphRecorder

    reference = model("pi05-small", "cuda", torch.bfloat16)
    engine = TurboEngine(reference, "bf16", triton_ops(), CudaGraphRecorder(torch.device("cuda")))
    pipeline = OverlapPipeline(engine, 4, first_loop=first_loop)
    pipeline.warm_up(2, torch.float32)
    prepared = pipeline.recorded
    asked = [observation(engine.config, [9 + 3 * seed], seed=seed) for seed in range(12)]
    eager = EagerEngine(reference, "bf16")
    got = [*[pipeline.submit(x, noise) for x, noise in asked][1:], pipeline.drain()]
    assert pipeline.recorded == prepared
    for (x, noise), ours in zip(asked, got, strict=True):
        tokens = eager.encode_images(x.images, x.image_mask)
        cache = eager.prefill(tokens, x.image_mask, x.tokens, x.token_mask)
        expected = eager.denoise(cache, x.state, noise, 4).cpu()
        assert ours is not None
        assert float((ours - expected).norm() / expected.norm()) < 0.05
