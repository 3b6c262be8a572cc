"""One episode of LIBERO, end to end: a checkpoint, the server, openpi's own client, a robot that finishes its task.

    python examples/demo.py        # `make demo` sets everything up and runs this

The policy is the small π0.5 in checkpoints/, trained here; the episode starts from an official initial state, on which
it was never trained. Writes into demo/: episode.mp4, film_strip.png, receipt.json (latency and actions), report.html.
Exit status: 0 the robot reached its goal, 1 it did not, 2 this machine lacks something, which is named.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from rich.console import Console

from turbopi import load_policy
from turbopi.bench import summary, write_receipt
from turbopi.cli.tables import timing_table
from turbopi.report import write_episode_report
from turbopi.serve import ServerThread
from turbopi.sim.gl import RendererError
from turbopi.sim.libero import FIXTURE_SEED, LiberoEnv, load_task
from turbopi.sim.rollout import EpisodeResult, EpisodeSpec, run_episode
from turbopi.sim.video import VideoRecorder, film_strip

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints" / "pi05-libero-small"
OUT = ROOT / "demo"
EPISODE = EpisodeSpec("libero_spatial", task=2, initial_state=0, seed=FIXTURE_SEED)
REPLAN = 5  # actions carried out before the next inference
STAGES = ("transforms_ms", "encode_images_ms", "prefill_ms", "denoise_ms")
LATENCIES = (*STAGES, "infer_ms", "round_trip_ms")  # infer_ms is the whole of the stages, in the server


class Recorder:
    """A policy that keeps its replies."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.replies: list[dict[str, Any]] = []

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Ask the policy."""
        self.replies.append(self.policy.infer(observation))
        return self.replies[-1]

    def reset(self) -> None:
        """Nothing to do: a new connection is a new episode to our server."""


def main() -> int:
    """Play the episode and report; 0 if the robot reached its goal, else 1."""
    console = Console(soft_wrap=True)
    shutil.rmtree(OUT, ignore_errors=True)
    task = load_task(EPISODE.suite, EPISODE.task)
    policy = load_policy(CHECKPOINT, precision="fp32")
    video = VideoRecorder(OUT / "episode")
    with LiberoEnv(task) as env, ServerThread(policy) as server:
        console.print(f"serving {CHECKPOINT.name} on {server.url} ({policy.engine.name}, {policy.engine.device})")
        console.print(f"{task.suite} task {task.index}, initial state {EPISODE.initial_state}: [b]{task.prompt}[/]")
        console.print("playing, and drawing every frame of the film: about half a minute on two cores", style="dim")
        # openpi's client opens its websocket in a way that newer releases of websockets warn about.
        warnings.filterwarnings("ignore", "connect.. must be used as a context manager", DeprecationWarning)
        client = Recorder(WebsocketClientPolicy("127.0.0.1", server.port))
        result = run_episode(env, client, EPISODE, replan=REPLAN, video=video)
    outcome = "[green]success[/]" if result.success else "[red]failure[/]"
    console.print(f"{outcome} after {result.steps} of at most {task.step_limit} steps")

    timings = [
        {**reply["policy_timing"], "round_trip_ms": ms}
        for reply, ms in zip(client.replies, result.infer_ms, strict=True)
    ]
    console.print(timing_table(timings, f"milliseconds, {len(timings)} inferences", LATENCIES))

    film_strip(video.frames, OUT / "film_strip.png")
    results = {
        "episode": describe(result, task.prompt, task.step_limit),
        "media": {"video": video.path.name, "frames": [path.name for path in video.frames]},
        "actions": np.concatenate([reply["actions"][:REPLAN] for reply in client.replies])[: result.steps].tolist(),
        "latency": {name.removesuffix("_ms"): summary([timing[name] for timing in timings]) for name in LATENCIES},
    }
    what = f"{CHECKPOINT.name} through the server and openpi's client"
    receipt = write_receipt(OUT / "receipt.json", what, results, {"policy": policy.describe()})
    for path in (video.path, OUT / "film_strip.png", receipt, write_episode_report(receipt)):
        console.print(f"wrote {path.relative_to(ROOT)}")
    return 0 if result.success else 1


def describe(result: EpisodeResult, prompt: str, step_limit: int) -> dict[str, Any]:
    """The episode as JSON values."""
    return {
        "suite": result.spec.suite,
        "task": result.spec.task,
        "initial_state": result.spec.initial_state,
        "prompt": prompt,
        "success": result.success,
        "note": result.error,
        "steps": result.steps,
        "step_limit": step_limit,
        "replan": REPLAN,
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ImportError, RendererError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
