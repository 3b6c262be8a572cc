"""One client's websocket, with three things that the library's own connection lacks.

A frame that the protocol layer itself refuses (too big, too many fragments, not UTF-8, broken framing) is explained in
a text frame before the close, since that is where an openpi client looks for errors. A refused client that never
closes its side is dropped after a while. And a client that does not read is not read from either, so that its pings
cannot pile up answers in memory.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import CloseCode, Frame, Opcode

# Long enough for a client to finish sending an oversized message over a slow link: until then it cannot read.
LINGER_S = 60.0
KEEPALIVE_IDLE_S = 60
KEEPALIVE_INTERVAL_S = 15
KEEPALIVE_PROBES = 4
REFUSALS = {CloseCode.PROTOCOL_ERROR, CloseCode.INVALID_DATA, CloseCode.MESSAGE_TOO_BIG}


class PolicyConnection(ServerConnection):
    """A `websockets` server connection for openpi clients."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._linger: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask TCP to notice dead peers: websocket pings would also kill a client that is merely busy."""
        super().connection_made(transport)
        peer: socket.socket = transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)

    def send_data(self) -> None:
        """Write what the protocol layer has to say, an explanation first if it is refusing the client."""
        close = self.protocol.close_sent
        refusing = close is not None and close.code in REFUSALS and self.protocol.close_rcvd is None
        if refusing and self._linger is None and not self.transport.is_closing():
            assert close is not None
            text = f"The frame was refused and this connection is closed; connect again.\nInputError: {close.reason}"
            self.transport.write(Frame(Opcode.TEXT, text.encode()).serialize(mask=False))
            self._linger = self.loop.call_later(LINGER_S, self.transport.abort)
        super().send_data()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer with the connection."""
        if self._linger is not None:
            self._linger.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Stop reading from a client that does not read."""
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """Read again, unless a message that was already read still waits to be handled."""
        super().resume_writing()
        if not self.recv_messages.paused:
            self.transport.resume_reading()
