"""ONNX Runtime's CUDA provider, on tensors that lie on the GPU: `pytest -m gpu tests/engine/test_onnx_gpu.py`."""

import pytest
import torch
from captured_support import model, observation

from turbopi import Pi0
from turbopi.engine import MixedEngine, Precision, create_engine
from turbopi.engine.graphs.engine import GraphEngine

ort = pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in ort.get_available_providers(), reason="this ONNX Runtime has no CUDA provider"
    ),
]

STEPS = 3
RAGGED = ([20, 33, 1], [(True, True, False), (False, True, False), (True, True, True)])
# Relative: of float32 in another order of sums, and of sixteen-bit products.
TOLERANCE = {"fp32": 2e-5, "bf16": 6e-2}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float().cpu() - b.float().cpu()).norm() / b.float().cpu().norm())


def made(name: str, kind: str, precision: Precision, device: str = "cuda") -> GraphEngine:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    engine = create_engine(name, model(kind, device, dtype), precision)
    assert isinstance(engine, GraphEngine)
    return engine


@pytest.fixture(scope="module", params=["pi05-tiny", "pi0-tiny"])
def reference(request: pytest.FixtureRequest) -> Pi0:
    return model(request.param)


def test_float32_equals_the_cpu_provider_and_the_reference(reference: Pi0) -> None:
    """Every stage and the whole tick, of a ragged batch with missing cameras. TF32 would be a thousand times off."""
    kind = f"{reference.config.kind}-tiny"
    gpu, cpu = made("onnx", kind, "fp32"), made("onnx", kind, "fp32", "cpu")
    inputs, noise = observation(reference.config, *RAGGED)
    tokens = [engine.encode_images(inputs.images, inputs.image_mask) for engine in (gpu, cpu)]
    assert relative(*tokens) <= TOLERANCE["fp32"]
    actions = gpu.sample_actions(inputs, noise, STEPS)
    assert relative(actions, cpu.sample_actions(inputs, noise, STEPS)) <= TOLERANCE["fp32"]
    assert relative(actions, reference.sample_actions(inputs, noise, STEPS)) <= TOLERANCE["fp32"]


def test_nothing_leaves_the_gpu_between_the_stages() -> None:
    engine = made("onnx", "pi05-tiny", "fp32")
    inputs, noise = observation(engine.config, [20])
    tokens = engine.encode_images(inputs.images.cuda(), inputs.image_mask)
    cache = engine.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
    actions = engine.denoise(cache, inputs.state.cuda(), noise.cuda(), STEPS)
    assert {tensor.device.type for tensor in (tokens, *cache.keys, *cache.values, actions)} == {"cuda"}
    (slots,) = engine._slots.values()
    denoise = engine._denoise_for(slots, STEPS)
    for name, tensor in slots.prefill.outputs.items():
        assert denoise.inputs[name].data_ptr() == tensor.data_ptr(), name
    assert cache.keys[0].data_ptr() == slots.prefill.outputs["keys_00"].data_ptr()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_bits_again(precision: Precision) -> None:
    """Also after other shapes, and when torch was busy on the stream that the inputs come from."""
    engine = made("onnx", "pi05-tiny", precision)
    inputs, noise = observation(engine.config, [20])
    first = engine.sample_actions(inputs, noise, STEPS)
    for length in (5, 33, 20, 20):
        torch.cuda._sleep(2_000_000)
        other = observation(engine.config, [length], seed=length)
        engine.sample_actions(*other, STEPS)
        assert torch.equal(engine.sample_actions(inputs, noise, STEPS), first)


def test_sixteen_bits_are_the_model_within_their_rounding() -> None:
    engine = made("onnx", "pi05-tiny", "bf16")
    exact = model("pi05-tiny")
    inputs, noise = observation(engine.config, *RAGGED)
    errors = relative(engine.sample_actions(inputs, noise, STEPS), exact.sample_actions(inputs, noise, STEPS))
    assert errors <= TOLERANCE["bf16"]


@pytest.mark.parametrize(
    "stages", ["vision=onnx,prefill=turbo,denoise=turbo", "vision=turbo,prefill=onnx,denoise=turbo"]
)
def test_stages_mix_with_the_turbo_engine(stages: str) -> None:
    """Image tokens, and a prefix, that another engine of the same GPU made."""
    reference = model("pi05-tiny", "cuda")
    engine = create_engine(stages, reference, "fp32")
    assert isinstance(engine, MixedEngine)
    inputs, noise = observation(reference.config, [20])
    actions = engine.sample_actions(inputs, noise, STEPS)
    assert relative(actions, reference.sample_actions(inputs.to("cuda"), noise.cuda(), STEPS)) <= TOLERANCE["fp32"]
    assert torch.equal(engine.sample_actions(inputs, noise, STEPS), actions)
    assert all(cost["median"] > 0 for cost in engine.describe()["hand_over_ms"].values())


def test_an_engine_may_be_dropped_while_it_computes() -> None:
    """Memory that ONNX Runtime frees after its session ended the process here, once."""
    for _ in range(3):
        engine = made("onnx", "pi05-tiny", "fp32")
        inputs, noise = observation(engine.config, [20])
        tokens = engine.encode_images(inputs.images, inputs.image_mask)
        cache = engine.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
        engine.denoise(cache, inputs.state, noise, STEPS)
        torch.cuda._sleep(20_000_000)
        engine.denoise(cache, inputs.state, noise, STEPS)
        del engine, cache
    torch.cuda.synchronize()
