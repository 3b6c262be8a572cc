import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from turbopi import preset
from turbopi.bench import ceilings
from turbopi.bench.ceilings import best_seconds, measure_ceilings
from turbopi.bench.clock import StageClock
from turbopi.bench.contenders import hash_weights
from turbopi.bench.latency import LatencyConfig, Times, call_rates, measure_latency, subject_results
from turbopi.bench.memory import MemoryConfig, bandwidth_curve, edges, measure_memory
from turbopi.bench.peers import LerobotSubject, _check_transformers
from turbopi.bench.receipt import write_receipt
from turbopi.bench.roofline import Ceilings, tick_costs
from turbopi.bench.subjects import EngineSubject, PlacingEngine
from turbopi.bench.workloads import WORKLOADS, Workload, as_uint8, observation
from turbopi.engine import STAGES, TurboEngine, create_engine
from turbopi.engine.turbo.ops import twin_ops
from turbopi.quant import PrecisionPlan

CPU = torch.device("cpu")
TINY = Workload("tiny", views=1, prompt_tokens=5, horizon=4, steps=2)


def config(**changes: object) -> LatencyConfig:
    values = {"calls": 5, "stage_calls": 3, "warmup": 1, "blocks": 2, "workload": TINY} | changes
    return LatencyConfig(preset("pi05-tiny"), **values)  # type: ignore[arg-type]


def test_every_engine_at_every_batch() -> None:
    said: list[str] = []
    results = measure_latency(config(batches=(1, 2), hz=1e-3), said.append)
    assert [run["batch"] for run in results["runs"]] == [1, 2]
    assert results["stage_clock"] == "wall"
    assert any("turn 2 of 2" in line for line in said)
    for run in results["runs"]:
        subject = run["subjects"]["eager"]
        assert subject["call"]["count"] == 5
        assert subject["call"]["deadline_miss_rate"] == 0
        assert set(subject["split_ms"]) == {"host ask", "host wait and read"}
        assert set(subject["stages"]) == set(subject["roofline"]) == set(STAGES)
        assert all(stage["count"] == 3 for stage in subject["stages"].values())
        assert subject["first_call_s"] > 0
        assert run["prefix_tokens"] == 16 + 5
        assert run["drift"]["count"] == 3
    one, two = (run["subjects"]["eager"]["call"] for run in results["runs"])
    assert two["samples_per_s"] == pytest.approx(2e3 / two["median_ms"])
    assert one["samples_per_s"] == pytest.approx(1e3 / one["median_ms"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calls": 0}, "calls must be at least 1"),
        ({"engines": ()}, "name at least one engine"),
        ({"engines": ("eager", "eager")}, "named twice"),
        ({"engines": ("eager", "eager:fp32")}, "named twice"),
        ({"engines": ("eager:fp7",)}, "unknown precision 'fp7'"),
        ({"batches": (0,)}, "between 1 and 256"),
        ({"hz": 0}, "hz must be positive"),
        ({"peers": ("vllm",)}, "unknown peer 'vllm'; known: lerobot"),
    ],
)
def test_what_cannot_be_timed(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_precisions_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each against the ceilings of its own operands; quantised ones are calibrated on the spot."""
    monkeypatch.setattr(ceilings, "CPU_SIDE", 64)
    results = measure_latency(config(engines=("eager:fp8", "eager:bf16", "eager"), calls=2, stage_calls=2))
    subjects = results["runs"][0]["subjects"]
    assert {name: subject["precision"] for name, subject in subjects.items()} == {
        "eager:fp8": "fp8",
        "eager:bf16": "bf16",
        "eager": "fp32",
    }
    assert set(results["engine_made_s"]) == set(subjects)
    products = {found["product"].split()[0] for found in results["other_ceilings"]}
    assert products == {"float8_e4m3fn", "bfloat16"}
    assert subjects["eager:fp8"]["engine"]["plan"] == {"default": "fp8", "exceptions": {}}


def test_a_plan_for_the_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "CPU_SIDE", 64)
    plan = PrecisionPlan("fp8", {"vision.*": "bf16"})
    results = measure_latency(config(engines=("eager:fp8",), plan=plan, calls=2, stage_calls=1))
    assert results["runs"][0]["subjects"]["eager:fp8"]["engine"]["plan"]["exceptions"] == {"vision.*": "bf16"}


def test_unknown_engines_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown engine 'warp'; known: .*eager"):
        measure_latency(config(engines=("warp",)))


def test_rates() -> None:
    rates = call_rates([10.0] * 98 + [30.0, 60.0], batch=4, hz=20.0)
    assert rates["deadline_miss_rate"] == 0.01
    assert rates["samples_per_s"] == 400
    assert rates["p99_over_p50"] == pytest.approx(3.03)


def test_a_receipt_of_ten_thousand_ticks_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    costs = tick_costs(preset("pi05-tiny"), TINY, 1, 2)
    times = Times(
        call=(9 + rng.random(10_000)).tolist(),
        split=[{"host place": 1.0}],
        stages=(3 + rng.random((2000, 3))).tolist(),
        graph=(9 + rng.random(2000)).tolist(),
        device_in_call=(9 + rng.random(10_000)).tolist(),
    )
    results = {n: subject_results(STAGES, times, costs, Ceilings(1e12, 1e12), 1, 20.0, series=2) for n in "ab"}
    path = write_receipt(tmp_path / "r.json", "bench latency", results, {})
    assert path.stat().st_size < 300_000
    written = json.loads(path.read_text())["results"]["a"]
    assert len(written["call"]["samples_ms"]) == written["call"]["count"] == 10_000
    assert written["graph"]["samples_every"] == 5
    within = written["device_in_call"]
    assert (within["count"], within["samples_every"]) == (10_000, 25)
    assert within["p99_over_p50"] == pytest.approx(9.99 / 9.5, abs=0.005)
    assert written["outside_device_ms"] == written["call"]["median_ms"] - written["graph"]["median_ms"]


def test_stage_times_add_up_on_a_cpu() -> None:
    clock = StageClock(CPU)
    clock.start()
    clock.mark()
    clock.mark()
    first = clock.stop()
    clock.start()
    assert len(first) == 2
    assert min(first) >= 0
    assert clock.stop() == []


def test_ceilings_on_a_cpu() -> None:
    assert best_seconds(lambda: None, CPU, repeats=3) >= 0
    ceilings = measure_ceilings(CPU, torch.float32)
    assert ceilings.bytes_per_s > 1e8
    assert ceilings.flops_per_s > 1e8


def test_an_engine_of_one_piece_is_taken_apart_by_its_ticks() -> None:
    """The turbo engine with its twins: placing, uint8 images, stages and the whole tick one by one."""
    sizes = TINY.fit(preset("pi05-tiny"))
    model = hash_weights(sizes, CPU, "fp32", 7)
    engine = TurboEngine(model, "fp32", twin_ops(), None)
    assert isinstance(engine, PlacingEngine)
    inputs, noise = observation(sizes, TINY, 1)
    subject = EngineSubject("turbo", engine, inputs, noise, TINY.steps)
    assert subject.inputs.images.dtype == torch.uint8
    subject.warm_up()
    subject.call()
    assert subject.call_device_ms() is None  # no device to time it
    assert set(subject.split()) == {"host whole"}
    subject.prepare()
    marks: list[int] = []
    subject.stages(lambda: marks.append(1))
    assert len(marks) == 3
    graph = subject.graph()
    assert graph is not None
    graph()
    eager = create_engine("eager", model, "fp32")
    other = EngineSubject("eager", eager, inputs, noise, TINY.steps)
    assert other.inputs.images.dtype == torch.float32
    assert other.graph() is None
    assert not isinstance(eager, PlacingEngine)


def test_what_the_device_timed_stands_beside_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineSubject, "call_device_ms", lambda _: 0.25)
    subject = measure_latency(config())["runs"][0]["subjects"]["eager"]
    assert subject["device_in_call"]["count"] == subject["call"]["count"] == 5
    assert (subject["device_in_call"]["median_ms"], subject["device_in_call"]["p99_over_p50"]) == (0.25, 1.0)


def test_uint8_images_are_the_same_picture() -> None:
    inputs, _ = observation(preset("pi05-tiny"), TINY, 2)
    same = as_uint8(inputs)
    assert torch.equal(same.images.float() / 255 * 2 - 1, inputs.images)


def test_memory_curves() -> None:
    results = measure_memory(
        MemoryConfig(preset("pi05-tiny"), TINY, ("eager",), "cpu", "fp32", prompt_lengths=(1, 70), repeats=2, warmup=1)
    )
    assert [point["prefix_tokens"] for point in results["ticks"]["eager"]] == [17, 86]
    assert results["weight_bytes"] == {}
    assert set(results["ticks"]["eager"][0]["stages_ms"]) == set(STAGES)
    assert [p["bytes"] for p in bandwidth_curve(CPU, [1 << 16, 1 << 18])] == [1 << 16, 1 << 18]
    assert edges(40) == (1, 16, 17, 32, 33, 40)
    assert edges(32) == (1, 16, 17, 32)
    with pytest.raises(ValueError, match="at least 1"):
        MemoryConfig(preset("pi05-tiny"), TINY, ("eager",), "cpu", "fp32", prompt_lengths=(0,))


def test_a_peer_that_is_not_installed_or_not_of_this_size() -> None:
    sizes = WORKLOADS["libero"].fit(preset("pi05"))
    with pytest.raises(ValueError, match="published pi05 sizes only"):
        measure_latency(config(peers=("lerobot",)))
    inputs, noise = observation(TINY.fit(preset("pi05-tiny")), TINY, 1)
    with pytest.raises(ImportError, match=r"install 'lerobot\[pi\]'"):
        LerobotSubject(sizes, inputs, noise, 10, CPU, torch.float32, compiled=False)


def test_a_peer_beside_another_transformers_than_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"lerobot": "0.6.1", "transformers": "5.17.0"}
    wanted = ["numpy<3", "transformers<5.6.0,>=5.4.0; extra == 'transformers-dep'"]
    monkeypatch.setattr("turbopi.bench.peers.metadata.version", versions.__getitem__)
    monkeypatch.setattr("turbopi.bench.peers.metadata.requires", lambda _: wanted)
    with pytest.raises(
        ImportError, match=r"lerobot 0\.6\.1 asks for transformers <5\.6\.0,>=5\.4\.0, .* 5\.17\.0; install"
    ):
        _check_transformers()
    versions["transformers"] = "5.5.4"
    _check_transformers()


def test_a_peer_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for its two modules: which arguments it is given."""
    asked: dict[str, object] = {}

    class FakeModel(torch.nn.Module):
        def __init__(self, settings: SimpleNamespace) -> None:
            super().__init__()
            asked["settings"] = settings

        def sample_actions(self, **inputs: object) -> torch.Tensor:
            asked.update(inputs)
            return inputs["noise"]  # type: ignore[return-value]

    configuration, modeling = SimpleNamespace(PI05Config=SimpleNamespace), SimpleNamespace(PI05Pytorch=FakeModel)
    modules = {"configuration_pi05": configuration, "modeling_pi05": modeling}
    monkeypatch.setattr("turbopi.bench.peers.import_module", lambda name: modules[name.rpartition(".")[2]])
    sizes = WORKLOADS["libero"].fit(preset("pi05"))
    inputs, noise = observation(sizes, WORKLOADS["libero"], 1)
    peer = LerobotSubject(sizes, inputs, noise, 10, CPU, torch.bfloat16, compiled=True)
    peer.warm_up()
    peer.call()
    peer.prepare()
    assert set(peer.split()) == {"host ask", "host wait and read"}
    assert (peer.name, peer.stage_names, peer.graph()) == ("lerobot compiled", (), None)
    settings = asked["settings"]
    assert (settings.dtype, settings.chunk_size, settings.compile_model) == ("bfloat16", 10, True)
    assert [image.shape for image in asked["images"]] == [(1, 3, 224, 224)] * 3
    assert [mask.item() for mask in asked["img_masks"]] == [True, True, False]
    assert (asked["num_steps"], asked["masks"].sum()) == (10, 40)
