"""A policy behind openpi's websocket protocol, as an evaluation drives it: every episode is a connection of its own.

The protocol has no reset. A server that gives each connection its own noise stream (ours does) thereby starts every
episode from its own seed; the seed of the evaluation does not reach it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import ClientConnection, connect

from ..serve import decode, encode
from .sources import EpisodePolicy, OpenPolicy

CONNECT_SECONDS = 10.0
REPLY_SECONDS = 120.0


class RemotePolicyError(ConnectionError):
    """The server is not there, or fell silent; trying again may help."""


class RefusedError(ValueError):
    """The server answered with an error, or with something that is no answer: trying again will not help."""


def websocket_url(address: str) -> str:
    """ws://host:port of "host:port" or of a URL. Raises ValueError for anything else."""
    url = address if "://" in address else f"ws://{address}"
    scheme, _, rest = url.partition("://")
    host, colon, port = rest.rstrip("/").rpartition(":")
    if scheme not in ("ws", "wss") or not colon or not host or not port.isdigit():
        raise ValueError(f"{address!r} is no policy server's address, expected host:port or ws://host:port")
    return f"{scheme}://{host}:{port}"


@dataclass(frozen=True)
class RemoteSource:
    """A policy server.

    Attributes:
        address: host:port, or ws://host:port.
        api_key: sent where the server asks for one; never written down.
    """

    address: str
    api_key: str | None = None

    def describe(self) -> dict[str, Any]:
        """The server's address and what it says of itself. Raises RemotePolicyError if it is not there."""
        return {"remote": websocket_url(self.address), "server_metadata": _plain(self._hello())}

    def open(self) -> OpenPolicy:
        """Check that the server is there. Raises RemotePolicyError."""
        return _RemotePolicy(self, self._hello())

    def connect(self, stack: contextlib.ExitStack) -> tuple[ClientConnection, dict[str, Any]]:
        """A fresh connection, which `stack` will close, and the server's metadata.

        Raises:
            RemotePolicyError: nobody answers.
            RefusedError: somebody does, and it is no policy server, or it wants a key.
        """
        url = websocket_url(self.address)
        headers = {"Authorization": f"Api-Key {self.api_key}"} if self.api_key else None
        try:
            connection = stack.enter_context(
                connect(url, compression=None, max_size=None, open_timeout=CONNECT_SECONDS, additional_headers=headers)
            )
        except InvalidHandshake as error:
            raise RefusedError(
                f"{url} refused the connection ({error}); it must be a policy server, and TURBO_PI_API_KEY its key"
            ) from error
        except (OSError, EOFError) as error:
            raise RemotePolicyError(
                f"no policy server answers at {url} ({error}); start one with turbo-pi serve --checkpoint …"
            ) from error
        return connection, receive(connection, url)

    def _hello(self) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            return self.connect(stack)[1]


class _RemotePolicy:
    def __init__(self, source: RemoteSource, metadata: Mapping[str, Any]) -> None:
        self._source = source
        self._metadata = metadata
        self._episode: RemoteEpisode | None = None

    def describe(self) -> dict[str, Any]:
        return {"remote": websocket_url(self._source.address), "server_metadata": _plain(self._metadata)}

    def episode(self, noise_seed: int) -> EpisodePolicy:
        """A policy that connects afresh; the server's own seed counts, `noise_seed` cannot reach it."""
        if self._episode is not None:
            self._episode.close()
        self._episode = RemoteEpisode(self._source, self._metadata)
        return self._episode


class RemoteEpisode:
    """One connection at a time; `reset` makes a new one, which is how a server starts its noise again.

    Args:
        source: the server.
        metadata: what it has said of itself; None: what it will say when it is first connected to.
    """

    def __init__(self, source: RemoteSource, metadata: Mapping[str, Any] | None = None) -> None:
        self._source = source
        self._metadata = metadata
        self._stack = contextlib.ExitStack()
        self._connection: ClientConnection | None = None

    def reset(self) -> None:
        """Connect afresh. Raises as `RemoteSource.connect`, and RefusedError if the server is another one by now."""
        self.close()
        connection, metadata = self._source.connect(self._stack)
        if self._metadata is not None and _text(metadata) != _text(self._metadata):
            self.close()
            raise RefusedError(
                f"the policy server at {websocket_url(self._source.address)} was exchanged during the run: it "
                f"said {_text(self._metadata)} of itself and says {_text(metadata)}; evaluate each policy into its own "
                "directory"
            )
        self._connection, self._metadata = connection, metadata

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            RemotePolicyError: the connection broke, or no answer came in time.
            RefusedError: the server answered with an error.
        """
        if self._connection is None:
            self.reset()
        connection, url = self._connection, websocket_url(self._source.address)
        assert connection is not None
        try:
            connection.send(encode(observation))
        except ConnectionClosed as error:
            raise RemotePolicyError(f"the connection to {url} was closed ({error}); see the server's log") from error
        return receive(connection, url)

    def close(self) -> None:
        """Leave the server; closing twice is harmless."""
        self._connection = None
        self._stack.close()


def receive(connection: ClientConnection, url: str) -> dict[str, Any]:
    """One message of the server's. Raises RemotePolicyError or RefusedError, see `RemoteEpisode.infer`."""
    try:
        message = connection.recv(timeout=REPLY_SECONDS)
    except TimeoutError as error:
        raise RemotePolicyError(f"{url} did not answer within {REPLY_SECONDS:.0f} s; see the server's log") from error
    except ConnectionClosed as error:
        raise RemotePolicyError(f"the connection to {url} was closed ({error}); see the server's log") from error
    if isinstance(message, str):
        lines = message.strip().splitlines() or ["(nothing)"]
        raise RefusedError(f"the policy server at {url} answered with an error: {lines[-1]}")
    try:
        return decode(message)
    except ValueError as error:
        raise RefusedError(f"the policy server at {url} sent something that is no answer: {error}") from error


def _text(metadata: Mapping[str, Any]) -> str:
    """For comparisons: NaN is as it was."""
    return json.dumps(_plain(metadata), sort_keys=True)


def _plain(values: Any) -> Any:
    """JSON values of what came over the wire."""
    if isinstance(values, Mapping):
        return {str(key): _plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_plain(value) for value in values]
    if hasattr(values, "tolist"):
        return values.tolist()
    return values if isinstance(values, (str, int, float, bool, type(None))) else repr(values)
