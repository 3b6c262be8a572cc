"""The policy server: openpi's websocket protocol on asyncio, with inference off the event loop (SPEC 4.1).

Every connection has at most one request under way, and requests take turns at one lock that is first come, first
served. A client that was just answered therefore queues behind everyone who waits: nobody is served twice while
another waits. Two threads do the work: one unpacks frames, so that a bad one is refused without waiting for a turn;
one forks, infers and packs. The event loop only moves bytes, and answers /healthz meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import logging
from time import perf_counter
from typing import Any

import websockets.asyncio.server
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from ..errors import InputError
from .config import ServeConfig
from .connection import PolicyConnection
from .http import Gate
from .metrics import ErrorKind, Metrics
from .protocol import ERROR_CLOSE_REASON, SHUTDOWN_CLOSE_REASON, ServedPolicy
from .session import Reply, Session, answer, bad_request, internal_error, parse_request
from .wire import encode
from .worker import Worker

logger = logging.getLogger("turbopi.serve")
request_logger = logging.getLogger("turbopi.serve.requests")

HANDSHAKE_TIMEOUT_S = 10
CLOSE_TIMEOUT_S = 5
REFUSAL_KINDS: dict[int, ErrorKind] = {
    CloseCode.MESSAGE_TOO_BIG: "too_big",
    CloseCode.PROTOCOL_ERROR: "protocol",
    CloseCode.INVALID_DATA: "protocol",
}


class ClientGoneError(Exception):
    """The client left while its request waited for its turn."""


class PolicyServer:
    """Serves one policy. `start`, then `drain` once; both on the same event loop."""

    def __init__(self, policy: ServedPolicy, config: ServeConfig) -> None:
        """Prepare to serve. Raises TypeError or ValueError if the policy's metadata cannot be sent."""
        self.config = config
        self.metrics = Metrics()
        self._policy = policy
        self._metadata_frame = encode(dict(policy.metadata))
        self._sessions: set[Session] = set()
        self._opened = 0
        self._draining = False
        self._turn = asyncio.Lock()
        self.port = config.port  # the port listened on, once started
        self._server: websockets.asyncio.server.Server
        self._codec: Worker
        self._inference: Worker

    @property
    def url(self) -> str:
        """A websocket URL of this server for clients on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.config.host, self.config.host)
        return f"ws://{host}:{self.port}"

    async def start(self) -> None:
        """Listen. Raises OSError if the address cannot be had."""
        self._server = await websockets.asyncio.server.serve(
            self._handle,
            self.config.host,
            self.config.port,
            create_connection=PolicyConnection,
            process_request=Gate(self.config, self.metrics, lambda: len(self._sessions)),
            compression=None,
            max_size=self.config.max_message_bytes,
            max_queue=0,  # one message at a time is read from a client; more would be memory without use
            open_timeout=HANDSHAKE_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            ping_interval=None,  # a robot that moves between two requests may not answer pings; TCP finds dead peers
            logger=logging.getLogger("turbopi.serve.websockets"),
        )
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._codec = Worker("turbopi-codec")
        self._inference = Worker("turbopi-inference")
        logger.info("serving on %s: %s", self.url, self.config.receipt())

    async def drain(self, force: asyncio.Event) -> bool:
        """Stop accepting, answer what was received, close every connection with 1001 and end the threads.

        Returns False if the grace ran out or `force` was set before every request in flight was answered; what was
        left is then cut off.
        """
        self._draining = True
        self._server.close(close_connections=False)
        idle = [session.connection for session in self._sessions if not session.busy]
        closing = [asyncio.create_task(_close_for_shutdown(connection)) for connection in idle]
        closed = asyncio.create_task(self._server.wait_closed())
        forced = asyncio.create_task(force.wait())
        await asyncio.wait({closed, forced}, timeout=self.config.shutdown_grace_s, return_when=asyncio.FIRST_COMPLETED)
        in_time = closed.done()
        if not in_time:
            logger.warning("shutting down with %d connections cut off", len(self._sessions))
            for session in list(self._sessions):
                session.connection.transport.abort()
                if session.task is not None:
                    session.task.cancel()
            await closed
        forced.cancel()
        await asyncio.gather(forced, *closing, return_exceptions=True)
        self._codec.stop(timeout_s=1.0)
        self._inference.stop(timeout_s=1.0 if in_time else 0.0)
        return in_time

    async def _handle(self, connection: ServerConnection) -> None:
        """One connection from its first frame to its last."""
        assert isinstance(connection, PolicyConnection)
        self._opened += 1
        session = Session(connection, self._opened, asyncio.current_task())
        self._sessions.add(session)
        self.metrics.connections.inc()
        try:
            await connection.send(self._metadata_frame)
            while not self._draining:
                if not await self._exchange(session):
                    await connection.close(CloseCode.INTERNAL_ERROR, ERROR_CLOSE_REASON)
                    return
            await _close_for_shutdown(connection)
        except ClientGoneError:
            self.metrics.error("disconnected")
        except ConnectionClosed as closed:
            self._count_close(session, closed)
        finally:
            self._sessions.discard(session)
            self.metrics.connections.dec()

    async def _exchange(self, session: Session) -> bool:
        """Receive one request and send its reply; False if that was an error."""
        message = await session.connection.recv()
        arrived = perf_counter()
        session.busy = True
        session.requests += 1
        self.metrics.requests.inc()
        reply = await self._reply(session, message)
        await session.connection.send(reply.frame)
        session.previous_total_s = reply.stages_s["total"] = perf_counter() - arrived
        if reply.error is None:
            self.metrics.answered(reply.stages_s)
        else:
            self.metrics.error(reply.error)
        if self.config.log_requests:
            _log_request(session, reply, len(message))
        session.busy = False
        return reply.error is None

    async def _reply(self, session: Session, message: bytes | str) -> Reply:
        """Unpack, wait for the turn, infer. Every fault becomes a reply; only a lost connection is raised."""
        try:
            arrived = perf_counter()
            observation = await self._codec.run(parse_request, message)
            decoded = perf_counter()
            reply, turn_began = await self._take_turn(session, observation)
            reply.stages_s |= {"decode": decoded - arrived, "queue": turn_began - decoded}
            return reply
        except InputError as error:
            return bad_request(error)
        except ClientGoneError:
            raise
        except Exception as error:
            logger.error("inference failed on connection %d", session.number, exc_info=error)
            return internal_error(error)

    async def _take_turn(self, session: Session, observation: dict[str, Any]) -> tuple[Reply, float]:
        """Infer when it is this connection's turn; also returns when that was."""
        self.metrics.queue_depth.inc()
        try:
            await self._turn.acquire()
        finally:
            self.metrics.queue_depth.dec()
        try:
            if not session.open:  # the client left while it waited: its turn goes to the next
                raise ClientGoneError
            began = perf_counter()
            with self.metrics.in_flight.track_inprogress():
                return await self._inference.run(answer, session, self._policy, observation), began
        finally:
            self._turn.release()

    def _count_close(self, session: Session, closed: ConnectionClosed) -> None:
        """Tell a refusal by the protocol layer, and a client lost in mid-request, from an ordinary goodbye."""
        if closed.sent is not None and closed.rcvd is None and closed.sent.code in REFUSAL_KINDS:
            self.metrics.error(REFUSAL_KINDS[closed.sent.code])
        elif session.busy:
            self.metrics.error("disconnected")


async def _close_for_shutdown(connection: ServerConnection) -> None:
    await connection.close(CloseCode.GOING_AWAY, SHUTDOWN_CLOSE_REASON)


def _log_request(session: Session, reply: Reply, received_bytes: int) -> None:
    record = {
        "connection": session.number,
        "request": session.requests,
        "outcome": reply.error or "ok",
        "received_bytes": received_bytes,
        "sent_bytes": len(reply.frame),
        **{f"{stage}_ms": round(seconds * 1000, 3) for stage, seconds in reply.stages_s.items()},
    }
    request_logger.info("%s", json.dumps(record))
