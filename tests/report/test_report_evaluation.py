import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from turbopi.report import write_eval_report
from turbopi.report.charts import Episode, RateRow, episode_grid, histogram, length_chart, rate_chart
from turbopi.report.page import flat_rows
from turbopi.report.svg import ticks
from turbopi.report.traces import line_chart, stacked_bars

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Every tag that opens closes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return checker


def episode(state: int, **changes: Any) -> dict[str, Any]:
    values = {
        "suite": "libero_spatial",
        "task": 0,
        "initial_state": state,
        "seed": 0,
        "prompt": "pick <it> up",
        "success": True,
        "steps": 80 + state,
        "inferences": 3,
        "infer_ms": [10.0, 11.0 + state, 30.0],
        "note": None,
        "error": None,
        "attempts": 1,
        "wall_s": 3.0,
        "media": {},
    }
    return {**values, **changes}


def success(successes: int, episodes: int) -> dict[str, Any]:
    rate = successes / episodes if episodes else None
    return {
        "episodes": episodes,
        "successes": successes,
        "rate": rate,
        "interval": [rate - 0.1, rate] if rate is not None else None,
    }


def write(directory: Path, episodes: list[dict[str, Any]], **changes: Any) -> Path:
    summary = {
        "confidence": 0.95,
        "tasks": [
            {"suite": "libero_spatial", "task": 0, "prompt": "pick <it> up", **success(2, 3)},
            {"suite": "libero_spatial", "task": 1, "prompt": "", **success(0, 0)},
        ],
        "total": success(2, 3),
        "latency": {"p50_ms": 11.0, "p95_ms": 29.0, "p99_ms": 30.0, "mean_ms": 17.0, "inferences": 9},
        "control": {"effective_hz": 19.1, "ceiling_hz": 300.0},
        "errors": [],
        "enough": True,
        "verdict": "succeeds in 66.7 % of 3 episodes & more",
        **changes,
    }
    directory.mkdir(exist_ok=True)
    config = {"config": {"suite": "libero_spatial", "source": {"checkpoint": "/ck", "engine": "eager", "robot": None}}}
    (directory / "config.json").write_text(json.dumps({**config, "policy": {"device": "cpu", "empty": {}}}))
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "episodes.jsonl").write_text("".join(json.dumps(e) + "\n" for e in episodes))
    return write_eval_report(directory)


def test_a_whole_report(tmp_path: Path) -> None:
    frames = []
    (tmp_path / "media").mkdir()
    for index in range(30):
        name = f"media/frame_{index:03d}.{'png' if index % 2 else 'jpg'}"
        Image.fromarray(np.full((16, 16, 3), 8 * index, np.uint8)).save(tmp_path / name)
        frames.append(name)
    episodes = [
        episode(0, media={"video": "media/a.mp4", "frames": frames}),
        episode(1, success=False, media={"video": None, "frames": frames[:1]}),
        episode(2, success=False, error="died <twice>", infer_ms=[]),
        episode(2),
        episode(3, success=False, error="died <twice>", infer_ms=[]),
    ]
    errors = [{"suite": "libero_spatial", "task": 0, "initial_state": 3, "error": "died <twice>"}]
    path = write(tmp_path, episodes, errors=errors)
    html = path.read_text()
    assert path == tmp_path / "report.html"
    found = checked(html)
    assert found.count["img"] == 8 + 1
    assert found.count["svg"] == 4
    assert "succeeds in 66.7 % of 3 episodes &amp; more" in html
    assert "pick &lt;it&gt; up" in html
    assert "66.7 %" in html
    assert html.count('href="media/a.mp4"') == 4  # below its strip, its square, its spot, its dot
    assert html.count("died &lt;twice&gt;") == 1
    assert html.count('fill="var(--none)"') == 2  # in the grid, and among the lengths
    assert html.count('fill="var(--good)"') == 2 * 2
    assert html.count('fill="var(--bad)"') == 2
    assert "http" not in html
    assert "/ck · eager" in html


def test_a_run_with_nothing_in_it(tmp_path: Path) -> None:
    nothing = {"total": success(0, 0), "tasks": [], "latency": None, "control": None, "enough": False}
    html = write(tmp_path, [], **nothing, verdict="no verdict").read_text()
    checked(html)
    assert "0/0" in html
    assert "latency" not in html


def test_no_rate_in_large_type_without_a_verdict(tmp_path: Path) -> None:
    assert "66.7" not in write(tmp_path, [episode(0)], enough=False, verdict="no verdict").read_text()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        write_eval_report(tmp_path)
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "gone", [episode(0, media={"video": None, "frames": ["media/gone.jpg"]})])


def test_charts_survive_odd_values() -> None:
    for svg in (
        histogram([5.0], "ms", {}),
        histogram([5.0, 5.0], "ms", {"p50": 5.0}),
        histogram([1.0, 2.0, 500.0], "ms", {"p50": 2.0, "p99": 3.0}),
        rate_chart([RateRow("x" * 80, 1.0, (0.9, 1.0), "1/1"), RateRow("none", None, None, "0/0")]),
        episode_grid([]),
        episode_grid([("task 0", [Episode(i, 80, "good", "a & b", "a&b.mp4") for i in range(200)])]),
        length_chart([]),
        length_chart([("task 0", [Episode(0, 0, "none", "a & b")])]),
        stacked_bars({"one": [], "two": []}, "ms"),
        stacked_bars({"one": [0.0], "two": [0.0]}, "ms"),
        line_chart({}),
        line_chart({"x": [0.5]}, marks=[0]),
        line_chart({"x": [0.5, -0.5, 0.0], "y": [1e-9, 2e-9, 3e-9]}, marks=[0, 1]),
    ):
        checked(svg)
        assert "nan" not in svg


def test_labels_leave_out_what_all_prompts_share(tmp_path: Path) -> None:
    prompts = ["put the red bowl on the plate", "put the blue bowl on the plate", ""]
    tasks = [{"suite": "s", "task": i, "prompt": prompt, **success(1, 2)} for i, prompt in enumerate(prompts)]
    html = write(tmp_path / "shared", [], tasks=tasks).read_text()
    assert "every prompt reads “put the … bowl on the plate”" in html
    assert ">1  blue<" in html
    assert ">2  <" in html
    tasks[1]["prompt"] = "put the red bowl on the plate"
    assert ">1  put the red bowl on the plate<" in write(tmp_path / "same", [], tasks=tasks).read_text()


def test_columns_are_initial_states() -> None:
    svg = episode_grid([("task 0", [Episode(4, 80, "good", "")])])
    assert f'x="{64 + 4 * 24:.1f}"' in svg


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (-0.33, 0.12, [-0.3, -0.2, -0.1, 0, 0.1]), (5, 5, [5])],
)
def test_axes_get_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_nested_values_become_rows() -> None:
    assert flat_rows({"a": {"b": 1, "c": [1, 2]}, "d": "x", "e": {}}) == [
        ("a.b", "1"),
        ("a.c", "[1, 2]"),
        ("d", "x"),
        ("e", "{}"),
    ]
