"""The plain HTTP part: /healthz, /metrics, and the checks before a websocket is opened."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from http import HTTPStatus

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from .config import ServeConfig
from .metrics import CONTENT_TYPE, Metrics

HEALTHY = "OK\n"


class Gate:
    """Answers a plain HTTP request, or lets a websocket handshake pass. `open_count` tells the open websockets."""

    def __init__(self, config: ServeConfig, metrics: Metrics, open_count: Callable[[], int]) -> None:
        self._expected = None if config.api_key is None else f"Api-Key {config.api_key}".encode()
        self._max_connections = config.max_connections
        self._metrics = metrics
        self._open_count = open_count

    def __call__(self, connection: ServerConnection, request: Request) -> Response | None:
        """Decide for `websockets`: a Response is sent as it is, None goes on with the handshake."""
        path = request.path.partition("?")[0]
        if path == "/healthz":  # open even with a key: a load balancer has none, and nothing is told
            return connection.respond(HTTPStatus.OK, HEALTHY)
        if not self._authorized(request):
            self._metrics.error("unauthorized")
            response = connection.respond(
                HTTPStatus.UNAUTHORIZED,
                "This server asks for an API key: send the header 'Authorization: Api-Key <key>' "
                "(openpi_client: WebsocketClientPolicy(..., api_key=<key>)).\n",
            )
            response.headers["WWW-Authenticate"] = "Api-Key"
            return response
        if path == "/metrics":
            response = connection.respond(HTTPStatus.OK, self._metrics.text())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE
            return response
        if self._open_count() >= self._max_connections:
            self._metrics.error("overloaded")
            return connection.respond(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"All {self._max_connections} connections of this server are taken; close one, or serve with a "
                "larger max_connections.\n",
            )
        return None

    def _authorized(self, request: Request) -> bool:
        if self._expected is None:
            return True
        sent = request.headers.get_all("Authorization")
        return len(sent) == 1 and hmac.compare_digest(sent[0].encode("utf-8", "surrogateescape"), self._expected)
