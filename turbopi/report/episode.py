"""The report of one filmed episode, from its receipt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from .page import film_strip, flat_rows, heading, legend, page, table, tiles
from .svg import COLOURS
from .traces import line_chart, stacked_bars

REPORT_FILE = "report.html"
ACTIONS = {
    "motion of the gripper, in 5 cm": ("x", "y", "z"),
    "rotation, in 0.5 rad": ("about x", "about y", "about z"),
    "gripper, -1 open to 1 close": ("gripper",),
}
WAY = "wire and waiting"


def write_episode_report(receipt: Path) -> Path:
    """Write report.html beside a receipt, one file that needs no other but the film. Returns its path.

    Args:
        receipt: JSON as `turbopi.bench.write_receipt` leaves it. Its results hold "episode" (suite, task,
            initial_state, prompt, success, note, steps, step_limit, replan), "media" (video and frames, relative to the
            receipt), "actions" (7 numbers for every step) and "latency": by name the median_ms, p99_ms, max_ms and
            samples_ms of every stage in the server in the order in which they run, of its "infer", and of the client's
            "round_trip".

    Raises:
        FileNotFoundError: the receipt or a picture is missing.
    """
    values = json.loads(receipt.read_text())
    path = receipt.with_name(REPORT_FILE)
    path.write_text(page("One episode", _parts(receipt.parent, values)))
    return path


def _parts(directory: Path, receipt: dict[str, Any]) -> Iterator[str]:
    results = receipt["results"]
    episode, media, latency = results["episode"], results["media"], results["latency"]
    kind, word = ("ok", "success") if episode["success"] else ("bad", "failure")
    yield f"<h1>{escape(episode['prompt'])}</h1>"
    yield (
        f'<p class="soft">{escape(episode["suite"])} task {episode["task"]}, initial state '
        f"{episode['initial_state']} · {escape(receipt['what'])}</p>"
    )
    note = f": {episode['note']}" if episode["note"] else ""
    yield f'<p class="verdict"><span class="{kind}">{word}</span> after {episode["steps"]} steps{escape(note)}</p>'
    yield tiles(_tiles(episode, latency))
    yield heading("Film", "what the robot's two cameras see, turned as the policy gets them, at the robot's own speed")
    yield f'<video controls loop muted src="{escape(media["video"])}"></video>'
    yield f'<div class="strip">{film_strip(directory, media["frames"])}</div>'
    yield from _latency(latency, receipt["machine"]["cpu"])
    yield from _actions(np.array(results["actions"]), episode["replan"])
    yield heading("Configuration")
    yield table(("field", "value"), flat_rows({key: receipt[key] for key in ("config", "machine", "commit", "when")}))


def _tiles(episode: dict[str, Any], latency: dict[str, Any]) -> list[tuple[str, str]]:
    shown = [(f"{episode['steps']} of {episode['step_limit']}", "steps, 20 a second")]
    for name, what in (("round_trip", "round trip, p50 / p99"), ("infer", "in the server, p50 / p99")):
        shown.append((f"{latency[name]['median_ms']:.0f} / {latency[name]['p99_ms']:.0f} ms", what))
    shown.append((str(len(latency["infer"]["samples_ms"])), f"inferences, one every {episode['replan']} steps"))
    return shown


def _latency(latency: dict[str, Any], cpu: str) -> Iterator[str]:
    samples = {name: np.array(stage["samples_ms"]) for name, stage in latency.items()}
    trip = samples.pop("round_trip")
    del samples["infer"]
    samples[WAY] = np.maximum(trip - sum(samples.values()), 0)
    yield heading(
        "Latency",
        f"the client's round trip, taken apart, a bar per inference; the first pays for one-time set-up; {cpu}",
    )
    yield legend(dict(zip(samples, COLOURS, strict=False)))
    yield stacked_bars({name: values.tolist() for name, values in samples.items()}, "ms")
    rows = [
        (name, f"{stage['median_ms']:.1f}", f"{stage['p99_ms']:.1f}", f"{stage['max_ms']:.1f}")
        for name, stage in latency.items()
    ]
    yield table(("milliseconds", "p50", "p99", "max"), rows)


def _actions(actions: np.ndarray, replan: int) -> Iterator[str]:
    yield heading("Actions", f"as carried out, over steps; a pale line where a new chunk begins, every {replan} steps")
    column = 0
    for what, names in ACTIONS.items():
        series = {name: actions[:, column + i].tolist() for i, name in enumerate(names)}
        yield f'<p class="soft">{escape(what)}</p>'
        if len(names) > 1:
            yield legend(dict(zip(names, COLOURS, strict=False)))
        yield line_chart(series, range(0, len(actions), replan))
        column += len(names)
