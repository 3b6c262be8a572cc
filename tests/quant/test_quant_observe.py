import math

import pytest
import torch
from quant_support import CONFIG, batches, hashed

from turbopi import InputError, preset
from turbopi.audit.golden import hash_model
from turbopi.quant import calibrate, linear_paths, product_names
from turbopi.quant.observe import Magnitudes, Watched, input_ranges, outliers, synthetic_batches, watch

MODEL = hashed(dtype=torch.float32)
WATCHED = watch(MODEL, batches(2), 4)


def seen(*tensors: torch.Tensor) -> Magnitudes:
    magnitudes = Magnitudes.empty(tensors[0].shape[-1], torch.device("cpu"))
    for tensor in tensors:
        magnitudes.add(tensor)
    return magnitudes


def test_magnitudes_are_the_largest_and_the_percentile_is_the_samples() -> None:
    values = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    magnitudes = seen(values[:2000], values[2000:])
    assert torch.equal(magnitudes.channels, values.abs().amax(0))
    for percent in (50, 99, 99.9):
        exact = float(values.abs().flatten().quantile(percent / 100, interpolation="higher"))
        assert exact * (1 - 1e-6) <= magnitudes.percentile(percent) <= exact * (1 + 2**-7)
    assert magnitudes.percentile(100) == magnitudes.amax


def test_bf16_magnitudes_are_counted_exactly() -> None:
    values = torch.tensor([[0.0, 1.0, -1.0, 3.140625]], dtype=torch.bfloat16)
    magnitudes = seen(values)
    assert [magnitudes.percentile(p) for p in (25, 75, 100)] == [0.0, 1.0, 3.140625]


def test_every_product_is_watched_in_every_layer_and_step() -> None:
    assert tuple(WATCHED.inputs) == product_names(CONFIG)
    assert set(WATCHED.normed) == {n for n in product_names(CONFIG) if n.rsplit(".", 1)[1] in ("qkv", "fc1", "gate_up")}
    # Each of two frames: three cameras once, the suffix in each of four steps.
    tokens = CONFIG.vision.tokens
    assert int(WATCHED.inputs["vision.layers.0.qkv"].counts.sum()) == 2 * 3 * tokens * CONFIG.vision.width
    assert int(WATCHED.inputs["expert.layers.1.down"].counts.sum()) == 2 * 4 * CONFIG.horizon * CONFIG.expert.mlp_dim


def test_ranges_are_of_what_the_linears_read_and_norms_compute() -> None:
    product, inputs = "prefix.layers.1.gate_up", []
    linear = MODEL.get_submodule(linear_paths(CONFIG, product)[0])
    handle = linear.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    for frame, noise in batches(2):
        MODEL.sample_actions(frame, noise, 1)
    handle.remove()
    found = input_ranges(WATCHED, "max", 100.0)[product]
    read = torch.cat([x.flatten(0, 1) for x in inputs]).abs()
    assert found.channel_amax == tuple(read.amax(0).tolist())
    assert found.amax == float(read.max())
    # RMSNorm's weight is all that lies between the two.
    weight = 1 + MODEL.vlm.blocks[1].post_attention_layernorm.weight
    assert found.normed_channel_amax is not None
    again = torch.tensor(found.normed_channel_amax) * weight.abs()
    assert torch.allclose(again, torch.tensor(found.channel_amax), rtol=1e-5)


def test_normalised_inputs_of_every_tower_have_unit_size() -> None:
    for product, magnitudes in WATCHED.normed.items():
        width = len(magnitudes.channels)
        assert 1 < magnitudes.amax <= math.sqrt(width) * 1.001, product


def test_watching_leaves_no_trace() -> None:
    model = hashed()
    frame, noise = next(batches(1))
    before = model.sample_actions(frame, noise, 2)
    watch(model, batches(1), 2)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.sample_actions(frame, noise, 2), before)


def test_a_frame_that_does_not_fit_is_refused_and_leaves_no_hook() -> None:
    model = hashed()
    with pytest.raises(InputError, match="images"):
        watch(model, synthetic_batches(preset("pi05-small"), 1), 2)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_percentile_cuts_off_and_the_report_names_the_outlier() -> None:
    values = torch.rand(1000, 16, generator=torch.Generator().manual_seed(0))
    values[7, 3] = 100.0
    watched = Watched({"prefix.layers.0.out": seen(values)}, {})
    cut = input_ranges(watched, "percentile", 99.9)["prefix.layers.0.out"]
    assert 0.99 < cut.amax <= 1.01
    assert max(cut.channel_amax) == cut.amax
    assert input_ranges(watched, "max", 100.0)["prefix.layers.0.out"].amax == 100.0
    report = outliers(watched, 99.9)["prefix.layers.0.out"]
    assert report["worst_channels"][0] == [3, 100.0]
    assert report["ratio"] == pytest.approx(100, rel=0.02)
    assert report["amax"] == 100.0


def test_mostly_zeros_have_a_range_all_the_same() -> None:
    values = torch.zeros(100, 16)
    values[0, 0] = 2.0
    assert input_ranges(Watched({"a": seen(values)}, {}), "percentile", 90.0)["a"].amax == 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(3, 4), "its input is always 0"),
        (torch.full((3, 4), 0.5), "has the one magnitude 0.5 only"),
        (torch.tensor([[1.0, math.nan]]), "NaN or infinite"),
        (torch.tensor([[1.0, math.inf]]), "NaN or infinite"),
        (torch.zeros(0, 4), "was never computed"),
    ],
)
def test_tensors_that_cannot_be_calibrated(values: torch.Tensor, message: str) -> None:
    magnitudes = seen(values) if values.numel() else Magnitudes.empty(4, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"1 products cannot be calibrated: x.*{message}"):
        input_ranges(Watched({"x": magnitudes}, {}), "max", 100.0)


def test_a_broken_checkpoint_is_found_while_calibrating() -> None:
    model = hash_model(CONFIG, 7, torch.float32)
    with torch.no_grad():
        model.vlm.blocks[0].self_attn.v_proj.weight.zero_()
    with pytest.raises(ValueError, match=r"prefix\.layers\.0\.out: its input is always 0"):
        input_ranges(watch(model, batches(1), 1), "max", 100.0)


def test_nothing_to_look_at_is_said() -> None:
    with pytest.raises(ValueError, match="no observations to calibrate with"):
        calibrate(MODEL, [], robot="libero", source="nowhere")


@pytest.mark.gpu
def test_a_gpu_sees_what_the_cpu_sees() -> None:
    there = input_ranges(watch(hashed(dtype=torch.float32).cuda(), batches(2), 4), "percentile", 99.9)
    here = input_ranges(WATCHED, "percentile", 99.9)
    for product, found in here.items():
        assert there[product].amax == pytest.approx(found.amax, rel=0.02), product


def test_synthetic_observations_are_the_same_each_time() -> None:
    first, second = (list(synthetic_batches(CONFIG, 2, seed=3)) for _ in range(2))
    assert all(torch.equal(a[0].images, b[0].images) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][0].images, first[1][0].images)
    for inputs, _ in first:
        inputs.check(CONFIG)
