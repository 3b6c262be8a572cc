"""One thread that runs jobs in the order given, off the event loop.

Not a ThreadPoolExecutor: its threads are joined when the interpreter ends, so that a stuck inference would keep a
process alive through a forced shutdown. This thread is a daemon.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Job = Callable[[], None]


class WorkerJobError(RuntimeError):
    """A job raised something that is no Exception (SystemExit, KeyboardInterrupt); it must not end the server."""


class Worker:
    """A named daemon thread. `run` is awaited on an event loop; jobs start in the order of their calls."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return function(*arguments), computed in the thread, or raise what it raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                result = function(*arguments)
            except Exception as error:
                _post(loop, _fail, future, error)
            except BaseException as error:
                wrapped = WorkerJobError(f"{type(error).__name__}: {error}")
                wrapped.__cause__ = error
                _post(loop, _fail, future, wrapped)
            else:
                _post(loop, _finish, future, result)

        self._jobs.put(job)
        return await future

    def stop(self, timeout_s: float) -> bool:
        """Let queued jobs finish and end the thread; False if it has not ended within `timeout_s` seconds."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # it holds the request's arrays, which would otherwise live until the next one


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: Any) -> None:
    if not loop.is_closed():  # a forced shutdown does not wait for the job
        loop.call_soon_threadsafe(callback, *arguments)


def _finish(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
