"""The loss curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure


def draw_curve(lines: Path, picture: Path) -> Path:
    """Draw the JSON lines of a training run (step, loss, rate) into an SVG or PNG file; returns its path."""
    points = [json.loads(line) for line in lines.read_text().splitlines()]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.semilogy([p["step"] for p in points], [p["loss"] for p in points], label="loss")
    axes.set(xlabel="step", ylabel="flow-matching loss")
    axes.grid(visible=True, which="both", alpha=0.3)
    rate = axes.twinx()
    rate.plot([p["step"] for p in points], [p["rate"] for p in points], color="tab:orange", alpha=0.6)
    rate.set_ylabel("learning rate", color="tab:orange")
    figure.savefig(picture)
    return picture
