"""Recording a piece of GPU work once and replaying it: CUDA graphs that share one pool of scratch memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch

Work = Callable[[], None]


class Recorder(Protocol):
    """Turns work into something that repeats it on the same memory."""

    def record(self, work: Work) -> Work:
        """Do the work at least once, and return what does it again."""


class CudaGraphRecorder:
    """Records work as a CUDA graph.

    All graphs take their intermediates from one pool, so a further graph costs little memory. It also means that a
    graph's intermediates may lie where another's were: work must read and write what outlives it in tensors made
    outside, and two graphs must never run at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, work: Work) -> Work:
        """Run once to load and choose kernels, capture, and return the replay.

        The replay goes to the caller's current stream. Capturing itself computes nothing. Raises RuntimeError if the
        GPU's memory does not suffice.
        """
        try:
            return self._capture(work)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"{self.device} has too little memory to capture a CUDA graph ({error}); use a smaller batch, "
                "or the engine 'eager', which keeps no graphs"
            ) from error

    def _capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream), torch.no_grad():
            work()
            torch.cuda.synchronize(self.device)
            # A collection in the middle could free a graph or an event, which CUDA forbids while it captures.
            collecting = gc.isenabled()
            gc.disable()
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                except BaseException:
                    # Ending a broken capture fails too; the first error is the one that tells.
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
            finally:
                if collecting:
                    gc.enable()
        current.wait_stream(self._stream)
        return graph.replay


def require_cuda(device: torch.device, engine: str) -> torch.device:
    """The device. Raises ValueError if it is not a CUDA GPU."""
    if device.type != "cuda":
        raise ValueError(
            f"engine {engine!r} captures CUDA graphs and needs an NVIDIA GPU, but the model is on {device.type!r}; "
            "load the model on 'cuda', or use the engine 'eager'"
        )
    return device
