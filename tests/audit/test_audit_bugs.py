from pathlib import Path
from typing import Any

import pytest
import torch
from audit_support import STEPS  # its import puts benchmarks/ on the path

from turbopi.audit.measure import first_over
from turbopi.audit.switches import Switch, coarse_switches, heal, healer, over_budget

from audit_bugs import BUGS, Bug, SourceEdit, edited_model  # isort: skip
from audit_planted import make_case, sizes, weights  # isort: skip

NAMES = [bug.name for bug in BUGS]


def test_there_are_twelve() -> None:
    assert len(set(NAMES)) == 12


@pytest.mark.parametrize(("engine", "precision"), [("eager", "fp32"), ("turbo-twins", "bf16")])
@pytest.mark.parametrize("bug", BUGS, ids=NAMES)
def test_the_audit_names_the_right_place(bug: Bug, engine: str, precision: Any, tmp_path: Path) -> None:
    case = make_case(bug, engine, precision, STEPS, tmp_path)
    found = first_over(case.readings())
    assert found is not None
    assert found.name == case.place


@pytest.mark.parametrize("bug", [BUGS[4], BUGS[7], BUGS[11]], ids=lambda bug: bug.name)
def test_bugs_of_the_size_of_bf16_are_found_in_bf16(bug: Bug, tmp_path: Path) -> None:
    case = make_case(bug, "eager", "bf16", STEPS, tmp_path)
    found = first_over(case.readings())
    assert found is not None
    assert found.name == case.place


def test_the_switch_that_heals_is_the_broken_part(tmp_path: Path) -> None:
    stale = next(bug for bug in BUGS if bug.needs_earlier_frame)
    case = make_case(stale, "turbo-twins", "fp32", STEPS, tmp_path)
    readings = case.readings()
    switches = coarse_switches([reading.name for reading in readings])
    before, found = heal(case.candidate, case.graph, switches)
    best = healer(found, before, readings[-1].plain["free"].rms)
    assert before > 1e-3
    assert best is not None
    assert best.switch.name == "cache layer 1"
    by_name = {healing.switch.name: healing.healed for healing in found}
    assert by_name["prefill"] > 0.99 > 0.5 > by_name["encode_images"]


def test_single_tensors_over_budget_are_switched_in_every_step(tmp_path: Path) -> None:
    scales = BUGS[8]
    case = make_case(scales, "eager", "fp32", STEPS, tmp_path)
    first = over_budget(case.readings())[0]
    assert isinstance(first, Switch)
    assert first.name == "layers.0.norm1 of every step"
    assert first.names == {f"step{step}.layers.0.norm1" for step in range(STEPS)}


def test_an_edit_that_no_longer_fits_says_so(tmp_path: Path) -> None:
    model = weights(sizes(None, "eager"), torch.float32, "candidate")
    with pytest.raises(ValueError, match="0 times, expected once"):
        edited_model(model, SourceEdit("gemma.py", "no such line", ""), tmp_path)
