import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from turbopi.report import write_bench_report
from turbopi.report.curves import StackRow, line_chart, stack_chart

STAGES = ("encode_images", "prefill", "denoise")


def series(median: float) -> dict[str, Any]:
    names = ("median_ms", "p90_ms", "p99_ms", "p99_9_ms", "max_ms")
    values = {name: median * (1 + i / 10) for i, name in enumerate(names)}
    return values | {"count": 30, "samples_every": 1, "samples_ms": [median + i / 30 for i in range(30)]}


def engine(median: float) -> dict[str, Any]:
    rates = {"p99_over_p50": 1.2, "deadline_hz": 20.0, "deadline_miss_rate": 0.015, "samples_per_s": 1e3 / median}
    roof = {"measured_ms": 2.0, "least_ms": 1.0, "times_the_floor": 2.0, "tflop_per_s": 300.0, "tb_per_s": 2.5}
    roof |= {"of_flops_ceiling": 0.42, "of_bytes_ceiling": 0.61}
    return {
        "warm_up_s": 0.5,
        "first_call_s": 1.5,
        "call": series(median) | rates,
        "device_in_call": series(median - 0.25) | {"p99_over_p50": 1.043},
        "split_ms": {"host place": 0.1, "device graph": median - 0.2},
        "stages": {stage: series(median / 4) for stage in STAGES},
        "roofline": dict.fromkeys(STAGES, roof),
    }


def receipt(what: str, results: dict[str, Any]) -> dict[str, Any]:
    shape = {"name": "libero", "views": 2, "prompt_tokens": 40, "horizon": 10, "steps": 10}
    return {
        "what": what,
        "command": "turbo-pi bench --out '<a & b>.json'",
        "when": "2026-01-01T00:00:00+00:00",
        "commit": "abc",
        "uncommitted_changes": False,
        "machine": {"cpu": "a processor", "gpus": ["A GPU"]},
        "config": {"workload": shape, "device": "cuda", "precision": "bf16"},
        "results": results,
    }


def latency() -> dict[str, Any]:
    peer = engine(20.0)
    for key in ("stages", "roofline", "device_in_call"):
        del peer[key]
    run = {
        "batch": 1,
        "prefix_tokens": 552,
        "least_ms": {"tick": 4.7},
        "subjects": {"turbo": engine(8.0), "eager": engine(40.0), "lerobot": peer},
        "drift": {"subject": "turbo", "count": 3, "first_ms": 8.0, "last_ms": 8.1},
    }
    product = "bfloat16 matrix product, random data"
    return {"ceilings": {"flops_per_s": 7e14, "bytes_per_s": 4e12, "product": product}, "runs": [run]}


def memory(on_chip: float) -> dict[str, Any]:
    points = [
        {
            "prompt_tokens": n,
            "prefix_tokens": 512 + n,
            "tick": series(8 + n / 100),
            "stages_ms": dict.fromkeys(STAGES, 2),
        }
        for n in (1, 16, 17)
    ]
    bandwidth = [{"bytes": size << 20, "bytes_per_s": speed} for size, speed in ((1, 8e12), (64, 6e12), (1024, 4e12))]
    return {"bandwidth": bandwidth, "on_chip_bytes": on_chip, "ticks": {"turbo": points}}


def kernels() -> dict[str, Any]:
    row = {"kernel": "void gemm<4>(int)", "label": "gemm<4>", "count": 27, "total_ms": 1.1, "own_ms": 0.9, "share": 0.6}
    grids = {"8x1x1": {"count": 27, "median_us": 41.0}}
    many = {f"{i}x100x100": {"count": 1, "median_us": 41.0} for i in range(20)}
    rows = [row | {"median_us": 41.0, "grids": grids}, row | {"median_us": 41.0, "grids": many}]
    stage = {"launches": 54, "span_ms": 1.5, "gaps_ms": 0.1, "kernels": rows}
    turbo = {"profiled": "the whole tick's graph", "ticks": 20, "tick": {"launches": 162}, "engine": {}}
    eager = turbo | {"profiled": "stages one after the other", "unprofiled_ms": dict.fromkeys(STAGES, 2.0)}
    turbo |= {"unprofiled_ms": dict.fromkeys(STAGES, 1.5) | {"tick": 4.4}}
    engines = {
        name: engine | {"stages": dict.fromkeys(STAGES, stage)} for name, engine in (("turbo", turbo), ("eager", eager))
    }
    return {"prefix_tokens": 552, "engines": engines}


class Balanced(HTMLParser):
    """Fails on tags that are closed in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def written(tmp_path: Path, content: dict[str, Any]) -> str:
    source = tmp_path / "r.json"
    source.write_text(json.dumps(content))
    path = write_bench_report(source)
    assert path == tmp_path / "r.html"
    text = path.read_text()
    reader = Balanced()
    reader.feed(text)
    assert reader.open == []
    return text


def test_the_latency_page(tmp_path: Path) -> None:
    text = written(tmp_path, receipt("bench latency", latency()))
    for words in (
        "Batch 1, 552 prefix tokens",
        "8.00 ms",
        "1.50 % of 20 Hz",
        "42 %",
        "30 of 30 samples",
        "A GPU",
        "1.043",
    ):
        assert words in text, words
    assert "&lt;a &amp; b&gt;" in text
    assert text.count("whole calls</h2>") == 3
    assert text.count("beyond the stages") >= 2


def test_the_kernels_page(tmp_path: Path) -> None:
    text = written(tmp_path, receipt("bench kernels", kernels()))
    for words in ("turbo, denoise", "gemm&lt;4&gt;", "60.0 %", "4.40 ms", "6.00 ms", "8x1x1", "20 grids", "162"):
        assert words in text, words


def test_the_memory_page(tmp_path: Path) -> None:
    assert "L2 50 MiB" in written(tmp_path, receipt("bench memory", memory(50 << 20)))
    assert "L2" not in written(tmp_path, receipt("bench memory", memory(0.0)))


def test_other_receipts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="write one with `turbo-pi bench"):
        write_bench_report(tmp_path / "none.json")
    with pytest.raises(ValueError, match="a receipt of 'stage latency', expected one of `turbo-pi bench`"):
        written(tmp_path, receipt("stage latency", {}))


def test_curves_stand_one_point_and_nothing() -> None:
    assert "polyline" in line_chart({"a": [(1.0, 0.0)]}, "x", "y", {})
    assert "0.00 ms" in stack_chart([StackRow("a", [("part", 0.0)], 0.0)], "ms")
