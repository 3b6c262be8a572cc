"""The main job, end to end: a checkpoint, the server, openpi's own client, real LIBERO frames, actions back.

    python examples/demo.py        # `make demo` sets everything up and runs this

The weights are random, so the actions mean nothing; the wire, the transforms, the three stages and their timing are
those of a real policy. Writes demo/receipt.json.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from rich.console import Console
from rich.progress import track
from rich.table import Table

from turbopi.bench import summary, write_receipt
from turbopi.cli.tables import TIMINGS, timing_table

ROOT = Path(__file__).parents[1]
FRAMES = ROOT / "tests" / "data" / "libero_frames.npz"
OUT = ROOT / "demo"
CHECKPOINT = OUT / "pi05-small"
INIT = ("init", str(CHECKPOINT), "--preset", "pi05-small", "--robot", "libero")
SERVE = ("serve", "--checkpoint", str(CHECKPOINT), "--host", "127.0.0.1", "--port", "0")


def turbo_pi(*arguments: str) -> list[str]:
    """The command line `turbo-pi …` of this environment."""
    return [sys.executable, "-c", "from turbopi.cli.main import main; main()", *arguments]


@contextmanager
def server(console: Console) -> Iterator[int]:
    """Run `turbo-pi serve` as a process of its own; yields its port, and ends it as an operator would."""
    process = subprocess.Popen(turbo_pi(*SERVE), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        announced = ""
        while not (found := re.search(r"ws://[\d.]+:(\d+)", announced)):
            line = process.stderr.readline()
            if not line:
                raise RuntimeError(f"the server did not start: {announced}")
            announced += line
        console.print(f"[dim]{announced.strip()}[/]")
        yield int(found[1])
        process.send_signal(signal.SIGTERM)
        console.print(f"[dim]server stopped with exit code {process.wait(timeout=30)}[/]")
    finally:
        process.kill()


def observations() -> Iterator[dict[str, Any]]:
    """The recorded LIBERO frames as an openpi client sends them: rotated by 180 degrees (shared protocol)."""
    frames = np.load(FRAMES)
    for image, wrist, state, prompt in zip(
        frames["agentview"], frames["wrist"], frames["state"], frames["prompt"], strict=True
    ):
        yield {
            "observation/image": np.ascontiguousarray(image[::-1, ::-1]),
            "observation/wrist_image": np.ascontiguousarray(wrist[::-1, ::-1]),
            "observation/state": state,
            "prompt": str(prompt),
        }


def main() -> None:
    """Play the frames and report."""
    console = Console()
    shutil.rmtree(CHECKPOINT, ignore_errors=True)
    subprocess.run(turbo_pi(*INIT), check=True)
    with server(console) as port:
        client = WebsocketClientPolicy("127.0.0.1", port)
        sent = list(observations())
        client.infer(sent[0])  # the first call pays for one-time set-up and is not timed
        replies, round_trips = [], []
        for observation in track(sent, description="playing LIBERO frames", console=console):
            start = time.perf_counter()
            replies.append(client.infer(observation))
            round_trips.append(1e3 * (time.perf_counter() - start))
    actions = Table("frame", *(f"a{i}" for i in range(7)), title="first action of each chunk (random weights)")
    previous = None
    for index, (observation, reply) in enumerate(zip(sent, replies, strict=True)):
        if observation["prompt"] != previous:
            previous = observation["prompt"]
            actions.add_section()
            console.print(f"frames from {index}: {previous}")
        actions.add_row(str(index), *(f"{a:+.3f}" for a in reply["actions"][0]))
    console.print(actions)
    timings = [reply["policy_timing"] for reply in replies]
    console.print(timing_table(timings, f"milliseconds, {len(timings)} calls"))
    console.print(f"round trip through the client: median {np.median(round_trips):.1f} ms")
    results = {name: summary([timing[name] for timing in timings]) for name in TIMINGS}
    results["round_trip_ms"] = summary(round_trips)
    config = {"init": list(INIT), "serve": list(SERVE), "client": "openpi-client", "frames": FRAMES.name}
    path = write_receipt(OUT / "receipt.json", "LIBERO frames through the server, openpi client", results, config)
    console.print(f"receipt: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
