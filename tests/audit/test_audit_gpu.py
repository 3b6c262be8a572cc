"""The audit of what runs on a GPU only; `make test-gpu`."""

from typing import Any

import pytest
import torch
from audit_support import config_of, sample

from turbopi.audit.checks import Told
from turbopi.audit.golden import hash_model
from turbopi.audit.graph import ReferenceGraph
from turbopi.audit.session import AuditOptions, audit
from turbopi.audit.subjects import SubjectName, make_pair
from turbopi.audit.switches import coarse_switches, heal
from turbopi.audit.turbo import TurboSubject
from turbopi.engine import precision_dtype

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["pi05-tiny", "pi0-tiny"])
@pytest.mark.parametrize(
    ("engine", "precision"), [("turbo", "bf16"), ("turbo", "fp32"), ("graphed", "bf16"), ("eager", "bf16")]
)
def test_right_engines_are_within_budget(engine: str, precision: Any, kind: str) -> None:
    config = config_of(kind)
    reference = hash_model(config, 7, torch.float32, "cuda")
    model = hash_model(config, 7, precision_dtype(precision), "cuda")
    pair = make_pair(SubjectName(engine, precision), model, reference)
    results = audit(pair, reference, [sample(config), sample(config, 1)], AuditOptions(switches=False))
    assert results["first_divergence"] is None
    assert [check for check in results["checks"] if check["passed"] is False] == []
    if engine == "turbo":
        assert sum(check["name"].startswith("deployed, ") for check in results["checks"]) == 4
        off = results["deployed"]["actions_error"]
        assert off <= 2 * max(results["actions"]["plain"], 1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_stage_that_tells_nothing_has_the_same_bits_as_a_graph(precision: Any) -> None:
    config = config_of("pi05-small")
    reference = hash_model(config, 7, torch.float32, "cuda")
    model = hash_model(config, 7, precision_dtype(precision), "cuda")
    candidate = make_pair(SubjectName("turbo", precision), model, reference).candidate
    assert isinstance(candidate, TurboSubject)
    graph, told = ReferenceGraph(reference, sample(config)), list[str]()
    expected = candidate.run(graph.sample, lambda name, value: told.append(name))
    for wanted in ("nothing", "vision.cam0.layers.1.out", "prefix.layers.2.v", "cache.layers.1.k", "step1.x_t"):
        assert torch.equal(candidate.run(graph.sample, Told([wanted])), expected)
    assert torch.equal(candidate.run(sample(config, 1), Told()), candidate.run(sample(config, 1), lambda *_: None))
    layers = [switch for switch in coarse_switches(told) if switch.kind == "layer"]
    _, found = heal(candidate, graph, layers)
    assert all(healing.error > 0 for healing in found)
