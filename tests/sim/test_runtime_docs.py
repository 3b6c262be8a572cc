"""docs/runtime.md can be filled: every table and plot from receipts made up here, and the rows' names agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
runtime_closed_loop = pytest.importorskip("runtime_closed_loop")
runtime_docs = pytest.importorskip("runtime_docs")


def row(setting: Any, successes: int) -> dict[str, Any]:
    return {
        "name": setting.name,
        "group": setting.group,
        "runtime": setting.runtime.to_dict(),
        "episodes": 200,
        "successes": successes,
        "rate": successes / 200,
        "interval": [successes / 200 - 0.02, min(1.0, successes / 200 + 0.02)],
        "p_value": 0.5,
        "latency": {"p50_ms": 20.0, "p99_ms": 30.0, "mean_ms": 40.0 - successes / 10},
        "reuse_rate": 0.5,
        "jerk": 0.1,
        "held_ticks": 3,
        "control_ticks": 300,
    }


@pytest.fixture
def options(tmp_path: Path) -> Any:
    every = [runtime_closed_loop.REFERENCE, *(s for make in runtime_closed_loop.SETTINGS.values() for s in make())]
    rows = [row(setting, 150 + index % 50) for index, setting in enumerate(every)]
    timed = {"median_ms": 5.0, "p99_ms": 6.0}
    overlap = {"ms_per_observation": 3.0}
    step = {
        **dict.fromkeys(("full", "guided"), timed),
        "fast": {"median_ms": 1.0, "p99_ms": 2.0},
        "stages": dict.fromkeys(("encode_images", "prefill", "denoise"), timed),
        **dict.fromkeys(("overlap_persistent", "overlap_fused", "overlap_rows"), overlap),
        "least_overlap_ms": 2.9,
        "fast_beyond_denoise_ms": 0.2,
    }
    receipts: dict[str, Any] = {
        "runtime_closed_loop": {"reference": "reference", "settings": rows},
        "runtime_eager": {"reference": "reference", "settings": rows},
        "runtime_decision": {"fixed": {"decide": timed, "with_frames": timed}},
        "runtime_latency_h": {"steps": {"10": step}},
        "runtime_soak_turbo": {
            "ticks": 9, "kinds": {"full": 3, "fast": 6}, "resets": 1,
            "grown_since_a_tenth": {"resident_mib": 0.5, "graphs": 0},
        },
    }  # fmt: skip
    for name, results in receipts.items():
        content = {"results": results, "config": {"engine": "turbo", "preset": "pi05"}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    page = tmp_path / "runtime.md"
    page.write_text(runtime_docs.PAGE.read_text())
    return runtime_docs.Options(write=True, results=tmp_path, page=page, images=tmp_path)


def test_every_table_is_filled(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_docs.tyro, "cli", lambda *_, **__: options)
    runtime_docs.main()
    text = options.page.read_text()
    tables = text[text.index("## What it costs: the host") :]
    assert runtime_docs.NOT_RUN not in tables
    # Half of the ticks reuse the prefix; a gate looks at the frames first. Steps that were not timed are left out.
    assert "| 50 % | 5.50 |" in tables
    assert "| 3.00 | 6.00 | 333 |" in tables
    assert "steps3_every2 |" not in tables
    for name in ("thresholds", "delays", "pareto"):
        assert (options.images / f"runtime_{name}.svg").stat().st_size > 1000


def test_without_receipts_the_page_stays(options: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = tmp_path / "none"
    empty.mkdir()
    before = options.page.read_text()
    other = runtime_docs.Options(write=True, results=empty, page=options.page, images=tmp_path)
    monkeypatch.setattr(runtime_docs.tyro, "cli", lambda *_, **__: other)
    runtime_docs.main()
    assert options.page.read_text() == before


def test_rows_in_the_order_of_their_value() -> None:
    asked = runtime_closed_loop.Options(out=Path("x"), only=("reuse", "delays"), rows=2)
    names = [setting.name for setting in runtime_closed_loop.chosen(asked)]
    assert names == ["reference", "steps5_every1", "steps3_every1", "delay2", "delay2_rtc"]
    matrix = [setting.name for setting in runtime_closed_loop.reuse_settings()]
    assert len(matrix) == len(set(matrix)) == 24


def test_rows_by_their_names() -> None:
    asked = runtime_closed_loop.Options(out=Path("x"), only=("delays",), named=("delay7", "delay5_rtc"))
    assert [setting.name for setting in runtime_closed_loop.chosen(asked)] == ["reference", "delay5_rtc", "delay7"]
    with pytest.raises(ValueError, match="no row named steps1_every1 among those asked for"):
        runtime_closed_loop.chosen(runtime_closed_loop.replace(asked, named=("steps1_every1",)))


def test_rows_of_a_receipt_stand_in_one_order() -> None:
    asked = runtime_closed_loop.Options(out=Path("x"))
    rows = [{"name": name} for name in ("delay1", "delay1_replan10", "steps5_every1", "reference")]
    names = [found["name"] for found in runtime_closed_loop.in_order(rows, asked)]
    assert names == ["reference", "steps5_every1", "delay1", "delay1_replan10"]


def test_what_turbo_cannot_do_is_left_to_eager() -> None:
    modes = list(runtime_closed_loop.mode_settings())
    on_turbo = [setting.name for setting in modes if runtime_closed_loop.runs_on(setting, "turbo")]
    assert on_turbo == ["synchronised_every2", "synchronised_every4", "full_0.985", "full_0.95"]
    assert all(runtime_closed_loop.runs_on(setting, "eager") for setting in modes)
