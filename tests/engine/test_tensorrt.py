"""The engine "tensorrt" against a fake of TensorRT's documented API: what is asked for, kept and refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from captured_support import Rerun, model, observation
from tensorrt_fake import FakeTensorRT, plans

from turbopi import CheckpointError
from turbopi.engine import create_engine
from turbopi.engine.graphs.engine import GraphEngine
from turbopi.engine.graphs.source import ModelGraphs
from turbopi.engine.tensorrt import runtime
from turbopi.engine.tensorrt.api import PlanKey, load_tensorrt
from turbopi.engine.tensorrt.build import BuildOptions
from turbopi.engine.tensorrt.plans import PlanCache
from turbopi.engine.tensorrt.runtime import TensorrtRunner

STEPS = 2
STREAM = 4711
CPU = torch.device("cpu")


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    monkeypatch.setattr(runtime, "gpu_facts", lambda device: ("Pretended GPU", "9.0"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=STREAM))
    return FakeTensorRT()


@pytest.fixture(scope="module")
def graphs() -> ModelGraphs:
    return ModelGraphs(model(), "fp32")


def engine(trt: FakeTensorRT, graphs: ModelGraphs, plans_in: Path, may_build: bool = True) -> GraphEngine:
    runner = TensorrtRunner(trt, PlanCache(plans_in, may_build), CPU, Rerun())
    return GraphEngine("tensorrt", graphs, runner, "fp32", CPU)


def test_stages_walk_through_built_engines(trt: FakeTensorRT, graphs: ModelGraphs, tmp_path: Path) -> None:
    reference = model()
    inputs, noise = observation(reference.config, [20])
    made = engine(trt, graphs, tmp_path)
    found = made.sample_actions(inputs, noise, STEPS)
    torch.testing.assert_close(found, reference.sample_actions(inputs, noise, STEPS), rtol=1e-4, atol=1e-4)
    assert {flags for _, flags in trt.named("create_network")} == {1 << 1}
    assert all(call[2] == {trt.MemoryPoolType.WORKSPACE: 4 << 30} for call in trt.named("build"))
    assert {stream for _, stream in trt.named("execute")} == {STREAM}
    assert len(plans(tmp_path)) == 3
    told = made.describe()
    assert told["gpu"] == "Pretended GPU"
    assert told["cuda_graphs"]


def test_built_engines_are_used_again(trt: FakeTensorRT, graphs: ModelGraphs, tmp_path: Path) -> None:
    inputs, noise = observation(model().config, [20])
    engine(trt, graphs, tmp_path).sample_actions(inputs, noise, STEPS)
    assert len(trt.named("build")) == 3
    engine(trt, graphs, tmp_path).sample_actions(inputs, noise, STEPS)
    assert len(trt.named("build")) == 3
    newer = FakeTensorRT("11.1.0")
    engine(newer, graphs, tmp_path).sample_actions(inputs, noise, STEPS)
    assert len(newer.named("build")) == 3
    assert len(plans(tmp_path)) == 6


def test_what_was_measured_is_kept_for_the_next_build(trt: FakeTensorRT, graphs: ModelGraphs, tmp_path: Path) -> None:
    made = engine(trt, graphs, tmp_path)
    made.sample_actions(*observation(model().config, [20]), STEPS)
    assert [known for _, known in trt.named("timing cache")] == [b"", b"measured", b"measuredmeasured"]


def test_a_timing_cache_of_another_gpu(trt: FakeTensorRT, graphs: ModelGraphs, tmp_path: Path) -> None:
    timing = tmp_path / "timing.cache"
    timing.write_bytes(b"foreign")
    trt.timing_cache_fits = False
    found = graphs.find("vision", 2, 32, STEPS)
    strict = BuildOptions(timing_cache=timing, strict_cache=True)
    with pytest.raises(ValueError, match="made on another GPU"):
        TensorrtRunner(trt, PlanCache(tmp_path / "a"), CPU, None, strict).open(found, {})
    TensorrtRunner(trt, PlanCache(tmp_path / "b"), CPU, None, BuildOptions(timing_cache=timing)).open(found, {})
    assert timing.read_bytes() == b"measured"
    with pytest.raises(ValueError, match="positive number of bytes"):
        BuildOptions(workspace=0)


def test_an_engine_built_for_another_gpu(
    trt: FakeTensorRT, graphs: ModelGraphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, noise = observation(model().config, [20])
    engine(trt, graphs, tmp_path).sample_actions(inputs, noise, STEPS)
    monkeypatch.setattr(runtime, "gpu_facts", lambda device: ("Other GPU", "8.9"))
    with pytest.raises(ValueError, match=r"no TensorRT engine .* on Other GPU .*gpu is 'Pretended GPU', here 'Other"):
        engine(trt, graphs, tmp_path, may_build=False).sample_actions(inputs, noise, STEPS)
    with pytest.raises(ValueError, match="none at all"):
        engine(trt, graphs, tmp_path / "empty", may_build=False).sample_actions(inputs, noise, STEPS)


def test_a_plan_that_is_not_what_its_note_says(trt: FakeTensorRT, graphs: ModelGraphs, tmp_path: Path) -> None:
    found = graphs.find("vision", 2, 32, STEPS)
    TensorrtRunner(trt, PlanCache(tmp_path), CPU, None).open(found, {})
    runner = TensorrtRunner(trt, PlanCache(tmp_path, may_build=False), CPU, None)
    plan = plans(tmp_path)[0]
    note = plan.with_suffix(".json")
    facts = json.loads(note.read_text())
    note.write_text(json.dumps({**facts, "gpu": "Other GPU"}))
    with pytest.raises(CheckpointError, match="built for something else: gpu is 'Other GPU', here 'Pretended GPU'"):
        runner.open(found, {})
    note.write_text(json.dumps(facts))
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        runner.open(found, {})
    note.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        runner.open(found, {})


@pytest.mark.parametrize("left", [b"another process's plan", b""])
def test_a_plan_and_a_note_of_two_processes_are_built_anew(tmp_path: Path, left: bytes) -> None:
    key, built = PlanKey("GPU", "9.0", "10.13", "graph", "weights"), []

    def build() -> bytes:
        built.append(b"plan")
        return b"plan"

    PlanCache(tmp_path).get(key, build)
    plans(tmp_path)[0].write_bytes(left)
    for _ in range(2):
        assert PlanCache(tmp_path).get(key, build) == b"plan"
    assert len(built) == 2
    assert PlanCache(tmp_path, may_build=False).get(key, build) == b"plan"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".plan"]


@pytest.mark.parametrize(
    ("flag", "error", "message"),
    [
        ("parses", ValueError, "cannot read .*: unknown operator"),
        ("builds", ValueError, "could not build"),
        ("loads", CheckpointError, "cannot load the engine"),
        ("runs", RuntimeError, "refused to run"),
    ],
)
def test_what_tensorrt_refuses(
    trt: FakeTensorRT, graphs: ModelGraphs, tmp_path: Path, flag: str, error: type[Exception], message: str
) -> None:
    setattr(trt, flag, False)
    runner = TensorrtRunner(trt, PlanCache(tmp_path), CPU, None)
    with pytest.raises(error, match=message):
        runner.open(graphs.find("vision", 2, 32, STEPS), {}).run()


def test_an_engine_with_other_tensors(trt: FakeTensorRT, graphs: ModelGraphs, tmp_path: Path) -> None:
    trt.extra_tensor = True
    with pytest.raises(CheckpointError, match="has other tensors than the graph"):
        TensorrtRunner(trt, PlanCache(tmp_path), CPU, None).open(graphs.find("vision", 2, 32, STEPS), {})


def test_without_tensorrt_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ImportError, match="needs TensorRT 10 or later"):
        load_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT("8.6.1"))  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=r"TensorRT 8\.6\.1 is installed"):
        load_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT())  # type: ignore[arg-type]
    assert load_tensorrt().__version__ == "10.13.2.6"
    with pytest.raises(ValueError, match="engine 'tensorrt' captures CUDA graphs and needs an NVIDIA GPU"):
        create_engine("tensorrt", model(), "fp32")
