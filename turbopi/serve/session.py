"""One connection's state and one request's way: bytes in, a reply out."""

from __future__ import annotations

import asyncio
import traceback
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from websockets.protocol import State

from ..errors import InputError
from .connection import PolicyConnection
from .metrics import POLICY_STAGES, ErrorKind
from .protocol import RESET_KEY, ServedPolicy
from .wire import decode, encode

MAX_ERROR_CHARACTERS = 16_384


@dataclass(eq=False)
class Session:
    """A connection, its own fork of the policy (made at its first request) and what its last reply took."""

    connection: PolicyConnection
    number: int
    task: asyncio.Task[Any] | None
    policy: ServedPolicy | None = None
    busy: bool = False
    requests: int = 0
    previous_total_s: float | None = None

    @property
    def open(self) -> bool:
        """Whether a reply could still be sent."""
        return self.connection.state is State.OPEN


@dataclass
class Reply:
    """What goes back: packed actions (binary frame) or an error (text frame); and seconds per stage, to be counted."""

    frame: bytes | str
    error: ErrorKind | None = None
    stages_s: dict[str, float] = field(default_factory=dict)


def parse_request(message: bytes | str) -> dict[str, Any]:
    """One frame of a client as an observation. Raises InputError; runs in the codec thread."""
    if isinstance(message, str):
        raise InputError("a text frame came, expected a binary frame with a msgpack map (openpi_client sends these)")
    if not message:
        raise InputError("an empty frame came, expected a binary frame with a msgpack map")
    return decode(message)


def answer(session: Session, source: ServedPolicy, observation: dict[str, Any]) -> Reply:
    """Infer and pack; runs in the inference thread. `source` is forked at the connection's first request.

    An observation with "reset": True begins an episode: nothing of the connection's last one is used.

    Raises InputError for the client's faults; what else it raises is the server's.
    """
    if session.policy is None:
        session.policy = source.fork()
    begins = observation.pop(RESET_KEY, False)
    if not isinstance(begins, bool | np.bool_):
        raise InputError(
            f"{RESET_KEY!r} is {begins!r}, expected True with an episode's first observation, or no such key"
        )
    if begins:
        session.policy.reset()
    start = perf_counter()
    result = session.policy.infer(observation)
    infer_s = perf_counter() - start
    server_timing = {"infer_ms": infer_s * 1000}
    if session.previous_total_s is not None:
        server_timing["prev_total_ms"] = session.previous_total_s * 1000
    frame = encode({**result, "server_timing": server_timing})
    timing = result.get("policy_timing", {})
    policy_s = {stage: float(timing[f"{stage}_ms"]) / 1000 for stage in POLICY_STAGES if f"{stage}_ms" in timing}
    return Reply(frame, stages_s={**policy_s, "infer": infer_s})


def bad_request(error: InputError) -> Reply:
    """Make the reply to a request that cannot be used: what was wrong, without our call stack."""
    cause = " ".join(str(error).split())  # one line, so that a client can take the last one as the reason
    text = f"The request was refused and this connection is closed; connect again.\nInputError: {cause}"
    return Reply(_frame_text(text), error="bad_request")


def internal_error(error: Exception) -> Reply:
    """Make the reply to a fault of ours: the whole traceback, as openpi's clients expect it."""
    return Reply(_frame_text("".join(traceback.format_exception(error)).rstrip("\n")), error="internal")


def _frame_text(text: str) -> str:
    """Bounded, the end kept since it names the error, and free of what UTF-8 cannot carry."""
    if len(text) > MAX_ERROR_CHARACTERS:
        text = "…" + text[-MAX_ERROR_CHARACTERS:]
    return text.encode("utf-8", "backslashreplace").decode()
