"""Serving a policy over openpi's websocket protocol, with /healthz and Prometheus /metrics (SPEC 4.1)."""

try:
    import msgpack as _msgpack  # noqa: F401
    import prometheus_client as _prometheus_client  # noqa: F401
    import websockets as _websockets  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"serving needs the package {error.name}, which is not installed; pip install 'turbo-pi[serve]'",
        name=error.name,
    ) from error

from .config import ServeConfig
from .metrics import Metrics
from .protocol import ServedPolicy
from .run import ServerThread, serve, serve_forever
from .server import PolicyServer
from .wire import decode, encode

__all__ = [
    "Metrics",
    "PolicyServer",
    "ServeConfig",
    "ServedPolicy",
    "ServerThread",
    "decode",
    "encode",
    "serve",
    "serve_forever",
]
