"""The profile per kernel, over recorded launches."""

import dataclasses
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from turbopi import preset
from turbopi.bench.kernels import KernelsConfig, measure_kernels, profile
from turbopi.bench.launches import Launch, cut, divided, label, own_parts, read_trace, summed
from turbopi.bench.workloads import WORKLOADS
from turbopi.engine import STAGES

CPU = torch.device("cpu")
TRACE = Path(__file__).parents[1] / "data" / "kernels_trace.json.xz"
MARK = Launch("mark", 0, 1)


def config(**changes: Any) -> KernelsConfig:
    values = {"device": "cuda", "precision": "bf16", "repeats": 3, "warmup": 2} | changes
    return KernelsConfig(preset("pi05-tiny"), WORKLOADS["libero"], ("turbo",), **values)


def test_own_parts_and_gaps_add_up_to_the_span() -> None:
    """The second begins early and ends later, the third runs within the second, the fourth comes after a pause."""
    launches = [Launch("a", 10, 5), Launch("b", 12, 8), Launch("c", 13, 2), Launch("d", 23, 4)]
    own, gaps = own_parts(launches)
    assert own == [5, 5, 0, 4]
    assert gaps == 3
    assert sum(own) + gaps == launches[-1].end - launches[0].start
    assert own_parts([]) == ([], 0.0)


def test_rows_are_summed_by_name() -> None:
    ticks = [
        [Launch("gemm", 0, 4, (8, 1, 1)), Launch("norm", 5, 1), Launch("gemm", 6, 2, (4, 1, 1))],
        [Launch("gemm", 100, 4, (8, 1, 1)), Launch("norm", 104, 3), Launch("gemm", 107, 2, (4, 1, 1))],
    ]
    found = summed(ticks)
    assert found["launches"] == 3
    assert found["span_ms"] == pytest.approx(8.5e-3)
    assert found["gaps_ms"] == pytest.approx(0.5e-3)
    gemm, norm = found["kernels"]
    assert (gemm["kernel"], gemm["count"], gemm["median_us"]) == ("gemm", 2, 3)
    assert gemm["own_ms"] == gemm["total_ms"] == pytest.approx(6e-3)
    assert gemm["grids"] == {"4x1x1": {"count": 1, "median_us": 2}, "8x1x1": {"count": 1, "median_us": 4}}
    assert norm["own_ms"] == pytest.approx(2e-3)
    assert sum(row["share"] for row in found["kernels"]) == pytest.approx(1 - 1 / 17)
    assert summed([[], []])["kernels"] == []


def test_a_trace_is_read_in_order_and_only_the_devices_part(tmp_path: Path) -> None:
    events = [
        {"ph": "X", "cat": "kernel", "name": "late", "ts": 7.25, "dur": 1.5, "args": {"grid": [2, 3, 1]}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 1, "dur": 30},
        {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "ts": 5, "dur": 1, "args": {"bytes": 8}},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "stage", "ts": 0, "dur": 100},
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 7.25},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert read_trace(path) == [Launch("Memset (Device)", 5, 1), Launch("late", 7.25, 1.5, (2, 3, 1))]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[Launch]:
    """Two ticks of `libero` on an H200, turbo in bf16: each its stages one by one, then the whole tick's graph."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    path.write_bytes(lzma.decompress(TRACE.read_bytes()))
    return read_trace(path)


def test_a_recorded_profile_is_taken_apart(recorded: list[Launch]) -> None:
    pieces = cut(recorded, 10)
    ticks = [divided(pieces[i + 3], pieces[i : i + 3]) for i in (0, 5)]
    vision, prefill, denoise = (summed([tick[stage] for tick in ticks]) for stage in range(3))
    assert [stage["launches"] for stage in (vision, prefill, denoise)] == [194, 158, 5]
    assert denoise["kernels"][0]["kernel"] == "denoise"
    assert denoise["kernels"][0]["share"] > 0.99
    assert denoise["kernels"][0]["grids"] == {"128x1x1": {"count": 1, "median_us": pytest.approx(3450, rel=0.05)}}
    assert prefill["kernels"][0]["kernel"] == "tiled_geglu"
    for stage in (vision, prefill, denoise):
        assert sum(row["own_ms"] for row in stage["kernels"]) + stage["gaps_ms"] == pytest.approx(
            stage["span_ms"], 0.01
        )
    assert sum(stage["span_ms"] for stage in (vision, prefill, denoise)) == pytest.approx(8.4, abs=0.1)


def test_a_recorded_profile_that_lost_launches(recorded: list[Launch]) -> None:
    """One kernel less in the graph is found; so is a marker less."""
    pieces = cut(recorded, 10)
    with pytest.raises(RuntimeError, match="ran 356 kernels, its stages one by one 357"):
        divided(pieces[3][:100] + pieces[3][101:], pieces[:3])
    with pytest.raises(RuntimeError, match="expected 10"):
        cut(recorded[:-1], 10)


def test_lost_launches_are_an_error() -> None:
    assert cut([MARK, Launch("a", 1, 1), MARK, MARK], 3) == [[Launch("a", 1, 1)], [], []]
    with pytest.raises(RuntimeError, match=r"2 markers named 'mark', expected 3: .*fewer ticks with --stage-calls"):
        cut([MARK, Launch("a", 1, 1), MARK], 3)


def test_a_graph_that_is_not_its_stages_is_an_error() -> None:
    a, b, c = (Launch(name, 0, 1) for name in "abc")
    assert divided([a, b, c], [[a], [], [b, c]]) == [[a], [], [b, c]]
    with pytest.raises(RuntimeError, match=r"ran 2 kernels, its stages one by one 3; .* number 1: \['c'\] and \['b'\]"):
        divided([a, c], [[a], [b, c]])


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_linear_kernel", "_linear_kernel"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
        ("void at::native::(anonymous namespace)::cat<float, 4>(float*, int)", "cat<float, 4>"),
        ("nvjet_" + "x" * 100, "nvjet_" + "x" * 57 + "…"),
    ],
)
def test_labels_fit_a_table(name: str, short: str) -> None:
    assert label(name) == short


class FakeTick:
    """An engine's tick of two kernels a stage, the denoise one with three, on a clock of its own."""

    stage_names = STAGES

    def __init__(self, has_graph: bool) -> None:
        self.has_graph, self.log, self.now = has_graph, list[Launch](), 0.0

    def prepare(self) -> None:
        self.log.clear()

    def _launch(self, name: str, microseconds: float) -> None:
        self.log.append(Launch(name, self.now, microseconds))
        self.now += microseconds + 1

    def _stage(self, stage: str, microseconds: float) -> None:
        for kernel in ("gemm", "norm", "loop")[: 3 if stage == "denoise" else 2]:
            self._launch(kernel, microseconds)

    def stages(self, mark: Callable[[], None]) -> None:
        for stage in self.stage_names:
            self._stage(stage, 20)
            mark()

    def graph(self) -> Callable[[], None] | None:
        def whole() -> None:
            for stage in self.stage_names:
                self._stage(stage, 10)

        return whole if self.has_graph else None


@pytest.mark.parametrize("has_graph", [True, False])
def test_a_tick_is_taken_apart(has_graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tick = FakeTick(has_graph)
    monkeypatch.setattr("turbopi.bench.kernels.Marker", lambda _: lambda: tick._launch("mark", 1))

    def recorder(work: Callable[[], None], _: torch.device) -> list[Launch]:
        tick.log.clear()
        work()
        return tick.log

    found = profile(tick, config(), CPU, recorder)  # type: ignore[arg-type]
    microseconds = 10 if has_graph else 20
    assert found["tick"]["launches"] == 7
    assert [stage["launches"] for stage in found["stages"].values()] == [2, 2, 3]
    for stage in found["stages"].values():
        assert {row["median_us"] for row in stage["kernels"]} == {microseconds}
        assert stage["gaps_ms"] == pytest.approx((stage["launches"] - 1) / 1e3)
    assert set(found["unprofiled_ms"]) == {*STAGES, *(["tick"] if has_graph else [])}


def test_what_is_asked_for_goes_into_a_receipt() -> None:
    assert json.loads(json.dumps(dataclasses.asdict(config(trace="traces"))))["trace"] == "traces"


def test_what_cannot_be_profiled_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a CUDA GPU, got 'cpu'"):
        measure_kernels(config(device="cpu"))
    with pytest.raises(ValueError, match="at least 1, got 0 and 2"):
        config(repeats=0)
    with pytest.raises(ValueError, match="between 1 and 256, got 0"):
        config(batch=0)
