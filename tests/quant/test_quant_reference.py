import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quant_support import CONFIG, batches, calibrated, hashed
from torch import nn

from turbopi import Pi0
from turbopi.engine import EagerEngine, create_engine, sample_actions
from turbopi.engine.graphed import ReferenceFunctions, StageGraphs
from turbopi.quant import FORMATS, Format, PrecisionPlan, Quantisation, linear_paths, product_names, quantised
from turbopi.quant.calibration import InputRange
from turbopi.quant.formats import balance, e4m3_scale, int8_scale, to_e4m3, to_int8
from turbopi.quant.linear import (
    Fp8Linear,
    Int4WeightLinear,
    Int8Linear,
    Int8WeightLinear,
    Nvfp4Linear,
    QuantisedLinear,
)
from turbopi.quant.reference import weight_bytes

MODEL, CALIBRATION = calibrated()
TICKS = list(batches(2))
QUANTISED: tuple[Format, ...] = tuple(name for name in FORMATS if name != "bf16")
# What each costs this model of noise: twice what was seen when the test was written.
ERROR = {"fp8": 0.1, "int8": 0.03, "w8a16": 0.02, "w4a16": 0.15, "nvfp4": 0.25}


def plan(chosen: Format, **exceptions: Format) -> Quantisation:
    return Quantisation(PrecisionPlan(chosen, exceptions), CALIBRATION)


def actions(model: Pi0) -> torch.Tensor:
    return torch.cat([model.sample_actions(inputs, noise, 4) for inputs, noise in TICKS])


class Kept:
    """Records by keeping the work, as a graph keeps its launches."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work


def linear(width: int = 64, out: int = 48, bias: bool = True) -> nn.Linear:
    generator = torch.Generator().manual_seed(3)
    made = nn.Linear(width, out, bias=bias)
    with torch.no_grad():
        made.weight.copy_(torch.randn(out, width, generator=generator) / 8)
    return made.requires_grad_(False)


@pytest.mark.parametrize("chosen", QUANTISED)
def test_a_quantised_model_is_near_and_the_model_itself_untouched(chosen: Format) -> None:
    before = {name: value.clone() for name, value in MODEL.named_parameters()}
    expected = actions(MODEL)
    model = quantised(MODEL, plan(chosen))
    error = float((actions(model) - expected).norm() / expected.norm())
    assert 1e-5 < error < ERROR[chosen]
    assert all(torch.equal(value, before[name]) for name, value in MODEL.named_parameters())
    assert torch.equal(actions(MODEL), expected)
    assert torch.equal(actions(model), actions(model))


@pytest.mark.parametrize("chosen", QUANTISED)
def test_all_that_is_no_product_is_shared_not_copied(chosen: Format) -> None:
    model = quantised(MODEL, plan(chosen))
    shared = dict(MODEL.named_parameters())
    assert all(value is shared[name] for name, value in model.named_parameters())
    swapped = {name for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    assert swapped == {path for product in product_names(CONFIG) for path in linear_paths(CONFIG, product)}
    assert (model.vlm.dtype, model.expert.dtype, model.vision.dtype) == (torch.bfloat16,) * 3


def test_exceptions_keep_their_layers() -> None:
    model = quantised(MODEL, plan("fp8", **{"expert.*": "bf16", "expert.layers.1.down": "w4a16", "vision.*": "int8"}))
    block, vision = model.expert.blocks, model.vision.encoder.layers[0]
    assert isinstance(block[0].mlp.down_proj, nn.Linear)
    assert isinstance(block[1].mlp.down_proj, Int4WeightLinear)
    assert isinstance(vision.mlp.fc1, Int8Linear)
    assert isinstance(model.vlm.blocks[0].mlp.up_proj, Fp8Linear)
    only_bf16 = quantised(MODEL, plan("bf16"))
    assert torch.equal(actions(only_bf16), actions(MODEL))


@pytest.mark.parametrize("product", ["vision.layers.1.qkv", "prefix.layers.2.qkv", "expert.layers.0.gate_up"])
def test_merged_products_share_one_input_scale(product: str) -> None:
    paths = linear_paths(CONFIG, product)
    assert len(paths) == {"vision": 3, "prefix": 2, "expert": 2}[product.split(".")[0]]
    fp8, int8, nvfp4 = (quantised(MODEL, plan(name)) for name in ("fp8", "int8", "nvfp4"))
    assert len({float(fp8.get_submodule(path).input_scale) for path in paths}) == 1
    divisors = [int8.get_submodule(path).divisor for path in paths]
    assert all(torch.equal(divisor, divisors[0]) for divisor in divisors)
    assert len({float(nvfp4.get_submodule(path).tensor_scale) for path in paths}) == 1


def test_memory_really_falls() -> None:
    floats = weight_bytes(MODEL)
    sizes = {name: weight_bytes(quantised(MODEL, plan(name))) for name in QUANTISED}
    for name, most in (("fp8", 0.6), ("int8", 0.65), ("w8a16", 0.6), ("w4a16", 0.36), ("nvfp4", 0.36)):
        assert sizes[name]["products"] < most * floats["products"], name
        assert sizes[name]["rest"] == floats["rest"]
    model = quantised(MODEL, plan("w4a16"))
    held = {
        t.dtype for path in linear_paths(CONFIG, "expert.layers.0.down") for t in model.get_submodule(path).buffers()
    }
    assert held == {torch.uint8, torch.bfloat16}


def test_fp8_is_what_it_says() -> None:
    dense, x = linear(), torch.randn(5, 64).to(torch.bfloat16)
    amax = torch.tensor(2.0)
    weight_scale, input_scale = e4m3_scale(dense.weight.abs().amax(1))[:, None], e4m3_scale(amax)
    weight = to_e4m3(dense.weight, weight_scale).double() * weight_scale
    expected = to_e4m3(x, input_scale).double() * input_scale @ weight.T + dense.bias
    assert torch.allclose(Fp8Linear(dense, amax)(x).double(), expected, rtol=2**-7, atol=2**-8)


def test_int8_is_what_it_says() -> None:
    dense, x = linear(bias=False), torch.randn(2, 3, 64)
    channels = x.abs().amax((0, 1))
    divisor = balance(channels, dense.weight.abs().amax(0))
    amax = (channels / divisor).amax()
    weight = dense.weight * divisor
    weight_scale, input_scale = int8_scale(weight.abs().amax(1))[:, None], int8_scale(amax)
    sums = to_int8(x, divisor * input_scale).double() @ to_int8(weight, weight_scale).double().T
    got = Int8Linear(dense, divisor, amax)(x)
    assert got.shape == (2, 3, 48)
    assert torch.allclose(got.double(), sums * weight_scale.T * input_scale, rtol=1e-5)
    assert float((got - dense(x)).norm() / dense(x).norm()) < 0.02


def test_weight_only_formats_round_nothing_but_weights() -> None:
    dense, x = linear(128, 48), torch.randn(7, 128)
    scale = int8_scale(dense.weight.abs().amax(1))[:, None]
    weight = to_int8(dense.weight, scale).float() * scale
    assert torch.allclose(Int8WeightLinear(dense)(x), x @ weight.T + dense.bias, atol=1e-5)
    with_four = Int4WeightLinear(dense)(x)
    assert 0.01 < float((with_four - dense(x)).norm() / dense(x).norm()) < 0.15


def test_nvfp4_saturates_beyond_its_calibration() -> None:
    dense = linear(bias=False)
    made = Nvfp4Linear(dense, dense.weight.abs().amax(), torch.tensor(1.0))
    inside, beyond = torch.full((1, 64), 1.0), torch.full((1, 64), 100.0)
    assert torch.equal(made(inside), made(beyond))


def test_an_input_of_no_rows_is_one_of_no_rows() -> None:
    for made in (Fp8Linear(linear(), torch.tensor(1.0)), Int8WeightLinear(linear()), Int4WeightLinear(linear())):
        assert made(torch.zeros(0, 64)).shape == (0, 48)


@pytest.mark.parametrize("chosen", QUANTISED)
def test_eager_runs_every_precision_and_tells_how(chosen: Any) -> None:
    engine = create_engine("eager", MODEL, chosen, plan(chosen))
    inputs, noise = TICKS[0]
    assert torch.equal(sample_actions(engine, inputs, noise, 4), actions(engine.model)[:1])  # type: ignore[attr-defined]
    assert isinstance(engine, EagerEngine)
    told = engine.describe()
    assert told["plan"] == {"default": chosen, "exceptions": {}}
    assert told["products"] == {chosen: len(product_names(CONFIG))}
    assert ("simulated" in told["how"][chosen]) == (chosen in ("fp8", "nvfp4"))
    assert told["weight_bytes"]["products"] < weight_bytes(MODEL)["products"]
    assert told["calibration"]["frames"] == CALIBRATION.frames


@pytest.mark.parametrize("chosen", ["w8a16", "w4a16"])
def test_weight_only_precisions_need_no_calibration(chosen: Any) -> None:
    engine = create_engine("eager", MODEL, chosen)
    assert isinstance(engine, EagerEngine)
    assert engine.describe()["calibration"] is None


@torch.no_grad()
@pytest.mark.parametrize("chosen", QUANTISED)
def test_graphs_over_a_quantised_model_are_the_model(chosen: Format) -> None:
    model = quantised(MODEL, plan(chosen))
    graphs = StageGraphs(model, ReferenceFunctions(model), Kept())
    inputs, noise = TICKS[0]
    tokens = graphs.encode_images(inputs.images, inputs.image_mask)
    cache = graphs.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
    assert torch.equal(graphs.denoise(cache, inputs.state, noise, 4), actions(model)[:1])


def test_a_width_that_does_not_fit_names_the_product() -> None:
    narrow = dataclasses.replace(CONFIG, expert=dataclasses.replace(CONFIG.expert, mlp_dim=88))
    with pytest.raises(
        ValueError, match=r"expert\.layers\.0\.down: w4a16 needs a width that is a multiple of 16, got 88"
    ):
        create_engine("eager", hashed(narrow), "w4a16")


def test_int8_on_a_gpu_asks_for_whole_words(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = linear(60, 48)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(ValueError, match="multiples of 8, got 60 to 48; leave the product in bf16"):
        Int8Linear(dense, torch.ones(60), torch.tensor(1.0))


def test_an_old_gpu_without_int8_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old")
    monkeypatch.setattr("turbopi.quant.reference._device", lambda model: torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"need compute capability 7\.5 .*Old has 7\.0; use the precision 'w8a16'"):
        quantised(MODEL, plan("int8"))


def test_ranges_of_the_calibration_are_used() -> None:
    product = "expert.layers.0.out"
    narrow = dict(CALIBRATION.inputs)
    width = len(narrow[product].channel_amax)
    narrow[product] = InputRange(1e-3, (1e-3,) * width)
    changed = dataclasses.replace(CALIBRATION, inputs=narrow)
    model = quantised(MODEL, Quantisation(PrecisionPlan("fp8"), changed))
    assert float(model.expert.blocks[0].self_attn.o_proj.input_scale) == pytest.approx(1e-3 / 448)
    assert not torch.equal(actions(model), actions(quantised(MODEL, plan("fp8"))))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["eager", "graphed"])
@pytest.mark.parametrize("chosen", QUANTISED)
def test_quantised_engines_on_a_gpu(name: str, chosen: Any) -> None:
    model = hashed().cuda()
    engine = create_engine(name, model, chosen, plan(chosen))
    inputs, noise = TICKS[0]
    got = sample_actions(engine, inputs, noise, 4)
    expected = actions(quantised(MODEL, plan(chosen)))[:1]
    assert float((got - expected).norm() / expected.norm()) < ERROR[chosen]
