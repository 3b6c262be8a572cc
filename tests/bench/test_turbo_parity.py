"""benchmarks/turbo_parity.py: the loop stops where it should, and errors are counted where they arise."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbopi import Pi0, preset
from turbopi.audit.golden import hash_model
from turbopi.bench import WORKLOADS
from turbopi.bench.workloads import observation

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import turbo_parity as parity

STEPS = 3
SHAPE = dataclasses.replace(WORKLOADS["libero"], prompt_tokens=5, horizon=4)


def model(dtype: torch.dtype = torch.float32, name: str = "pi05-tiny") -> Pi0:
    return hash_model(SHAPE.fit(preset(name)), 7, dtype)


def sample(reference: Pi0, seed: int = 0) -> parity.Sample:
    return observation(reference.config, SHAPE, 1, seed)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-tiny"])
@torch.no_grad()
def test_in_float32_every_tap_of_turbo_is_the_references(name: str) -> None:
    reference = model(name=name)
    truth = parity.trace(parity.Reference(reference), sample(reference), STEPS)
    turbo = parity.Turbo(reference, STEPS)
    for given in (None, truth):
        found = parity.trace(turbo, sample(reference), STEPS, given)
        assert list(found.taps) == list(truth.taps)
        assert max(relative(found.taps[tap], truth.taps[tap]) for tap in truth.taps) <= 1e-5
    depth = reference.config.vlm.depth
    assert len(truth.taps) == 1 + 2 * depth + STEPS
    x, noise = sample(reference)
    assert torch.equal(truth.taps["x_t after 03"], reference.sample_actions(x, noise, STEPS))


def test_a_schedule_has_no_beginning_longer_than_itself() -> None:
    with pytest.raises(ValueError, match="of 3 steps has no beginning of 4"):
        parity.FirstSteps(model(), 3)(4)


class Disturbed(parity.Reference):
    """Whose prefill is 1 % off."""

    def __init__(self, reference: Pi0) -> None:
        super().__init__(reference)
        prefill = self.engine.prefill

        def off(*inputs: Tensor) -> parity.PrefixCache:
            cache = prefill(*inputs)
            return dataclasses.replace(cache, keys=tuple(1.01 * keys for keys in cache.keys))

        self.engine.prefill = off  # type: ignore[method-assign]


def test_an_error_is_seen_where_it_arises_and_after_it() -> None:
    reference = model()
    subjects = {"plain": parity.Reference(model(torch.bfloat16)), "turbo": Disturbed(reference)}
    models = parity.Models({"exact": parity.Reference(reference)}, subjects)
    samples = [sample(reference, seed) for seed in range(2)]
    lines = {(line["chain"], line["tap"]): line for line in parity.compare(models, samples, STEPS)["exact"]}
    for chain in ("tick", "stage"):
        assert lines[chain, "image_tokens"]["turbo"] == 0
        assert lines[chain, "k00"]["turbo"] == pytest.approx(0.01, rel=1e-3)
        assert lines[chain, "v02"]["turbo"] == 0
    assert lines["tick", "x_t after 03"]["turbo"] > 0
    assert lines["stage", "x_t after 03"]["turbo"] == 0
    assert lines["tick", "v02"]["plain"] > lines["stage", "v02"]["plain"] > 0


def test_what_is_not_a_number_is_the_worst() -> None:
    lines = [{"tap": "a", "ratio": 3.0}, {"tap": "b", "ratio": math.nan}]
    assert parity.worst({"m": {"errors": {"exact": lines}}})["tap"] == "b"


def test_weights_that_are_bf16_have_one_truth() -> None:
    rounded = model(torch.bfloat16)
    assert list(parity.make_models(model(), rounded, STEPS).truths) == ["exact", "arithmetic"]
    truths = parity.make_models(model(), rounded, STEPS).truths
    held = truths["arithmetic"].engine.model
    assert list(parity.make_models(held, rounded, STEPS).truths) == ["exact"]


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "parity.json"
    arguments = ["--presets", "pi05-tiny", "--samples", "2", "--steps", "2", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["turbo_parity.py", *arguments])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    status = parity.main()
    results = json.loads(out.read_text())["results"]
    assert status == (results["worst"]["ratio"] > parity.ALLOWED)
    assert list(results["cases"]) == ["pi05-tiny", "pi05-libero-small"]
    assert results["cases"]["pi05-tiny"]["turbo"]["ops"] == "twins"
    assert results["cases"]["pi05-libero-small"]["prefix_tokens"][0] > 128
    for case in results["cases"].values():
        for lines in case["errors"].values():
            assert all(0 < line["ratio"] < 2 for line in lines)
    assert "largest ratio of turbo's error to plain's" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu_turbo_errs_as_little_as_plain_pytorch() -> None:
    options = parity.Options(samples=4)
    models, samples = parity.hash_case("pi05-small", options, torch.device("cuda"))
    errors = parity.compare(models, samples, options.steps)
    assert parity.worst({"pi05-small": {"errors": errors}})["ratio"] <= parity.ALLOWED
