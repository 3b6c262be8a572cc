"""The capturing engines against eager on a GPU: `pytest -m gpu tests/engine/test_compiled_gpu.py`."""

import pytest
import torch
from captured_support import model, observation

from turbopi import ModelInput, Pi0
from turbopi.engine import Engine, Precision, create_engine
from turbopi.engine.compiled import BUCKET
from turbopi.engine.graphed import CAPACITY

pytestmark = pytest.mark.gpu

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative. In bf16 the compiler keeps float32 between operations that it fuses, where eager rounds; both are right.
TOLERANCE = {"fp32": 2e-5, "bf16": 6e-2}
RAGGED = [(True, True, False), (True, False, True), (False, False, False)]
BATCHES = {"one": ([12], None), "equally long": ([9, 9], None), "ragged": ([40, 3, 17], RAGGED)}


def stages(engine: Engine, inputs: ModelInput, noise: torch.Tensor, steps: int = 4) -> list[torch.Tensor]:
    """Image tokens, the cache's valid part, and actions."""
    tokens = engine.encode_images(inputs.images, inputs.image_mask)
    cache = engine.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
    actions = engine.denoise(cache, inputs.state, noise, steps)
    lengths = cache.lengths.tolist()
    kept = [kv[i, :, :n] for kv in (*cache.keys, *cache.values) for i, n in enumerate(lengths)]
    return [tokens, torch.cat([k.flatten() for k in kept]), actions.clone()]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def on_gpu(kind: str, precision: str, **changes: object) -> Pi0:
    return model(kind, "cuda", DTYPES[precision], **changes)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["pi0-tiny", "pi05-tiny", "pi05-libero-small"])
def test_graphed_is_eager_to_the_bit(kind: str, precision: Precision, batch: str) -> None:
    reference = on_gpu(kind, precision)
    eager, graphed = create_engine("eager", reference, precision), create_engine("graphed", reference, precision)
    for seed in range(3):
        inputs, noise = observation(reference.config, *BATCHES[batch], seed=seed)
        for a, b in zip(stages(graphed, inputs, noise), stages(eager, inputs, noise), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("changes", [{"invalid_tokens": "masked"}, {"numerics": "lerobot"}, {"numerics": "openpi"}])
def test_graphed_follows_the_configuration(changes: dict[str, object]) -> None:
    reference = on_gpu("pi05-tiny", "bf16", **changes)
    eager, graphed = create_engine("eager", reference, "bf16"), create_engine("graphed", reference, "bf16")
    inputs, noise = observation(reference.config, [12])
    for a, b in zip(stages(graphed, inputs, noise), stages(eager, inputs, noise), strict=True):
        assert torch.equal(a, b)


def test_graphed_with_a_prompt_that_changes_at_every_tick() -> None:
    """More lengths than are kept, in an order that comes back to forgotten ones; graphs share their scratch memory."""
    reference = on_gpu("pi05-libero-small", "bf16")
    eager, graphed = create_engine("eager", reference, "bf16"), create_engine("graphed", reference, "bf16")
    order = torch.randperm(4 * CAPACITY, generator=torch.Generator().manual_seed(0)) % (CAPACITY + 8)
    for seed, length in enumerate((order + 20).tolist()):
        inputs, noise = observation(reference.config, [length], seed=seed)
        assert torch.equal(stages(graphed, inputs, noise)[-1], stages(eager, inputs, noise)[-1])


def test_a_cache_survives_the_graphs_of_other_shapes() -> None:
    reference = on_gpu("pi05-tiny", "bf16")
    graphed = create_engine("graphed", reference, "bf16")
    inputs, noise = observation(reference.config, [10])
    tokens = graphed.encode_images(inputs.images, inputs.image_mask)
    cache = graphed.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
    first = graphed.denoise(cache, inputs.state, noise, 4)
    for length in (11, 30, 12):
        stages(graphed, observation(reference.config, [length])[0], noise)
    assert torch.equal(graphed.denoise(cache, inputs.state, noise, 4), first)


def test_captures_are_cheap_in_memory() -> None:
    reference = on_gpu("pi05-libero-small", "bf16")
    graphed = create_engine("graphed", reference, "bf16")
    _, noise = observation(reference.config, [20])
    stages(graphed, observation(reference.config, [60])[0], noise, 10)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for length in range(20, 60, 2):
        stages(graphed, observation(reference.config, [length])[0], noise, 10)
    assert torch.cuda.memory_reserved() - before <= 64 << 20


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["pi0-tiny", "pi05-tiny"])
def test_compiled_agrees_with_eager(kind: str, precision: Precision) -> None:
    reference = on_gpu(kind, precision)
    eager, compiled = create_engine("eager", reference, precision), create_engine("compiled", reference, precision)
    for batch in ("one", "ragged"):
        inputs, noise = observation(reference.config, *BATCHES[batch])
        errors = [
            relative(a, b) for a, b in zip(stages(compiled, inputs, noise), stages(eager, inputs, noise), strict=True)
        ]
        assert max(errors) <= TOLERANCE[precision], errors


def test_compiled_does_not_compile_again_within_a_bucket() -> None:
    reference = on_gpu("pi05-tiny", "bf16")
    compiled = create_engine("compiled", reference, "bf16")
    images = 2 * reference.config.vision.tokens
    first = -(-images // BUCKET) * BUCKET - images + 1
    inputs, noise = observation(reference.config, [first])
    stages(compiled, inputs, noise)
    counters = torch._dynamo.utils.counters["stats"]
    graphs = counters["unique_graphs"]
    for length in range(first, first + BUCKET):
        stages(compiled, observation(reference.config, [length])[0], noise)
    assert counters["unique_graphs"] == graphs


@pytest.mark.parametrize("name", ["graphed", "compiled"])
def test_the_same_bits_again(name: str) -> None:
    reference = on_gpu("pi05-tiny", "bf16")
    engine = create_engine(name, reference, "bf16")
    inputs, noise = observation(reference.config, *BATCHES["ragged"])
    first = stages(engine, inputs, noise)[-1]
    assert all(torch.equal(stages(engine, inputs, noise)[-1], first) for _ in range(20))
