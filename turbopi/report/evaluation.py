"""The report of one evaluation, from config.json, episodes.jsonl and summary.json in its directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .charts import Cell, RateRow, episode_grid, histogram, rate_chart
from .page import flat_rows, heading, page, picture, table, tiles

REPORT_FILE = "report.html"
STRIP_FRAMES = 8


def write_eval_report(directory: Path) -> Path:
    """Write report.html beside the run's JSON, one file that needs no other (videos are links). Returns its path.

    Raises:
        FileNotFoundError: a file of the run is missing.
    """
    for name in ("config.json", "summary.json", "episodes.jsonl"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"no {name} in {directory}; run `turbo-pi eval --out {directory}` to its end first")
    config = json.loads((directory / "config.json").read_text())
    summary = json.loads((directory / "summary.json").read_text())
    lines = (directory / "episodes.jsonl").read_text().splitlines()
    latest = {(e["suite"], e["task"], e["initial_state"]): e for e in map(json.loads, lines)}
    episodes = [latest[key] for key in sorted(latest)]
    path = directory / REPORT_FILE
    path.write_text(page(f"Evaluation: {directory.name}", _parts(directory, config, summary, episodes)))
    return path


def _parts(
    directory: Path, config: dict[str, Any], summary: dict[str, Any], episodes: Sequence[dict[str, Any]]
) -> Iterator[str]:
    yield f"<h1>Closed loop: {escape(config['config']['suite'])}</h1>"
    yield f'<p class="soft">{escape(_policy_line(config))}</p>'
    yield f'<p class="verdict">{escape(summary["verdict"])}</p>'
    yield tiles(_tiles(summary))
    yield heading("Success per task", f"whiskers: {100 * summary['confidence']:.0f} % Wilson interval")
    yield rate_chart(_rate_rows(summary))
    yield heading("Every episode", "a column per initial state; green reached the goal, grey ended in an error")
    yield episode_grid(_grid(episodes))
    times = [ms for e in episodes for ms in e["infer_ms"]]
    if times:
        latency = summary["latency"]
        marks = {name: latency[f"{name}_ms"] for name in ("p50", "p95", "p99")}
        yield heading(
            "Inference latency", f"{len(times)} inferences, as the workers saw them, side by side on one machine"
        )
        yield histogram(times, "ms", marks)
    steps = [float(e["steps"]) for e in episodes if e["success"]]
    if steps:
        yield heading("Steps to success", "at 20 steps a second")
        yield histogram(steps, "steps", {}, bins=24)
    yield from _strips(directory, episodes)
    if summary["errors"]:
        yield heading("Errors", "episodes without an outcome; they count neither as success nor as failure")
        rows = [(str(e["task"]), str(e["initial_state"]), e["error"]) for e in summary["errors"]]
        yield table(("task", "initial state", "error"), rows)
    yield heading("Configuration")
    known = {key: config[key] for key in ("config", "policy") if key in config}
    yield table(("field", "value"), flat_rows(known))


def _policy_line(config: dict[str, Any]) -> str:
    source = config["config"]["source"]
    return " · ".join(str(source[key]) for key in ("checkpoint", "remote", "engine") if source.get(key) is not None)


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str]]:
    total, latency, control = summary["total"], summary["latency"], summary["control"]
    shown = [(f"{total['successes']}/{total['episodes']}", "episodes succeeded")]
    if total["rate"] is not None and summary["enough"]:
        low, high = total["interval"]
        shown.append((f"{100 * total['rate']:.1f} %", f"success, {100 * low:.1f} to {100 * high:.1f} %"))
    if latency is not None:
        shown.append((f"{latency['p50_ms']:.1f} ms", "inference, median"))
        shown.append((f"{latency['p95_ms']:.1f} / {latency['p99_ms']:.1f} ms", "inference, p95 / p99"))
        shown.append((f"{control['effective_hz']:.1f} Hz", "control rate, of 20, waiting for inference"))
    if summary["errors"]:
        shown.append((str(len(summary["errors"])), "episodes ended in an error"))
    return shown


def _rate_rows(summary: dict[str, Any]) -> list[RateRow]:
    labelled = [(f"{task['task']}  {task['prompt']}", task) for task in summary["tasks"]]
    return [
        RateRow(label, s["rate"], s["interval"] and tuple(s["interval"]), f"{s['successes']}/{s['episodes']}")
        for label, s in [*labelled, ("all", summary["total"])]
    ]


def _grid(episodes: Sequence[dict[str, Any]]) -> list[tuple[str, list[Cell]]]:
    rows: dict[int, list[Cell]] = {}
    for episode in episodes:
        outcome = "error" if episode["error"] else "success" if episode["success"] else "failure"
        title = f"task {episode['task']}, state {episode['initial_state']}: {outcome}, {episode['steps']} steps"
        title += f" ({episode['note']})" if episode["note"] else ""
        kind = {"error": "none", "success": "good", "failure": "bad"}[outcome]
        rows.setdefault(episode["task"], []).append(Cell(kind, title))
    return [(f"task {task}", cells) for task, cells in sorted(rows.items())]


def _strips(directory: Path, episodes: Sequence[dict[str, Any]]) -> Iterator[str]:
    filmed = [e for e in episodes if e["media"].get("frames")]
    if filmed:
        yield heading("Film strips", "evenly spread over the episode, first frame to last")
    for episode in filmed:
        frames, last = episode["media"]["frames"], len(episode["media"]["frames"]) - 1
        count = min(STRIP_FRAMES, len(frames))
        chosen = [frames[round(i * last / max(count - 1, 1))] for i in range(count)]
        pictures = "".join(picture(directory / name, Path(name).stem) for name in chosen)
        kind, word = ("ok", "success") if episode["success"] else ("bad", "failure")
        video = episode["media"].get("video")
        link = f' · <a href="{escape(video)}">video</a>' if video else ""
        yield (
            f'<div class="strip"><p>task {episode["task"]}, initial state {episode["initial_state"]}: '
            f'<span class="{kind}">{word}</span> after {episode["steps"]} steps · {escape(episode["prompt"])}{link}</p>'
            f"<div>{pictures}</div></div>"
        )
