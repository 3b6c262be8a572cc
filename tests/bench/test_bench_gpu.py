"""The bench on a GPU: `pytest -m gpu tests/bench`."""

import dataclasses

import pytest
import torch

from turbopi import preset
from turbopi.bench.ceilings import measure_ceilings, on_chip_bytes
from turbopi.bench.clock import StageClock
from turbopi.bench.kernels import KernelsConfig, measure_kernels
from turbopi.bench.latency import LatencyConfig, measure_latency
from turbopi.bench.memory import bandwidth_curve
from turbopi.bench.reading import BLOCK, read, read_ref
from turbopi.bench.workloads import WORKLOADS

pytestmark = pytest.mark.gpu


def test_the_reading_kernel_reads_everything() -> None:
    source = torch.rand(5 * BLOCK, device="cuda")
    for programs, turns in ((3, 1), (3, 11), (7, 5)):
        out, expected = (torch.full((programs, BLOCK), float("nan"), device="cuda") for _ in range(2))
        read(source, out, turns)
        read_ref(source, expected, turns)
        assert torch.equal(out, expected)


def test_a_small_working_set_is_read_faster_than_a_large_one() -> None:
    device = torch.device("cuda")
    size = int(on_chip_bytes(device))
    near, far = bandwidth_curve(device, [size // 4, 16 * size])
    assert near["bytes_per_s"] > far["bytes_per_s"]
    assert far["bytes_per_s"] <= 1.2 * measure_ceilings(device, torch.bfloat16).bytes_per_s


def test_stage_times_are_the_devices() -> None:
    clock = StageClock(torch.device("cuda"))
    clock.start()
    torch.cuda._sleep(2_000_000)
    clock.mark()
    clock.mark()
    first, second = clock.stop()
    assert 0.5 < first < 5
    assert second < 0.1


@pytest.mark.parametrize("engines", [("eager", "graphed"), ("graphed", "turbo")])
def test_engines_side_by_side(engines: tuple[str, ...]) -> None:
    shape = dataclasses.replace(WORKLOADS["libero"], steps=3)
    config = LatencyConfig(
        preset("pi05-small"), shape, engines, device="cuda", precision="bf16", batches=(1, 2), calls=20, stage_calls=4
    )
    for run in measure_latency(config)["runs"]:
        for name in engines:
            subject = run["subjects"][name]
            assert 0 < subject["device_ms"] < subject["call"]["max_ms"]
            assert sum(stage["median_ms"] for stage in subject["stages"].values()) > 0
        assert run["transfers"]["observation_to_device"]["median_ms"] > 0
    if "turbo" in engines:
        found = run["subjects"]["turbo"]
        assert set(found["split_ms"]) == {"host place", "host launch", "host wait and read", "device whole"}
        within = found["device_in_call"]
        assert within["count"] == found["call"]["count"] == 20
        # The copies are in it, the host's work is not.
        assert found["graph"]["min_ms"] < within["median_ms"] < found["call"]["median_ms"]
        assert "device_in_call" not in run["subjects"]["graphed"]


def test_every_kernel_of_a_tick_has_its_stage() -> None:
    shape = dataclasses.replace(WORKLOADS["libero"], steps=2)
    config = KernelsConfig(preset("pi05-small"), shape, ("turbo", "eager"), "cuda", "bf16", repeats=3)
    found = measure_kernels(config)["engines"]
    assert found["turbo"]["profiled"] == "the whole tick's graph"
    for engine in found.values():
        for name, stage in engine["stages"].items():
            own = sum(row["own_ms"] for row in stage["kernels"])
            assert 0 < own + stage["gaps_ms"] < 3 * engine["unprofiled_ms"][name]
            assert all(row["median_us"] > 0 for row in stage["kernels"])
        assert engine["tick"]["launches"] == sum(stage["launches"] for stage in engine["stages"].values())
