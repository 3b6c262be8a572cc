"""The denoise loop for batches of many rows, on a CPU with twins, against the reference and the loop it refines."""

import pytest
import torch
from captured_support import model, observation
from fp8_support import calibrated, quantisation_of
from test_turbo_fused import layers_of_full_size
from turbo_support import STAGE_TOLERANCE, relative, twins

from turbopi.engine import base, create_engine
from turbopi.engine.turbo import TurboEngine
from turbopi.engine.turbo.many import ManyRowsLoop, many_obstacles
from turbopi.engine.turbo.ops import twin_ops

TWO = (True, True, False)


def many(engine: TurboEngine, batch: int) -> TurboEngine:
    """The engine with this loop for a batch size, whatever its rule says."""
    engine._loops[batch] = ManyRowsLoop(engine.config, engine._weights, engine._ops, engine._schedules)
    return engine


@pytest.mark.parametrize("lengths", [[9], [3, 20, 33]])
@torch.no_grad()
def test_it_is_the_reference(lengths: list[int]) -> None:
    reference = model("pi05-small")
    x, noise = observation(reference.config, lengths, [TWO] * len(lengths))
    engine = twins(reference)
    before = engine.describe()["weight_bytes"]["float32"]
    actions = many(engine, len(lengths)).sample_actions(x, noise, 3)
    assert relative(actions, reference.sample_actions(x, noise, 3)) <= STAGE_TOLERANCE
    told = engine.describe()
    assert told["denoise_loop"] == {str(len(lengths)): "many"}
    expert = reference.config.expert
    assert told["weight_bytes"]["float32"] - before == 4 * expert.depth * 2 * expert.mlp_dim * expert.width


@torch.no_grad()
def test_with_products_in_fp8_it_is_the_other_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between float32 streams. Sums in another order now and then round a value to the other side, so one of five."""
    monkeypatch.setitem(base.DTYPES, "fp8", torch.float32)
    reference = calibrated("pi05-small", torch.float32, bare=True)
    engine = TurboEngine(reference, "fp8", twin_ops(), None, quantisation=quantisation_of(reference, "fp8", {}))
    other = many(engine.apart(None), 2)
    errors = []
    for seed in range(5):
        x, noise = observation(reference.config, [9, 5], [TWO, TWO], seed=seed)
        errors.append(relative(other.sample_actions(x, noise, 1), engine.sample_actions(x, noise, 1)))
    assert min(errors) <= STAGE_TOLERANCE


def test_a_rule_says_what_it_runs() -> None:
    engine = twins(model("pi05-tiny"))
    few = many_obstacles(engine.config, engine._weights, 1)
    assert few[0].startswith(f"{engine.config.suffix_tokens} suffix rows are fewer than 200")
    for words in ("weights in torch.float32", "no entry", "not a multiple of"):
        assert any(words in one for one in few), words
    state = twins(model("pi0-tiny"))
    assert "a state token" in many_obstacles(state.config, state._weights, 100)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@torch.no_grad()
def test_layers_of_full_size_on_a_gpu(precision: base.Precision) -> None:
    """As near the truth as the loop that goes kernel by kernel, and with the same bits again."""
    lengths = [200, 9, 33, 100]
    exact, rounded = (layers_of_full_size("pi05", 50, dtype) for dtype in (torch.float32, torch.bfloat16))
    x, noise = observation(exact.config, lengths, [(True, True, True)] * len(lengths))
    truth = exact.sample_actions(x.to("cuda"), noise.cuda(), 10)
    quantisation = None if precision == "bf16" else quantisation_of(rounded, "fp8", {})
    engine = create_engine("turbo", rounded, precision, quantisation)
    assert isinstance(engine, TurboEngine)
    if found := many_obstacles(engine.config, engine._weights, len(lengths)):
        pytest.skip("; ".join(found))
    by_kernel = engine.apart(None, first_loop="rows").sample_actions(x, noise, 10)
    actions = engine.sample_actions(x, noise, 10)
    assert engine.describe()["denoise_loop"] == {"4": "many"}
    assert relative(actions, truth) <= 1.3 * relative(by_kernel, truth)
    assert all(torch.equal(engine.sample_actions(x, noise, 10), actions) for _ in range(5))
