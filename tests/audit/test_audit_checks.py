from dataclasses import replace

import pytest
import torch
from audit_support import config_of, eager, graph_of, sample, turbo
from torch import Tensor

from turbopi.audit.checks import Check, not_finite, ranges, run_checks
from turbopi.audit.measure import record
from turbopi.audit.probe import ModuleSubject
from turbopi.audit.sample import Sample, Subject, Visit
from turbopi.audit.turbo import TurboSubject

CONFIG = config_of("pi05-tiny")
NAMES = {
    "determinism": "determinism: the same frame twice",
    "history": "no memory: the frame again, after another one",
    "mask": "mask: other padding and missing cameras' pictures",
    "slots": "cameras: each slot encodes its own picture",
    "order": "cameras: their order reaches the actions",
    "prompt": "positions: the order of the prompt reaches the actions",
    "gap": "positions: a gap in the prompt does not count",
}


def asked(subject: Subject) -> dict[str, Check]:
    return {c.name: c for c in run_checks(subject, CONFIG, sample(CONFIG), sample(CONFIG, 1), 1e-6)}


class Broken:
    """A subject with one mistake around a right one."""

    name, granularity, wide_logits, allowed = "broken:fp32", "stages", False, 4.0

    def __init__(self, mistake: str) -> None:
        self.mistake, self.runs, self.inner = mistake, 0, ModuleSubject("eager:fp32", eager(CONFIG))
        self.last: Tensor | None = None

    def run(self, given: Sample, visit: Visit) -> Tensor:
        x = given.inputs
        self.runs += 1
        if self.mistake == "slots":
            return self.inner.run(given, lambda n, t: visit(n, t + float(n == "vision.cam1.tokens")))
        if self.mistake == "order":
            given = replace(given, inputs=replace(x, images=x.images.sort(dim=1).values))
        if self.mistake == "prompt":
            given = replace(given, inputs=replace(x, tokens=x.tokens.sort(dim=1).values))
        actions = self.inner.run(given, visit)
        if self.mistake == "determinism":
            return actions + 1e-6 * self.runs
        if self.mistake == "mask":
            return actions + 1e-6 * float(x.tokens.float().mean())
        if self.mistake == "gap":
            return actions * float(x.tokens.shape[1])
        if self.mistake == "history":
            before, self.last = self.last, x.state
            return actions if before is None or torch.equal(before, x.state) else actions + 1e-3
        return actions


@pytest.mark.parametrize("engine", ["eager", "turbo"])
def test_right_engines_pass(engine: str) -> None:
    right: Subject = ModuleSubject("eager:fp32", eager(CONFIG))
    if engine == "turbo":
        right = TurboSubject("turbo-twins:fp32", turbo(CONFIG), graph_of(CONFIG).model)
    assert {c.name: c.passed for c in asked(right).values()} == dict.fromkeys(NAMES.values(), True)


@pytest.mark.parametrize("mistake", NAMES)
def test_a_mistake_fails_its_check(mistake: str) -> None:
    assert asked(Broken(mistake))[NAMES[mistake]].passed is False


def test_what_cannot_be_asked_is_not_passed() -> None:
    x = sample(CONFIG)
    full = replace(
        x,
        inputs=replace(
            x.inputs,
            tokens=x.inputs.tokens[:, :1],
            token_mask=x.inputs.token_mask[:, :1],
            image_mask=torch.tensor([[True, False, False]]),
        ),
    )
    found = {c.name: c.passed for c in run_checks(ModuleSubject("e", eager(CONFIG)), CONFIG, full, None, 1e-6)}
    assert [found[NAMES[n]] for n in ("history", "slots", "order", "prompt", "gap")] == [None] * 5


def test_not_a_number_is_found_and_named() -> None:
    told = {"step0.x_t": torch.ones(3), "step0.v_t": torch.tensor([1.0, float("nan")]), "actions": torch.ones(1)}
    check = not_finite(told)
    assert (check.passed, check.detail) == (False, "1 tensors, the first is step0.v_t")
    assert not_finite({"actions": torch.ones(2)}).passed


def test_ranges_say_what_a_format_cannot_hold() -> None:
    told = {
        "step0.layers.0.hidden": torch.tensor([1.0, -70_000.0]),
        "step1.layers.0.hidden": torch.tensor([1e-6, 2.0]),
        "prefix.embs": torch.tensor([3.0, 4.0]),
        "step0.layers.0.logits": torch.tensor([-2e38]),
    }
    rows = {row["tensor"]: row for row in ranges(told)}
    assert set(rows) == {"expert.layers.0.hidden", "prefix.embs"}
    hidden = rows["expert.layers.0.hidden"]
    assert (hidden["amax"], hidden["fp16_saturates"], hidden["bf16_saturates"]) == (70_000.0, True, False)
    # One scale for each step: 1e-6 is too small beside 2, all else survives.
    assert hidden["e4m3_lost"] == 0.25
    assert (rows["prefix.embs"]["crest"], rows["prefix.embs"]["e4m3_saturates"]) == (
        pytest.approx(4 / 12.5**0.5),
        False,
    )


def test_a_run_records_everything_that_checks_read() -> None:
    graph = graph_of(CONFIG)
    told = record(ModuleSubject("eager:fp32", eager(CONFIG)), graph.sample, graph)
    assert not_finite(told).passed
    assert all(row["amax"] > 0 for row in ranges(told))
