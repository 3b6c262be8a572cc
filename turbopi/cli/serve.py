"""`turbo-pi serve`: a policy behind openpi's websocket protocol."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from .options import PolicyOptions

if TYPE_CHECKING:
    from ..policy import Policy
    from ..serve import PolicyServer

REQUEST_LOGGER = "turbopi.serve.requests"
API_KEY_VARIABLE = "TURBO_PI_API_KEY"


def serve(
    policy: Annotated[PolicyOptions, tyro.conf.arg(name="")],
    host: str = "0.0.0.0",
    port: int = 8000,
    max_message_mib: int = 64,
    max_connections: int = 64,
    shutdown_grace_s: float = 30.0,
    log_requests: bool = False,
    record: Path | None = None,
    record_every: int = 10,
    record_mib: int = 2048,
) -> int:
    """Serve a policy to openpi clients until SIGTERM or Ctrl-C. Also answers /healthz and /metrics.

    Clients must send a key if the environment variable TURBO_PI_API_KEY holds one.

    Args:
        policy: which policy, and how to run it.
        host: address to listen on.
        port: to listen on; 0 takes any free one.
        max_message_mib: largest request, in MiB.
        max_connections: most clients at a time.
        shutdown_grace_s: seconds that requests in flight have to be answered when the server is told to stop.
        log_requests: print one JSON line per request.
        record: directory in which to keep observations, for `turbo-pi calibrate --frames`.
        record_every: keep the first of this many answered requests.
        record_mib: most that the directory may hold, in MiB.
    """
    from ..serve import ServeConfig, serve_forever
    from ..serve.recorder import MEBIBYTE, RecordConfig, Recorder, RecordingPolicy

    console = Console(stderr=True, soft_wrap=True)
    _refuse_chunks(policy)
    if log_requests:
        _print_requests()
    config = ServeConfig(
        host=host,
        port=port,
        api_key=os.environ.get(API_KEY_VARIABLE),
        max_message_bytes=max_message_mib * 1024 * 1024,
        max_connections=max_connections,
        shutdown_grace_s=shutdown_grace_s,
        log_requests=log_requests,
    )
    limits = None if record is None else RecordConfig(record, record_every, max_bytes=record_mib * MEBIBYTE)
    recorder = None if limits is None else Recorder(limits)
    loaded = policy.load()
    announce = partial(_announce, console, policy.checkpoint, loaded)
    if recorder is None:
        return serve_forever(loaded, config, on_ready=announce)
    try:
        return serve_forever(RecordingPolicy(loaded, recorder), config, on_ready=announce)
    finally:
        recorder.close()
        console.print(f"recorded {recorder.written} observations in {record}, {recorder.dropped} left out")


def _refuse_chunks(policy: PolicyOptions) -> None:
    """Raise ValueError for a runtime that plays chunks, before anything is loaded."""
    runtime = policy.tick().get("runtime")
    if runtime is not None and runtime.chunking is not None:
        raise ValueError(
            "chunking plays chunks beside the robot, and a server's clients play theirs themselves: serve a runtime "
            "without it, and give the client its replan interval"
        )


def _announce(console: Console, checkpoint: Path, loaded: Policy, server: PolicyServer) -> None:
    console.print(
        f"serving {checkpoint} for {loaded.transforms.robot.name} on {server.url} "
        f"({loaded.engine.name}, {loaded.engine.precision}, {loaded.engine.device})"
    )
    if loaded.remembers:
        console.print(
            "this runtime remembers the episode: clients connect anew for each, or send reset=True with its first "
            "observation"
        )


def _print_requests() -> None:
    """Let the server's request log through to the terminal."""
    requests = logging.getLogger(REQUEST_LOGGER)
    requests.setLevel(logging.INFO)
    requests.addHandler(logging.StreamHandler())
