"""The order of things around a capture, with stand-ins for CUDA."""

import gc
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from turbopi.engine.capture import CudaGraphRecorder


class Stream:
    def __init__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []

    class Graph:
        def capture_begin(self, pool: object, capture_error_mode: str) -> None:
            assert (pool, capture_error_mode) == ("pool", "thread_local")
            said.append("begin")

        def capture_end(self) -> None:
            said.append("end")
            if "broken" in said:
                raise RuntimeError("the capture was broken before")

        def replay(self) -> None:
            said.append("replay")

    stands: dict[str, object] = {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "graph_pool_handle": lambda: "pool",
        "current_stream": lambda _: Stream(),
        "device": lambda _: nullcontext(),
        "stream": lambda _: nullcontext(),
        "synchronize": lambda _: said.append("wait"),
    }
    for name, stand in stands.items():
        monkeypatch.setattr(torch.cuda, name, stand)
    return said


def work_of(said: list[str], error: Exception | None = None) -> Callable[[], None]:
    def work() -> None:
        said.append("work" if gc.isenabled() else "work without collections")
        if error is not None and "begin" in said:
            said.append("broken")
            raise error

    return work


def test_warm_up_wait_capture_replay(said: list[str]) -> None:
    replay = CudaGraphRecorder(torch.device("cuda")).record(work_of(said))
    assert said == ["work", "wait", "begin", "work without collections", "end"]
    assert gc.isenabled()
    replay()
    assert said[-1] == "replay"


def test_the_first_error_is_the_one_that_is_told(said: list[str]) -> None:
    with pytest.raises(KeyError, match="the cause"):
        CudaGraphRecorder(torch.device("cuda")).record(work_of(said, KeyError("the cause")))
    assert said[-1] == "end"
    assert gc.isenabled()


def test_too_little_memory_names_eager(said: list[str]) -> None:
    with pytest.raises(RuntimeError, match=r"too little memory to capture a CUDA graph.*engine 'eager'"):
        CudaGraphRecorder(torch.device("cuda")).record(work_of(said, torch.OutOfMemoryError("1 GiB missing")))
