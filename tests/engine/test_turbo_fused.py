"""The assembly of the fused denoise loop, on a CPU with twins, against the reference."""

import dataclasses

import pytest
import torch
from captured_support import model, observation
from fp8_support import calibrated, quantisation_of
from turbo_support import STAGE_TOLERANCE, relative, twins

from turbopi import Pi0, preset
from turbopi.engine import base, create_engine
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo.buffers import MOST_FUSED_ROWS
from turbopi.engine.turbo.fused import Cuts, FusedLoop, fused_obstacles
from turbopi.engine.turbo.ops import twin_ops

ONE, TWO = (True, False, False), (True, True, False)


def fused(engine: TurboEngine, batch: int, cuts: Cuts | None = None) -> TurboEngine:
    """The engine with this loop for a batch size, whatever its rule says."""
    loop = FusedLoop(engine.config, engine._weights, engine._ops, engine._schedules)
    if cuts is not None:
        loop.bf16 = loop.fp8 = cuts
    engine._loops[batch] = loop
    return engine


@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-tiny", "pi0-small", "pi05-small"])
@pytest.mark.parametrize("batch", [([9], [TWO]), ([3, 20], [ONE, TWO])], ids=["one", "ragged"])
@torch.no_grad()
def test_it_is_the_reference(name: str, batch: tuple[list[int], list[tuple[bool, ...]]]) -> None:
    reference = model(name)
    x, noise = observation(reference.config, *batch)
    engine = fused(twins(reference), len(batch[0]))
    actions = engine.sample_actions(x, noise, 3)
    assert relative(actions, reference.sample_actions(x, noise, 3)) <= STAGE_TOLERANCE
    told = engine.describe()
    assert told["denoise_loop"] == {str(len(batch[0])): "fused"}
    assert "weights in torch.float32" in told["suffix_attention"][str(len(batch[0]))]


@pytest.mark.parametrize("cuts", [Cuts(1, 1, 1), Cuts(9, 2, 8)], ids=str)
@torch.no_grad()
def test_in_any_number_of_parts(cuts: Cuts) -> None:
    reference = model("pi05-tiny")
    x, noise = observation(reference.config, [9])
    actions = fused(twins(reference), 1, cuts).sample_actions(x, noise, 2)
    assert relative(actions, reference.sample_actions(x, noise, 2)) <= STAGE_TOLERANCE


@pytest.mark.parametrize("name", ["pi0-small", "pi05-small"])
@torch.no_grad()
def test_in_bfloat16_it_errs_as_little_as_the_reference(name: str) -> None:
    exact, rounded = model(name), model(name, dtype=torch.bfloat16)
    x, noise = observation(exact.config, [9, 33])
    truth = exact.sample_actions(x, noise, 10)
    engine = fused(TurboEngine(rounded, "bf16", twin_ops(), None), 2)
    ours = engine.sample_actions(x, noise, 10)
    assert relative(ours, truth) <= 1.2 * relative(rounded.sample_actions(x, noise, 10), truth)


PLANS = {
    "all": ("fp8", {}),
    "one layer not": ("fp8", {"expert.layers.1.*": "bf16"}),
    "qkv and down not": ("fp8", {"expert.layers.*.qkv": "bf16", "expert.layers.*.down": "bf16"}),
    "out and gate_up": ("bf16", {"expert.layers.*.out": "fp8", "expert.layers.*.gate_up": "fp8"}),
}


@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-tiny"])
@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_with_products_in_fp8_it_is_the_other_loop(name: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between float32 streams. Sums in another order now and then round a value to the other side, so one of five."""
    monkeypatch.setitem(base.DTYPES, "fp8", torch.float32)
    reference = calibrated(name, torch.float32, bare=True)
    engine = TurboEngine(reference, "fp8", twin_ops(), None, quantisation=quantisation_of(reference, *PLANS[plan]))
    other = fused(engine.apart(None), 1)
    errors = []
    for seed in range(5):
        x, noise = observation(reference.config, [9], seed=seed)
        errors.append(relative(other.sample_actions(x, noise, 1), engine.sample_actions(x, noise, 1)))
    assert min(errors) <= STAGE_TOLERANCE
    told = other.describe()
    assert told["denoise_loop"] == {"1": "fused"}
    assert "weights in torch.float32" in told["suffix_attention"]["1"]


def test_a_rule_says_what_it_runs() -> None:
    reference = model("pi05-tiny", dtype=torch.bfloat16)
    engine = TurboEngine(reference, "bf16", twin_ops(), None)
    batch = MOST_FUSED_ROWS // reference.config.suffix_tokens
    here = fused_obstacles(reference.config, engine._weights, batch)
    assert [words.partition(",")[0] for words in here] == ["no GPU of compute capability 9.0"]
    rows = (batch + 1) * reference.config.suffix_tokens
    too_many, *rest = fused_obstacles(reference.config, engine._weights, batch + 1)
    assert (too_many.partition(" are")[0], rest) == (f"{rows} suffix rows", here)
    exact = twins(model("pi05-tiny"))
    assert "weights in torch.float32" in fused_obstacles(exact.config, exact._weights, 1)
    x, noise = observation(exact.config, [9])
    exact.sample_actions(x, noise, 1)
    assert "torch.float32" in exact.describe()["not_fused"]["1"]


def layers_of_full_size(kind: str, horizon: int, dtype: torch.dtype) -> Pi0:
    """A few of them, so that the reference is quick."""
    config, small = preset(kind), preset(f"{kind}-small")
    changes = {
        "vision": small.vision,
        "vlm": dataclasses.replace(config.vlm, width=256, depth=3, mlp_dim=512),
        "expert": dataclasses.replace(config.expert, depth=3),
        "vocab_size": 1024,
        "horizon": horizon,
    }
    return model(kind, device="cuda", dtype=dtype, **changes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "horizon", "lengths"),
    [("pi05", 50, [200]), ("pi05", 50, [9, 200]), ("pi05", 10, [9, 200, 33]), ("pi0", 50, [40]), ("pi0", 10, [7])],
)
@torch.no_grad()
def test_layers_of_full_size_on_a_gpu(kind: str, horizon: int, lengths: list[int]) -> None:
    """Near the truth like plain bf16 (few observations, so chance gets some room), and with the same bits again."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the fused loop needs compute capability 9.0")
    exact, rounded = (layers_of_full_size(kind, horizon, dtype) for dtype in (torch.float32, torch.bfloat16))
    x, noise = observation(exact.config, lengths, [(True, True, True)] * len(lengths))
    truth = exact.sample_actions(x.to("cuda"), noise.cuda(), 10)
    plain = relative(rounded.sample_actions(x.to("cuda"), noise.cuda(), 10), truth)
    engine = create_engine("turbo", rounded, "bf16")
    assert isinstance(engine, TurboEngine)
    actions = engine.sample_actions(x, noise, 10)
    assert engine.describe()["denoise_loop"] == {str(len(lengths)): "fused"}
    assert engine.describe()["suffix_attention"] == {str(len(lengths)): "cluster"}
    assert relative(actions, truth) <= 1.5 * plain
    assert all(torch.equal(engine.sample_actions(x, noise, 10), actions) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "horizon", "lengths", "plan"),
    [
        ("pi05", 50, [200], "all"),
        ("pi05", 50, [9, 200], "all"),
        ("pi05", 10, [9, 200, 33], "qkv and down not"),
        ("pi0", 50, [40], "all"),
    ],
)
@torch.no_grad()
def test_layers_of_full_size_in_fp8_on_a_gpu(kind: str, horizon: int, lengths: list[int], plan: str) -> None:
    """As near the truth as the loop that goes kernel by kernel, and with the same bits again."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the fused loop needs compute capability 9.0")
    exact, rounded = (layers_of_full_size(kind, horizon, dtype) for dtype in (torch.float32, torch.bfloat16))
    x, noise = observation(exact.config, lengths, [(True, True, True)] * len(lengths))
    truth = exact.sample_actions(x.to("cuda"), noise.cuda(), 10)
    engine = create_engine("turbo", rounded, "fp8", quantisation_of(rounded, *PLANS[plan]))
    assert isinstance(engine, TurboEngine)
    by_kernel = engine.apart(None, first_loop="rows").sample_actions(x, noise, 10)
    actions = engine.sample_actions(x, noise, 10)
    assert engine.describe()["denoise_loop"] == {str(len(lengths)): "fused"}
    assert engine.describe()["suffix_attention"] == {str(len(lengths)): "cluster"}
    assert relative(actions, truth) <= 1.3 * relative(by_kernel, truth)
    assert all(torch.equal(engine.sample_actions(x, noise, 10), actions) for _ in range(20))
