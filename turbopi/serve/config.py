"""What a policy server is told: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class ServeConfig:
    """Where and how a policy is served.

    `port` 0 takes any free port. `api_key` None serves everyone; otherwise every path except /healthz asks for the
    header `Authorization: Api-Key <key>`. `max_message_bytes` bounds one request, `max_connections` the open
    websockets. At a shutdown, requests already received have `shutdown_grace_s` seconds to be answered.
    `log_requests` writes one JSON line per request to the logger `turbopi.serve.requests` at level INFO.
    """

    host: str = "0.0.0.0"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_message_bytes: int = 64 * MEBIBYTE
    max_connections: int = 64
    shutdown_grace_s: float = 30.0
    log_requests: bool = False

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError("ServeConfig.host is empty; give an address to listen on, such as 127.0.0.1 or 0.0.0.0")
        self._require_integer("port", 0, 65535)
        self._require_integer("max_message_bytes", 1024, 2**31 - 1)
        self._require_integer("max_connections", 1, 65535)
        if not 0 <= self.shutdown_grace_s < float("inf"):
            raise ValueError(f"ServeConfig.shutdown_grace_s must be 0 seconds or more, got {self.shutdown_grace_s!r}")
        if self.api_key is not None and not _is_header_token(self.api_key):
            raise ValueError(
                "ServeConfig.api_key must be one or more printable ASCII characters without spaces, since it travels "
                "in an HTTP header; use None to serve without a key"
            )

    def _require_integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"ServeConfig.{name} must be an integer from {low} to {high}, got {value!r}")

    def receipt(self) -> dict[str, Any]:
        """Every field for a receipt or a log; of the key, only whether there is one."""
        return {**dataclasses.asdict(self), "api_key": self.api_key is not None}


def _is_header_token(text: str) -> bool:
    return bool(text) and all("!" <= character <= "~" for character in text)
