import dataclasses

import pytest
import torch

from turbopi import preset
from turbopi.audit.golden import hash_model
from turbopi.bench.roofline import Ceilings, Cost, against_ceilings, denoise_cost, least_ms, tick_costs, vision_cost
from turbopi.bench.workloads import WORKLOADS, Workload, observation, workload
from turbopi.model.numerics import parameter_dtype

H200 = Ceilings(flops_per_s=790e12, bytes_per_s=4.2e12)


def test_the_published_speed_of_light() -> None:
    """PEERS.md: 0.5 + 2.7 + 1.5 = 4.7 ms for two views, 40 prompt tokens and ten actions, on an H200 in bf16."""
    config = WORKLOADS["libero"].fit(preset("pi05"))
    costs = tick_costs(config, WORKLOADS["libero"], 1, 2)
    least = {stage: least_ms(cost, H200) for stage, cost in costs.items()}
    assert least["encode_images"] == pytest.approx(0.5, abs=0.06)
    assert least["prefill"] == pytest.approx(2.7, abs=0.1)
    assert least["denoise"] == pytest.approx(1.5, abs=0.06)
    assert sum(least.values()) == pytest.approx(4.7, abs=0.15)


@pytest.mark.parametrize("kind", ["pi0-tiny", "pi05-tiny"])
@pytest.mark.parametrize("element", [2, 4])
def test_weight_bytes_are_the_models(kind: str, element: int) -> None:
    """Counted from the configuration and from the parameters themselves."""
    config = preset(kind)
    dtype = {2: torch.bfloat16, 4: torch.float32}[element]
    model = hash_model(config, 0, torch.float32)
    last = config.vlm.depth - 1
    skipped = tuple(f"vlm.layers.{last}.{name}" for name in ("mlp", "self_attn.q_proj", "self_attn.o_proj"))
    counted = dict.fromkeys(("encode_images", "prefill", "denoise"), 0)
    for name, parameter in model.named_parameters():
        stage = {"vision": "encode_images", "projector": "encode_images", "vlm": "prefill"}.get(
            name.split(".")[0], "denoise"
        )
        avoidable = "norm" in name or name.endswith("bias") or "embed_tokens" in name or name.startswith(skipped)
        precomputed = name.startswith(("time_mlp", "action_time_mlp_in", "state_proj"))
        if not avoidable and not precomputed:
            counted[stage] += parameter.numel() * parameter_dtype(name, "exact", dtype).itemsize
    costs = tick_costs(config, Workload("w", 2, 10, config.horizon, steps=1), 1, element)
    assert {stage: int(cost.weight_bytes) for stage, cost in costs.items()} == counted


def test_fewer_bits_are_the_weights_of_layers_only() -> None:
    config = preset("pi05-tiny")
    shape = Workload("w", 2, 10, config.horizon, steps=1)
    half, narrow = (tick_costs(config, shape, 1, 2, weight=weight) for weight in (None, 1))
    for stage, cost in half.items():
        assert narrow[stage].weight_bytes < cost.weight_bytes
        assert narrow[stage].data_bytes == cost.data_bytes
        assert narrow[stage].flops == cost.flops
    assert narrow["prefill"].weight_bytes == half["prefill"].weight_bytes / 2


def test_arithmetic_by_hand() -> None:
    config = preset("pi05-tiny")
    vision = config.vision
    cost = vision_cost(config, 1, 4)
    tokens, width = 16, 96
    layer = 4 * width * width + 2 * width * vision.mlp_dim
    products = tokens * (3 * 14 * 14 * width + 2 * layer + width * 128) + 2 * 2 * tokens * tokens * width
    assert cost.flops == 2 * products
    assert vision_cost(config, 0, 4).bytes == 0


def test_weights_on_the_chip_are_read_once() -> None:
    config = preset("pi05-small")
    far = denoise_cost(config, 1, 100, 10, 2, cache_bytes=0)
    near = denoise_cost(config, 1, 100, 10, 2, cache_bytes=50e6)
    assert far.weight_bytes == pytest.approx(10 * near.weight_bytes)
    assert far.flops == near.flops


def test_work_grows_with_batch_and_weights_do_not() -> None:
    config = WORKLOADS["libero"].fit(preset("pi05"))
    one, eight = (tick_costs(config, WORKLOADS["libero"], batch, 2) for batch in (1, 8))
    for stage in one:
        assert eight[stage].flops == 8 * one[stage].flops
        assert eight[stage].weight_bytes == one[stage].weight_bytes


def test_against_ceilings() -> None:
    rows = against_ceilings({"prefill": Cost(1e12, 1e9, 1e9)}, {"prefill": 4.0}, Ceilings(1e15, 1e12))
    row = rows["prefill"]
    assert row["least_ms"] == 2.0
    assert row["times_the_floor"] == 2.0
    assert row["tflop_per_s"] == 250
    assert row["of_bytes_ceiling"] == 0.5


def test_workloads() -> None:
    config = preset("pi05-tiny")
    full = WORKLOADS["full"]
    fitted = full.fit(config)
    assert (fitted.horizon, fitted.max_tokens) == (50, 200)
    assert full.prefix_tokens(preset("pi05")) == 968
    inputs, noise = observation(fitted, full, batch=2)
    inputs.check(fitted)
    assert noise.shape == (2, 50, 32)
    assert inputs.token_mask.sum(dim=1).tolist() == [200, 200]
    assert inputs.image_mask.all()
    with pytest.raises(ValueError, match="unknown workload 'maze'; known: libero, droid, full"):
        workload("maze")
    with pytest.raises(ValueError, match="3 views, the model has 2 camera slots"):
        full.fit(dataclasses.replace(config, cameras=2))
    with pytest.raises(ValueError, match="needs cameras or prompt tokens"):
        Workload("w", 0, 0, 10)
    with pytest.raises(ValueError, match="at least 1"):
        Workload("w", 1, 0, 0)
