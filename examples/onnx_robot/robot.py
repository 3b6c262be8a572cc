"""A robot's whole policy with NumPy and ONNX Runtime: no PyTorch, no Turbo-Pi, two files to copy.

`prepare.py` writes the directory that this reads: graphs, weights, and `robot.json` with the tokenizer, the
normalisation and the sizes. As a program it is a policy at the end of a pipe (`play.py` is the other end):

    python robot.py DIRECTORY       # arrays in .npz form on standard input, actions on standard output

Or as a library: `OnnxRobot(directory).infer(observation)["actions"]`, with openpi's LIBERO keys.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnxruntime as ort

SPACE = "\u2581"  # how sentencepiece writes a space
BOS = 2
FIXED_POINT = 22  # bits behind the point in Pillow's resampling weights


class OnnxRobot:
    """π0 or π0.5 on one robot. `threads` are ONNX Runtime's; noise comes from `seed`, anew after each `reset`."""

    def __init__(self, directory: Path, threads: int = 2, seed: int = 0) -> None:
        self.facts = json.loads((directory / "robot.json").read_text())
        manifest = json.loads((directory / "manifest.json").read_text())
        self._sessions = {}
        for graph in manifest["graphs"]:
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = ort.InferenceSession(directory / graph["file"], options, providers=["CPUExecutionProvider"])
            self._sessions[graph["graph"], graph["prompt_bucket"]] = session
        self.buckets = sorted({graph["prompt_bucket"] for graph in manifest["graphs"] if graph["graph"] == "denoise"})
        self.horizon, self.dims = manifest["model"]["horizon"], manifest["model"]["action_dim"]
        self.ranks = {piece: (score, index) for index, (piece, score) in enumerate(self.facts["pieces"])}
        self.seed = seed
        self.reset()

    def reset(self) -> None:
        """Start an episode: the noise begins again."""
        self._noise = np.random.default_rng(self.seed)

    def infer(self, observation: dict[str, Any], noise: np.ndarray | None = None) -> dict[str, Any]:
        """One control tick: {"actions": (horizon, robot's dims) float64, "policy_timing": milliseconds}.

        Raises KeyError for a missing key, ValueError for a prompt that no exported graph holds.
        """
        start = time.perf_counter()
        images = np.stack([to_model(observation[key], self.facts["image_size"]) for key in self.facts["cameras"]])
        state = normalise(np.asarray(observation["observation/state"], np.float64), self.facts["state"])
        ids = [BOS, *encode(prompt_text(observation["prompt"], state), self.ranks, self.facts["whole"])]
        ids = ids[: self.facts["max_tokens"]]
        if noise is None:
            noise = self._noise.standard_normal((self.horizon, self.dims))
        ready = time.perf_counter()
        actions = self._run(images, ids, noise.astype(np.float32))
        done = time.perf_counter()
        actions = unnormalise(actions, self.facts["actions"])[:, : self.facts["action_dim"]]
        timing = {"infer_ms": 1e3 * (time.perf_counter() - start), "model_ms": 1e3 * (done - ready)}
        return {"actions": actions, "policy_timing": timing}

    def _run(self, images: np.ndarray, ids: list[int], noise: np.ndarray) -> np.ndarray:
        """The three stages."""
        fitting = [bucket for bucket in self.buckets if bucket >= len(ids)]
        if not fitting:
            raise ValueError(f"the prompt has {len(ids)} tokens, the graphs hold {self.buckets}; export a larger one")
        bucket = fitting[0]
        tokens = np.zeros((1, bucket), np.int64)
        tokens[0, : len(ids)] = ids
        (image_tokens,) = self._sessions["vision", 0].run(None, {"images": images})
        prefill = self._sessions["prefill", bucket]
        feeds = {"image_tokens": image_tokens, "tokens": tokens, "prompt_length": np.array([len(ids)])}
        cache = prefill.run(None, feeds)
        names = [port.name for port in prefill.get_outputs()]
        feeds = dict(zip(names, cache, strict=True)) | {"noise": noise[None]}
        (actions,) = self._sessions["denoise", bucket].run(None, feeds)
        return actions[0]


# The state and the actions: openpi's quantile normalisation.


def normalise(x: np.ndarray, stats: dict[str, list[float]]) -> np.ndarray:
    """Robot units to [-1, 1]."""
    low, high = np.array(stats["q01"])[: x.size], np.array(stats["q99"])[: x.size]
    return (x - low) / (high - low + 1e-6) * 2.0 - 1.0


def unnormalise(x: np.ndarray, stats: dict[str, list[float]]) -> np.ndarray:
    """[-1, 1] to robot units, for as many dimensions as there are statistics."""
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    return (x[:, : low.size] + 1.0) / 2.0 * (high - low + 1e-6) + low


# The prompt: openpi's text for π0.5 with the state spelled in 256 bins, and sentencepiece's BPE.


def prompt_text(task: str, state: np.ndarray) -> str:
    """The text that the model was trained on."""
    bins = np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1
    cleaned = task.strip().replace("_", " ").replace("\n", " ")
    return f"Task: {cleaned}, State: {' '.join(map(str, bins))};\nAction: "


def encode(text: str, ranks: dict[str, tuple[float, int]], whole: list[str]) -> list[int]:
    """Ids of the text: the best-scored pair of neighbours is joined until none is in the vocabulary.

    `whole` are pieces that nothing is joined with. What the vocabulary lacks is spelled in bytes.
    """
    parts = list(text.replace(" ", SPACE))
    while True:
        joined = [a + b if a not in whole and b not in whole else "" for a, b in pairwise(parts)]
        known = [(-ranks[pair][0], place) for place, pair in enumerate(joined) if pair in ranks]
        if not known:
            break
        _, place = min(known)
        parts[place : place + 2] = [joined[place]]
    spelled = [[part] if part in ranks else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [ranks[piece][1] for pieces in spelled for piece in pieces]


# Images: Pillow's bilinear resampling with antialiasing, to the bit, with black borders where the shape differs.


@cache
def weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """For each new pixel the old ones that it is made of, and their weights in fixed point: both (new, taps) int64."""
    scale = old / new
    reach = max(scale, 1.0)
    taps = int(np.ceil(reach)) * 2 + 1
    places, values = np.zeros((new, taps), np.int64), np.zeros((new, taps))
    for pixel in range(new):
        centre = (pixel + 0.5) * scale
        first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), old)
        triangle = np.maximum(1.0 - np.abs((np.arange(first, last) - centre + 0.5) / reach), 0.0)
        places[pixel, : last - first] = np.arange(first, last)
        values[pixel, : last - first] = triangle / triangle.sum()
    return places, np.floor(values * (1 << FIXED_POINT) + 0.5).astype(np.int64)


def resample_rows(image: np.ndarray, new: int) -> np.ndarray:
    """(H,W,3) uint8 -> (new,W,3) uint8."""
    if image.shape[0] == new:
        return image
    places, values = weights(image.shape[0], new)
    total = np.einsum("nt,ntwc->nwc", values, image.astype(np.int64)[places]) + (1 << (FIXED_POINT - 1))
    return np.clip(total >> FIXED_POINT, 0, 255).astype(np.uint8)


def to_model(image: np.ndarray, size: int) -> np.ndarray:
    """A frame (H,W,3) uint8 of any shape -> (3,size,size) float32 in [-1, 1]."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a frame is {image.shape} {image.dtype}, expected (height, width, 3) uint8")
    ratio = max(image.shape[1] / size, image.shape[0] / size)
    height, width = int(image.shape[0] / ratio), int(image.shape[1] / ratio)
    columns_first = resample_rows(image.transpose(1, 0, 2), width).transpose(1, 0, 2)
    framed = np.zeros((size, size, 3), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    framed[top : top + height, left : left + width] = resample_rows(columns_first, height)
    return (framed.astype(np.float32) / np.float32(255) * np.float32(2) - np.float32(1)).transpose(2, 0, 1)


# The pipe: a length, then arrays by name in .npz form.


def send(stream: BinaryIO, arrays: dict[str, Any]) -> None:
    """Write named arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    stream.write(struct.pack("<Q", buffer.tell()) + buffer.getvalue())
    stream.flush()


def receive(stream: BinaryIO) -> dict[str, np.ndarray] | None:
    """Read named arrays; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    with np.load(io.BytesIO(stream.read(struct.unpack("<Q", head)[0])), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def main() -> int:
    """Answer requests until the pipe is closed. A request without a prompt resets."""
    robot = OnnxRobot(Path(sys.argv[1]))
    while (request := receive(sys.stdin.buffer)) is not None:
        assert "torch" not in sys.modules, "PyTorch was imported: this robot should do without"
        if "prompt" not in request:
            robot.reset()
            reply: dict[str, Any] = {}
        else:
            answer = robot.infer({**request, "prompt": str(request["prompt"])}, request.get("noise"))
            reply = {"actions": answer["actions"], **answer["policy_timing"]}
        send(sys.stdout.buffer, reply)
    return 0


if __name__ == "__main__":
    sys.exit(main())
