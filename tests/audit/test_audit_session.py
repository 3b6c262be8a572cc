import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_support import STEPS, config_of, graph_of, sample, weights

from turbopi.audit import closed_loop
from turbopi.audit.closed_loop import NO_VERDICT, ClosedLoop, play
from turbopi.audit.graph import ReferenceGraph
from turbopi.audit.load import Checkpointed, reference_model
from turbopi.audit.plan import suggest_plan
from turbopi.audit.sample import Sample
from turbopi.audit.session import AuditOptions, audit
from turbopi.audit.subjects import Pair, StageSubject, SubjectName, make_pair
from turbopi.checkpoint import init_checkpoint
from turbopi.cli.audit import is_clean, summary
from turbopi.config import GemmaConfig, VisionConfig, preset
from turbopi.errors import NonFiniteActionsError
from turbopi.model import ModelInput, Pi0
from turbopi.quant import PrecisionPlan
from turbopi.sim import sources

from audit_bugs import BUGS, edited_model  # isort: skip
from turbopi.audit.probe import ModuleSubject  # isort: skip
from turbopi.engine import EagerEngine  # isort: skip

CONFIG = config_of("pi05-tiny")


def pair_of(name: SubjectName, reference: Pi0) -> Pair:
    dtype = torch.float32 if name.precision == "fp32" else torch.bfloat16
    return make_pair(name, weights(CONFIG, dtype), reference)


def test_a_clean_audit_says_so_and_makes_no_verdict_on_tasks() -> None:
    reference = graph_of(CONFIG).model
    pair = pair_of(SubjectName("turbo-twins", "bf16"), reference)
    results = audit(pair, reference, [sample(CONFIG), sample(CONFIG, 1)], AuditOptions(switches=False))
    assert results["first_divergence"] is None
    assert results["over_budget"] == 0
    assert results["closed_loop"] == {"played": False, "verdict": NO_VERDICT}
    assert all(check["passed"] for check in results["checks"])
    assert results["deployed"]["actions_error"] == pytest.approx(results["actions"]["candidate"], rel=1e-3)
    tensors = results["tensors"]
    assert {len(column) for column in tensors.values()} == {len(tensors["name"])}
    assert set(results["amplification"]) >= {"actions", "prefix.layers.1.stream", "step1.layers.1.stream"}
    assert "safe" not in json.dumps(results).lower()


@pytest.mark.parametrize("wrong", ["zeros", "NaN", "refused", "twice the error"])
def test_a_deployed_tick_that_is_wrong_fails_the_audit(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = graph_of(CONFIG).model
    pair = pair_of(SubjectName("turbo-twins", "bf16"), reference)
    assert pair.deployed is not None
    right = pair.deployed.sample_actions

    def deployed(*inputs: Any) -> torch.Tensor:
        if wrong == "refused":
            raise NonFiniteActionsError("NaN")
        if wrong == "twice the error":
            truth = graph_of(CONFIG).truth
            return truth + 3 * (right(*inputs) - truth)
        return right(*inputs) * (0.0 if wrong == "zeros" else float("nan"))

    monkeypatch.setattr(pair.deployed, "sample_actions", deployed)
    results = audit(pair, reference, [sample(CONFIG)], AuditOptions(switches=False, checks=False))
    assert results["over_budget"] == 0
    assert [check["name"] for check in results["checks"] if not check["passed"]] == ["deployed, the whole tick"]
    assert not is_clean(results)
    assert any("deployed: the whole tick's actions have" in str(line) for line in summary(results))
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize("mistake", ["determinism", "no memory", "mask"])
def test_a_deployed_tick_is_asked_what_needs_no_reference(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = graph_of(CONFIG).model
    pair = pair_of(SubjectName("turbo-twins", "bf16"), reference)
    assert pair.deployed is not None
    right, states = pair.deployed.sample_actions, [sample(CONFIG).inputs.state]

    def deployed(inputs: ModelInput, *rest: Any) -> torch.Tensor:
        states.append(inputs.state)
        moved = {
            "determinism": 1e-6 * len(states),
            "no memory": 1e-6 * float(len(states) > 5 and not torch.equal(states[-1], states[-2])),
            "mask": 1e-6 * float(inputs.tokens.float().mean()),
        }
        return right(inputs, *rest) + moved[mistake]

    monkeypatch.setattr(pair.deployed, "sample_actions", deployed)
    results = audit(pair, reference, [sample(CONFIG), sample(CONFIG, 1)], AuditOptions(switches=False))
    failed = [check["name"] for check in results["checks"] if check["passed"] is False]
    assert any(name.startswith(f"deployed, {mistake}") for name in failed)
    assert all(name.startswith("deployed, ") for name in failed)


def test_a_bug_is_named_with_where_to_look_and_what_heals(tmp_path: Path) -> None:
    reference = graph_of(CONFIG).model
    silu = BUGS[2]
    wrong = edited_model(weights(CONFIG, torch.float32), silu.edit, tmp_path)
    pair = pair_of(SubjectName("eager", "fp32"), reference)
    broken = dataclasses.replace(pair, candidate=ModuleSubject("eager:fp32", EagerEngine(wrong, "fp32")))
    said: list[str] = []
    results = audit(broken, reference, [sample(CONFIG)], AuditOptions(checks=False), said.append)
    found = results["first_divergence"]
    assert (found["tensor"], found["stage"], found["layer"]) == ("prefix.layers.0.hidden", "prefill", 0)
    assert "activation" in found["look_at"]
    assert results["sensitivity"]["healer"] == "mlp"
    kinds = {switch["kind"] for switch in results["sensitivity"]["switches"]}
    assert kinds == {"stage", "group", "tower and group", "layer", "layer and group", "tensor"}
    assert "compare" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_stay_out_of_the_json(value: float, tmp_path: Path) -> None:
    reference = graph_of(CONFIG).model
    model = edited_model(weights(CONFIG, torch.float32), BUGS[2].edit, tmp_path)
    with torch.no_grad():
        model.action_out_proj.bias[0] = value
    pair = dataclasses.replace(
        pair_of(SubjectName("eager", "fp32"), reference),
        candidate=ModuleSubject("eager:fp32", EagerEngine(model, "fp32")),
    )
    results = audit(pair, reference, [sample(CONFIG)], AuditOptions(switches=False))
    assert results["checks"][0]["passed"] is False
    assert results["actions"]["candidate"] is None
    json.dumps(results, allow_nan=False)


def test_a_plan_keeps_what_costs_most() -> None:
    reference = graph_of(CONFIG).model
    pair = pair_of(SubjectName("eager", "w4a16"), reference)
    graph = graph_of(CONFIG)
    found = suggest_plan(pair.candidate, graph, list(graph.names), 0.05, lambda _: None)
    plan = PrecisionPlan.from_dict(found["plan"])
    plan.check(CONFIG)
    errors = found["products"]
    whole = sum(error**2 for error in errors.values())
    assert plan.default == "w4a16"
    assert {p for p, e in errors.items() if e**2 >= 0.05 * whole} == set(plan.exceptions)
    assert found["with_exceptions"] < found["actions_error"]


@pytest.mark.parametrize(
    ("precision", "share", "message"),
    [("bf16", 0.1, "quantises nothing"), ("w8a16", 1.5, "--plan-share must lie between 0 and 1")],
)
def test_plans_that_cannot_be_made(precision: Any, share: float, message: str) -> None:
    reference = graph_of(CONFIG).model
    pair = pair_of(SubjectName("eager", precision), reference)
    with pytest.raises(ValueError, match=message):
        audit(pair, reference, [sample(CONFIG)], AuditOptions(False, False, False, share))
    with pytest.raises(ValueError, match="at least one frame"):
        audit(pair, reference, [], AuditOptions())


def test_both_play_the_same_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[Any] = []
    monkeypatch.setattr("turbopi.audit.closed_loop.evaluate", lambda config, **_: played.append(config))
    monkeypatch.setattr("turbopi.audit.closed_loop.compare", lambda a, b, minimum: {"a": a.name, "b": b.name})
    reference, candidate = (sources.CheckpointSource(Path(name)) for name in ("r", "c"))
    loop = ClosedLoop(reference, candidate, tmp_path, "libero_spatial", 20, workers=2)
    assert play(loop) == {"a": "reference", "b": "candidate", "continued": 0}
    assert [config.source for config in played] == [reference, candidate]
    assert {(config.suite, config.trials, len(config.tasks), config.seed) for config in played} == {
        ("libero_spatial", 2, 10, 0)
    }
    with pytest.raises(ValueError, match="multiple of 10"):
        ClosedLoop(reference, candidate, tmp_path, "libero_spatial", 15)


def test_episodes_that_other_code_played_are_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(config: Any, on_start: Any, on_episode: Any) -> None:
        config.out.mkdir(exist_ok=True)
        lines = (config.out / "episodes.jsonl").read_text().splitlines() if played else []
        on_start(lines)
        on_episode(None)
        (config.out / "episodes.jsonl").write_text("an episode\n" * (len(lines) + 1))

    played, said = False, list[str]()
    monkeypatch.setattr(closed_loop, "evaluate", evaluate)
    monkeypatch.setattr(closed_loop, "compare", lambda a, b, minimum: {})
    source = sources.CheckpointSource(Path("c"))
    loop = ClosedLoop(source, source, tmp_path / "audit.episodes", "libero_spatial", 20)
    assert play(loop) == {"continued": 0}
    played = True
    assert play(loop, said.append) == {"continued": 2}
    assert "candidate: continues 1 episodes played before" in said
    assert "candidate: episode 2 of 20" in said
    monkeypatch.setattr(closed_loop, "code", lambda: {"turbopi": "0.1.0", "files": "mended"})
    with pytest.raises(ValueError, match=r"other code of turbopi played.*remove .*audit\.episodes"):
        play(loop)
    (loop.out / "code.json").unlink()
    with pytest.raises(ValueError, match=r"other code of turbopi played \(unknown, now"):
        closed_loop.check_code(loop.out)


def test_an_edit_of_the_code_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "turbopi" / "audit").mkdir(parents=True)
    (tmp_path / "turbopi" / "kernel.py").write_text("a = 1")
    monkeypatch.setattr(closed_loop, "__file__", str(tmp_path / "turbopi" / "audit" / "closed_loop.py"))
    before = closed_loop.code()
    assert closed_loop.code() == before
    (tmp_path / "turbopi" / "kernel.py").write_text("a = 2")
    assert closed_loop.code() != before


def test_more_than_one_key_head_and_no_camera() -> None:
    """Sizes that no preset has."""
    tower = GemmaConfig(width=64, depth=2, mlp_dim=64, heads=4, kv_heads=2, head_dim=32)
    config = dataclasses.replace(
        preset("pi05-tiny"), vlm=tower, expert=tower, vision=VisionConfig(32, 1, 32, 2, 14, 28), cameras=2
    )
    reference = weights(config, torch.float32, "reference")
    x = sample(config)
    blind = dataclasses.replace(x, inputs=dataclasses.replace(x.inputs, image_mask=torch.zeros(1, 2, dtype=torch.bool)))
    for engine in ("eager", "turbo-twins"):
        pair = make_pair(SubjectName(engine, "fp32"), weights(config, torch.float32), reference)
        results = audit(pair, reference, [x, blind] if engine == "eager" else [x], AuditOptions(False, checks=False))
        assert results["over_budget"] == 0
    assert not any(name.startswith("vision") for name in ReferenceGraph(reference, blind).names)
    assert blind.steps == STEPS


class SecondCamera(EagerEngine):
    """Encodes the second camera wrongly."""

    def encode_images(self, *inputs: torch.Tensor) -> torch.Tensor:
        tokens = super().encode_images(*inputs).clone()
        tokens[:, 1] *= 3
        return tokens


@pytest.mark.parametrize("first", [1, 2])
def test_a_camera_that_only_one_frame_has_is_judged(first: int) -> None:
    def seen(seed: int, cameras: int) -> Sample:
        x = sample(CONFIG, seed)
        mask = torch.arange(CONFIG.cameras)[None] < cameras
        return dataclasses.replace(x, inputs=dataclasses.replace(x.inputs, image_mask=mask))

    reference = graph_of(CONFIG).model
    wrong = StageSubject("wrong:fp32", SecondCamera(weights(CONFIG, torch.float32), "fp32"))
    pair = dataclasses.replace(pair_of(SubjectName("eager", "fp32"), reference), candidate=wrong)
    frames = [seen(0, first), seen(1, 3 - first)]
    results = audit(pair, reference, frames, AuditOptions(checks=False))
    assert results["first_divergence"]["tensor"] == "vision.cam1.tokens"
    names = results["tensors"]["name"]
    assert names[:3] == ["vision.cam0.tokens", "vision.cam1.tokens", "cache.layers.0.k"]
    assert names[-1] == "actions"


def test_a_worker_loads_the_same_candidate(tmp_path: Path) -> None:
    checkpoint = init_checkpoint(tmp_path / "ck", "pi05-tiny", weights="hash", robot="libero")
    plan = PrecisionPlan("w8a16", {"expert.*": "bf16"}).save(tmp_path / "plan.json")
    loaded = Checkpointed(checkpoint, SubjectName("eager", "w8a16"), "cpu", steps=2, plan=plan)
    candidate = sources.CheckpointSource(checkpoint, loaded.policy_options(loaded.candidate)).load()
    assert (candidate.engine.precision, candidate.runtime.steps) == ("w8a16", 2)
    reference = sources.CheckpointSource(checkpoint, loaded.policy_options(SubjectName("eager", "fp32"))).load()
    assert reference.engine.precision == "fp32"
    assert reference_model(reference).vlm.dtype == torch.float32
