"""Ways to run a policy server: a coroutine, a blocking call for the command line, a thread for everything else."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from .config import ServeConfig
from .protocol import ServedPolicy
from .server import PolicyServer

SIGNALS = (signal.SIGTERM, signal.SIGINT)
OnReady = Callable[[PolicyServer], None]


async def serve(
    policy: ServedPolicy,
    config: ServeConfig,
    *,
    on_ready: OnReady | None = None,
    stop: asyncio.Event | None = None,
    handle_signals: bool = True,
) -> bool:
    """Serve until SIGTERM, SIGINT or `stop`, then shut down gracefully; a second signal cuts that short.

    `on_ready` is called with the listening server (its `port`, `url`, `metrics`). Signals can only be handled in the
    main thread (ValueError or RuntimeError otherwise). Returns whether every request in flight was answered. Raises
    OSError if the address cannot be had.
    """
    stop = stop or asyncio.Event()
    force = asyncio.Event()
    server = PolicyServer(policy, config)
    with _signals_to(stop, force) if handle_signals else contextlib.nullcontext():
        await server.start()
        try:
            if on_ready is not None:
                on_ready(server)
            await stop.wait()
        finally:
            answered = await server.drain(force)
    return answered


def serve_forever(policy: ServedPolicy, config: ServeConfig, *, on_ready: OnReady | None = None) -> int:
    """Run `serve` to its end and return an exit code: 0, or 1 if requests in flight had to be cut off."""
    return 0 if asyncio.run(serve(policy, config, on_ready=on_ready)) else 1


@contextlib.contextmanager
def _signals_to(stop: asyncio.Event, force: asyncio.Event) -> Iterator[None]:
    """Let the first signal set `stop`, any later one `force`."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def received() -> None:
        (force if stop.is_set() else stop).set()

    for number in SIGNALS:
        loop.add_signal_handler(number, received)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)  # to Python's default, which need not be what was there
            signal.signal(number, before[number])


class ServerThread:
    """A server in a thread of its own, for tests, demos and notebooks.

        with ServerThread(policy) as server:
            client = WebsocketClientPolicy("127.0.0.1", server.port)

    By default it listens on any free port of 127.0.0.1.
    """

    def __init__(self, policy: ServedPolicy, config: ServeConfig | None = None) -> None:
        self._policy = policy
        self._config = config or ServeConfig(host="127.0.0.1", port=0)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="turbopi-serve", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._server: PolicyServer | None = None
        self._error: BaseException | None = None
        self._answered = False

    @property
    def server(self) -> PolicyServer:
        """The running server. Raises RuntimeError before `start`."""
        if self._server is None:
            raise RuntimeError("the server thread has not been started; call start() or use it in a with statement")
        return self._server

    @property
    def port(self) -> int:
        """The port listened on."""
        return self.server.port

    @property
    def url(self) -> str:
        """The websocket URL, such as ws://127.0.0.1:8000."""
        return self.server.url

    def start(self, timeout_s: float = 30.0) -> Self:
        """Start and wait until it listens. Raises what kept it from that, such as OSError for a taken port."""
        self._thread.start()
        if not self._ready.wait(timeout_s):
            raise TimeoutError(f"the policy server was not listening after {timeout_s} s")
        if self._error is not None:
            raise self._error
        return self

    def stop(self) -> bool:
        """Shut down gracefully; whether every request in flight was answered. Raises what the server died of."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop ended by itself in this moment
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._answered

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            self._answered = asyncio.run(self._main())
        except BaseException as error:  # handed to the thread that called start() or stop()
            self._error = error
        finally:
            self._ready.set()

    async def _main(self) -> bool:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        return await serve(self._policy, self._config, on_ready=self._on_ready, stop=self._stop, handle_signals=False)

    def _on_ready(self, server: PolicyServer) -> None:
        self._server = server
        self._ready.set()
