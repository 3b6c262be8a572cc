"""The report of one evaluation, from config.json, episodes.jsonl and summary.json in its directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .charts import Episode, RateRow, episode_grid, histogram, length_chart, rate_chart
from .page import film_strip, flat_rows, heading, legend, page, table, tiles

REPORT_FILE = "report.html"
_KINDS = {"reached the goal": "good", "did not": "bad", "ended in an error": "none"}


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
    prompts = {task["task"]: task["prompt"] for task in summary["tasks"]}
    frame, labels = _labels(prompts)
    yield heading("Success per task", f"whiskers: {100 * summary['confidence']:.0f} % Wilson interval{frame}")
    yield rate_chart(_rate_rows(summary, labels))
    rows = _episode_rows(episodes)
    yield heading("Every episode", "a column per initial state; a spot marks a film, a click opens it")
    yield legend({name: f"var(--{kind})" for name, kind in _KINDS.items()})
    yield episode_grid([(f"task {task}", row) for task, row in rows.items()])
    if any(e["steps"] for e in episodes):
        yield heading("Episode lengths", "actions carried out, 20 a second; a dot per episode")
        yield length_chart([(labels.get(task, str(task)), row) for task, row in rows.items()])
    times = [ms for e in episodes for ms in e["infer_ms"]]
    if times:
        latency = summary["latency"]
        marks = {name: latency[f"{name}_ms"] for name in ("p50", "p95", "p99")}
        note = f"{len(times)} inferences, as the workers saw them, side by side on one machine"
        yield heading("Inference latency", note)
        yield histogram(times, "ms", marks)
    yield from _strips(directory, episodes)
    if summary["errors"]:
        yield heading("Errors", "episodes without an outcome; they count neither as success nor as failure")
        cells = [(str(e["task"]), str(e["initial_state"]), e["error"]) for e in summary["errors"]]
        yield table(("task", "initial state", "error"), cells)
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
        shown.append((f"{control['effective_hz']:.1f} Hz", "control of 20, waiting included"))
    if summary["errors"]:
        shown.append((str(len(summary["errors"])), "episodes ended in an error"))
    return shown


def _labels(prompts: dict[int, str]) -> tuple[str, dict[int, str]]:
    """A line that says what all prompts share, and for every task its number with the words that are its own."""
    split = {task: prompt.split() for task, prompt in prompts.items()}
    shared = [w for w in split.values() if w]
    start = _common(shared)
    end = _common([words[start:][::-1] for words in shared])
    if len(shared) < 2 or not (start or end) or any(len(words) <= start + end for words in shared):
        return "", {task: f"{task}  {prompt}" for task, prompt in prompts.items()}
    first = shared[0]
    frame = " ".join([*first[:start], "…", *first[len(first) - end :]])
    own = {task: " ".join(words[start : len(words) - end]) for task, words in split.items()}
    return f"; every prompt reads “{frame}”", {task: f"{task}  {words}" for task, words in own.items()}


def _common(lists: Sequence[Sequence[str]]) -> int:
    """How many words all of the lists begin with."""
    differing = (i for i, words in enumerate(zip(*lists, strict=False)) if len(set(words)) > 1)
    return next(differing, min(map(len, lists), default=0))


def _rate_rows(summary: dict[str, Any], labels: dict[int, str]) -> list[RateRow]:
    labelled = [(labels[task["task"]], task) for task in summary["tasks"]]
    return [
        RateRow(label, s["rate"], s["interval"] and tuple(s["interval"]), f"{s['successes']}/{s['episodes']}")
        for label, s in [*labelled, ("all", summary["total"])]
    ]


def _episode_rows(episodes: Sequence[dict[str, Any]]) -> dict[int, list[Episode]]:
    rows: dict[int, list[Episode]] = {}
    for e in episodes:
        outcome = "ended in an error" if e["error"] else "reached the goal" if e["success"] else "did not"
        title = f"task {e['task']}, initial state {e['initial_state']}: {outcome}, {e['steps']} steps"
        title += f" ({e['note']})" if e["note"] else ""
        entry = Episode(e["initial_state"], e["steps"], _KINDS[outcome], title, e["media"].get("video"))
        rows.setdefault(e["task"], []).append(entry)
    return dict(sorted(rows.items()))


def _strips(directory: Path, episodes: Sequence[dict[str, Any]]) -> Iterator[str]:
    filmed = [e for e in episodes if e["media"].get("frames")]
    if filmed:
        yield heading("Film strips", "evenly spread over the episode, first frame to last")
    for episode in filmed:
        kind, word = ("ok", "success") if episode["success"] else ("bad", "failure")
        video = episode["media"].get("video")
        link = f' · <a href="{escape(video)}">video</a>' if video else ""
        yield (
            f'<div class="strip"><p>task {episode["task"]}, initial state {episode["initial_state"]}: '
            f'<span class="{kind}">{word}</span> after {episode["steps"]} steps · {escape(episode["prompt"])}{link}</p>'
            f"{film_strip(directory, episode['media']['frames'])}</div>"
        )
