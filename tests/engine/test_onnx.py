"""The engine "onnx": exported graphs in ONNX Runtime behind the same protocol as every other engine."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from captured_support import model, observation, takes_only_what_fits

from turbopi import CheckpointError, InputError, Pi0
from turbopi.engine import Engine, TickEngine, create_engine, sample_actions
from turbopi.engine.reuse import copied
from turbopi.errors import NonFiniteActionsError
from turbopi.export import ExportSpec, export, weights_of_model
from turbopi.model import PrefixCache
from turbopi.quant import Calibration, PrecisionPlan, Quantisation, model_hash
from turbopi.quant.observe import input_ranges, synthetic_batches, watch
from turbopi.runtime import Runtime, RuntimeConfig
from turbopi.runtime.config import ReuseConfig

STEPS = 2
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=["pi05-tiny", "pi0-tiny"])
def reference(request: pytest.FixtureRequest) -> Pi0:
    return model(request.param)


@pytest.fixture(scope="module")
def engine(reference: Pi0) -> Engine:
    return create_engine("onnx", reference, "fp32")


def actions(reference: Pi0, *asked: object) -> torch.Tensor:
    inputs, noise = observation(reference.config, *asked)  # type: ignore[arg-type]
    return reference.sample_actions(inputs, noise, STEPS)


def test_a_ragged_batch_with_missing_cameras(reference: Pi0, engine: TickEngine) -> None:
    asked = ([20, 33, 1], [(True, True, False), (False, True, False), (True, True, True)])
    inputs, noise = observation(reference.config, *asked)
    found = engine.sample_actions(inputs, noise, STEPS)
    torch.testing.assert_close(found, actions(reference, *asked), **CLOSE)
    assert torch.equal(engine.sample_actions(inputs, noise, STEPS), found)


def test_stages_hand_over_to_the_reference_and_back(reference: Pi0, engine: TickEngine) -> None:
    inputs, noise = observation(reference.config, [20, 33])
    expected = actions(reference, [20, 33])
    tokens = engine.encode_images(inputs.images, inputs.image_mask)
    assert not tokens[:, 2].any()
    cache = engine.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
    assert cache.lengths.tolist() == [52, 65]
    assert cache.valid is not None
    with torch.no_grad():
        torch.testing.assert_close(reference.denoise(cache, inputs.state, noise, STEPS), expected, **CLOSE)
        own = reference.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
    torch.testing.assert_close(engine.denoise(own, inputs.state, noise, STEPS), expected, **CLOSE)


def test_a_cache_of_one_is_used_where_it_lies_until_it_is_written_over(reference: Pi0, engine: TickEngine) -> None:
    inputs, noise = observation(reference.config, [20])
    tokens = engine.encode_images(inputs.images, inputs.image_mask)
    cache = engine.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
    first = engine.denoise(cache, inputs.state, noise, STEPS)
    torch.testing.assert_close(first, actions(reference, [20]), **CLOSE)
    kept = PrefixCache(
        *(tuple(t.clone() for t in layers) for layers in (cache.keys, cache.values)), cache.lengths, None
    )
    other = observation(reference.config, [21], seed=1)[0]
    engine.prefill(tokens, other.image_mask, other.tokens, other.token_mask)
    with pytest.raises(RuntimeError, match="written over"):
        engine.denoise(cache, inputs.state, noise, STEPS)
    torch.testing.assert_close(engine.denoise(kept, inputs.state, noise, STEPS), first)


def test_what_it_cannot_take(reference: Pi0, engine: TickEngine) -> None:
    inputs, noise = observation(reference.config, [20], [(False, False, False)])
    with pytest.raises(InputError, match="no camera is there"):
        engine.sample_actions(inputs, noise, STEPS)
    inputs, noise = observation(dataclasses.replace(reference.config, max_tokens=100), [100])
    with pytest.raises(InputError, match="a prompt has 100 tokens, the exported graphs hold at most 64"):
        engine.sample_actions(inputs, noise, STEPS)
    with pytest.raises(InputError, match="holds no samples"):
        engine.encode_images(inputs.images[:0], inputs.image_mask[:0])
    holes = torch.ones(1, 40, dtype=torch.bool)
    holes[0, 5] = False
    shape = (1, 1, 40, reference.config.vlm.head_dim)
    layers = tuple(torch.zeros(shape) for _ in range(reference.config.vlm.depth))
    with pytest.raises(ValueError, match="39 valid tokens but the length 40"):
        engine.denoise(PrefixCache(layers, layers, torch.tensor([40]), holes), inputs.state, noise, STEPS)


def test_stages_take_only_what_fits(reference: Pi0, engine: TickEngine) -> None:
    takes_only_what_fits(engine, reference, STEPS)


def test_it_says_how_it_runs(engine: TickEngine) -> None:
    told = engine.describe()
    assert told["provider"] == "CPUExecutionProvider"
    assert told["graphs"]["buckets"] == [16, 32, 48, 64]
    assert isinstance(engine, TickEngine)


def test_actions_that_are_not_finite_are_refused() -> None:
    broken = model("pi05-tiny")
    with torch.no_grad():
        broken.action_out_proj.bias[0] = float("nan")
    with pytest.raises(NonFiniteActionsError):
        create_engine("onnx", broken, "fp32").sample_actions(*observation(broken.config, [5]), STEPS)  # type: ignore[attr-defined]


def test_precisions_and_models_that_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="no bfloat16 products on a CPU"):
        create_engine("onnx", model(dtype=torch.bfloat16), "bf16")
    with pytest.raises(ValueError, match="drops invalid tokens"):
        create_engine("onnx", model(invalid_tokens="masked"), "fp32")
    with pytest.raises(ValueError, match="needs a calibration"):
        create_engine("onnx", model(dtype=torch.bfloat16), "fp8")


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_quantised(precision: str) -> None:
    """The same plan and calibration as the reference's simulation, whose error against float32 is the yardstick."""
    held = model(dtype=torch.bfloat16)
    ranges = input_ranges(watch(held, iter(synthetic_batches(held.config, 2)), 2), "max", 100.0)
    calibration = Calibration(model_hash(held), "libero", "noise", 2, "max", 100.0, ranges, synthetic=True)
    asked = Quantisation(PrecisionPlan(precision, {"expert.*": "bf16"}), calibration)  # type: ignore[arg-type]
    inputs, noise = observation(held.config, [20])
    simulated = sample_actions(create_engine("eager", held, precision, asked), inputs, noise, STEPS)  # type: ignore[arg-type]
    found = sample_actions(create_engine("onnx", held, precision, asked), inputs, noise, STEPS)  # type: ignore[arg-type]
    plain = held.sample_actions(inputs, noise, STEPS)
    assert (found - plain).norm() > 0
    assert (found - simulated).norm() < 1.5 * (simulated - plain).norm()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "export"
    export(weights_of_model(model()), ExportSpec(steps=STEPS, prompt_buckets=(32,)), out)
    return out


def test_an_export_on_disk(exported: Path) -> None:
    reference = model()
    engine = create_engine(f"onnx:{exported}", reference, "fp32")
    inputs, noise = observation(reference.config, [20])
    torch.testing.assert_close(sample_actions(engine, inputs, noise, STEPS), actions(reference, [20]), **CLOSE)
    with pytest.raises(ValueError, match="3 steps were asked for"):
        sample_actions(engine, inputs, noise, 3)
    with pytest.raises(InputError, match="hold at most 32"):
        sample_actions(engine, *observation(reference.config, [33]), STEPS)
    with pytest.raises(InputError, match=r"3 cameras are there, the export .* is for 2"):
        sample_actions(engine, *observation(reference.config, [20], [(True, True, True)]), STEPS)


def test_an_export_takes_back_caches_of_short_prompts(exported: Path) -> None:
    """Their rows alone would fit fewer cameras than the export is for: one by one, in a batch, from another engine."""
    reference = model()
    engine = create_engine(f"onnx:{exported}", reference, "fp32")
    mixed = create_engine(f"vision=eager,prefill=eager,denoise=onnx:{exported}", reference, "fp32")
    for lengths in ([5], [16], [5, 20]):
        inputs, noise = observation(reference.config, lengths)
        tokens = engine.encode_images(inputs.images, inputs.image_mask)
        cache = copied(engine.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask))
        found = engine.denoise(cache, inputs.state, noise, STEPS)
        torch.testing.assert_close(found, actions(reference, lengths), **CLOSE)
        found = sample_actions(mixed, inputs, noise, STEPS)
        torch.testing.assert_close(found, actions(reference, lengths), **CLOSE)


def test_an_export_reuses_its_own_prefix(exported: Path) -> None:
    engine = create_engine(f"onnx:{exported}", model(), "fp32")
    inputs, noise = observation(engine.config, [5])
    runtime = Runtime(engine, RuntimeConfig(steps=STEPS, reuse=ReuseConfig(every=2)))
    whole, fast = (runtime.sample(inputs, noise)[0] for _ in range(2))
    torch.testing.assert_close(fast, whole, **CLOSE)


def test_sixteen_bit_exports_on_a_cpu(tmp_path: Path) -> None:
    """float16 runs, with casts that ONNX Runtime puts in by itself; bfloat16 is refused when its graph is opened."""
    held = model(dtype=torch.bfloat16)
    inputs, noise = observation(held.config, [20])
    for precision in ("fp16", "bf16"):
        spec = ExportSpec(precision=precision, steps=STEPS, prompt_buckets=(32,))  # type: ignore[arg-type]
        export(weights_of_model(held), spec, tmp_path / precision)
    engine = create_engine(f"onnx:{tmp_path / 'fp16'}", held, "bf16")
    found = sample_actions(engine, inputs, noise, STEPS)
    truth = held.float().sample_actions(inputs, noise, STEPS)
    assert 0 < (found - truth).norm() / truth.norm() < 5e-3
    refused = create_engine(f"onnx:{tmp_path / 'bf16'}", model(dtype=torch.bfloat16), "bf16")
    with pytest.raises(ValueError, match=r"cannot run vision\.onnx on 'cpu'.*choose another precision"):
        sample_actions(refused, inputs, noise, STEPS)


def test_an_export_of_something_else_is_refused(exported: Path) -> None:
    with pytest.raises(CheckpointError, match="another checkpoint"):
        create_engine(f"onnx:{exported}", model("pi0-tiny"), "fp32")
    with pytest.raises(ValueError, match="was exported in fp32, which is run as precision 'fp32', not 'bf16'"):
        create_engine(f"onnx:{exported}", model(), "bf16")
    with pytest.raises(ValueError, match="take a directory"):
        create_engine(f"turbo:{exported}", model(), "fp32")
    with pytest.raises(FileNotFoundError, match="turbo-pi export"):
        create_engine("onnx:/nowhere", model(), "fp32")


def test_an_export_damaged_in_place_is_refused(exported: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(exported, tmp_path / "damaged")
    weights = bytearray((damaged / "prefill.data").read_bytes())
    middle = len(weights) // 2
    weights[middle : middle + 4096] = bytes(4096)
    (damaged / "prefill.data").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"prefill\.data is damaged"):
        create_engine(f"onnx:{damaged}", model(), "fp32")


def test_a_whole_graph_is_no_engine(tmp_path: Path) -> None:
    export(weights_of_model(model()), ExportSpec(graphs=("whole",), steps=STEPS, prompt_buckets=(32,)), tmp_path / "w")
    engine = create_engine(f"onnx:{tmp_path / 'w'}", model(), "fp32")
    with pytest.raises(ValueError, match="holds the graphs whole only"):
        sample_actions(engine, *observation(engine.config, [5]), STEPS)


def test_a_broken_graph_is_named(exported: Path, tmp_path: Path) -> None:
    from turbopi.engine.onnx.session import open_session

    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"cannot read .*broken\.onnx"):
        open_session(tmp_path / "broken.onnx", torch.device("cpu"), eight_bit_floats=False)


def test_a_gpu_is_asked_for_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from turbopi.engine.onnx import session

    cuda = torch.device("cuda", 1)
    monkeypatch.setattr(session.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match=r"no provider for the device cuda:1 here.*install onnxruntime-gpu"):
        session.OnnxRunner(cuda, eight_bit_floats=False)
    monkeypatch.setattr(session.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    stream = SimpleNamespace(cuda_stream=4711)
    found = session.providers(cuda, stream)  # type: ignore[arg-type]
    ((provider, options),) = found
    assert provider == "CUDAExecutionProvider"
    assert options == {"device_id": 1, "user_compute_stream": "4711", "use_tf32": "0"}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (None, "could not load its provider for cuda:0; it needs the CUDA and cuDNN libraries"),
        ("CUDA failure 35: CUDA driver version is insufficient", r"cannot use cuda:0 for g\.onnx: CUDA failure 35"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_no_cpu(said: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself would go on without the provider."""
    from turbopi.engine.onnx import session

    def opened(*_: object, **asked: object) -> SimpleNamespace:
        assert asked["enable_fallback"] == 0
        if said is not None:
            raise RuntimeError(said)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(session.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(session.ort, "InferenceSession", opened)
    with pytest.raises(ValueError, match=message):
        session.open_session(Path("g.onnx"), torch.device("cuda", 0), eight_bit_floats=False)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_norms_of_bfloat16_graphs_stay_apart(bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined with their scales they would need a kernel that the CUDA provider has not."""
    from turbopi.engine.onnx import session

    asked: dict[str, list[str]] = {}

    def opened(*_: object, **given: list[str]) -> SimpleNamespace:
        asked.update(given)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(session.ort, "InferenceSession", opened)
    session.open_session(Path("g.onnx"), torch.device("cpu"), eight_bit_floats=False, bfloat16=bfloat16)
    assert ("SimplifiedLayerNormFusion" in asked["disabled_optimizers"]) == bfloat16


def test_the_package_does_without_onnx() -> None:
    """Importing turbopi asks for nothing that the extra brings; the engine says what to install."""
    script = (
        "import sys\n"
        "sys.modules['onnxruntime'] = sys.modules['onnx_ir'] = None\n"
        "import torch, turbopi\n"
        "from turbopi.audit.golden import hash_model\n"
        "from turbopi.engine import create_engine\n"
        "try:\n"
        "    create_engine('onnx', hash_model(turbopi.preset('pi05-tiny'), 1, torch.float32), 'fp32')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "pip install 'turbo-pi[onnx]'" in said
