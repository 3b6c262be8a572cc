"""The audit of what runs on a GPU only; `make test-gpu`."""

from typing import Any

import pytest
import torch
from audit_support import config_of, sample

from turbopi.audit.golden import hash_model
from turbopi.audit.session import AuditOptions, audit
from turbopi.audit.subjects import SubjectName, make_pair
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
        off = results["deployed"]["actions_error"]
        assert off <= 2 * max(results["actions"]["plain"], 1e-6)
