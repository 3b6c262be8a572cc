"""LIBERO against a robot in a process of its own that has no PyTorch: closed loop through a pipe.

    python examples/onnx_robot/prepare.py checkpoints/pi05-libero-small /tmp/robot
    python examples/onnx_robot/play.py /tmp/robot --tasks 0 2 --trials 2

Prints every episode, and writes a receipt where --out says. Exit status: 0 if at least one episode succeeded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from robot import receive, send

from turbopi.bench import summary, write_receipt
from turbopi.sim.libero import LiberoEnv, load_task
from turbopi.sim.rollout import EpisodeSpec, run_episode

HERE = Path(__file__).parent
REPLAN = 5  # actions carried out before the next inference
SEED = 7


class Pipe:
    """The robot's process, as a policy."""

    def __init__(self, directory: Path) -> None:
        command = [sys.executable, str(HERE / "robot.py"), str(directory)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.model_ms: list[float] = []

    def _ask(self, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        send(self._process.stdin, dict(arrays))
        reply = receive(self._process.stdout)
        if reply is None:
            raise RuntimeError(f"the robot's process ended with status {self._process.wait()}")
        return reply

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """One chunk of actions."""
        reply = self._ask(observation)
        self.model_ms.append(float(reply["model_ms"]))
        return reply

    def reset(self) -> None:
        """Start an episode."""
        self._ask({"reset": np.array(1)})

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> int:
    """Play the episodes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="what prepare.py wrote")
    parser.add_argument("--suite", default="libero_spatial")
    parser.add_argument("--tasks", type=int, nargs="+", default=[2])
    parser.add_argument("--trials", type=int, default=1, help="initial states of each task, from the first")
    parser.add_argument("--out", type=Path, help="receipt to write")
    arguments = parser.parse_args()
    robot = Pipe(arguments.directory)
    episodes = []
    for task in (load_task(arguments.suite, index) for index in arguments.tasks):
        with LiberoEnv(task) as env:
            for trial in range(arguments.trials):
                result = run_episode(env, robot, EpisodeSpec(task.suite, task.index, trial, SEED), replan=REPLAN)
                episodes.append(
                    {"task": task.index, "initial_state": trial, "success": result.success, "steps": result.steps}
                )
                print(
                    f"{task.prompt}, state {trial}: {'success' if result.success else 'failure'}, {result.steps} steps"
                )
    robot.close()
    successes = sum(episode["success"] for episode in episodes)
    latency = summary(robot.model_ms)
    print(f"{successes} of {len(episodes)} episodes, the model's median {latency['median_ms']:.1f} ms, no PyTorch")
    if arguments.out:
        results = {"successes": successes, "episodes": episodes, "model": latency}
        checkpoint = json.loads((arguments.directory / "manifest.json").read_text())["checkpoint_hash"]
        config = {"checkpoint_hash": checkpoint, "suite": arguments.suite, "replan": REPLAN, "seed": SEED}
        print(f"wrote {write_receipt(arguments.out, 'onnx_robot in closed loop', results, config)}")
    return 0 if successes else 1


if __name__ == "__main__":
    sys.exit(main())
