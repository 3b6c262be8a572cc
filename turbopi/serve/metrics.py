"""What the server counts, in Prometheus' text format; every server has a registry of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ErrorKind = Literal["bad_request", "internal", "too_big", "protocol", "unauthorized", "overloaded", "disconnected"]
ERROR_KINDS: tuple[ErrorKind, ...] = (
    "bad_request", "internal", "too_big", "protocol", "unauthorized", "overloaded", "disconnected",
)  # fmt: skip
POLICY_STAGES = ("transforms", "model", "encode_images", "prefill", "denoise")
SERVER_STAGES = ("decode", "queue", "infer", "total")
BUCKETS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class Metrics:
    """Counters of one server. Times are seconds, as Prometheus has it; the wire's `policy_timing` is milliseconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("turbopi_requests", "Requests received.", registry=self.registry)
        self.answers = Counter("turbopi_answers", "Requests answered with actions.", registry=self.registry)
        self._errors = Counter(
            "turbopi_errors",
            "Requests or connections that ended otherwise, by kind.",
            ["kind"],
            registry=self.registry,
        )
        self._stages = Histogram(
            "turbopi_stage_seconds",
            "Time of each stage of answered requests: the server's own (decode, queue, infer, total) and the policy's.",
            ["stage"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self.queue_depth = Gauge("turbopi_queue_depth", "Requests waiting for their turn.", registry=self.registry)
        self.in_flight = Gauge("turbopi_in_flight", "Requests being inferred (0 or 1).", registry=self.registry)
        self.connections = Gauge("turbopi_open_connections", "Open websockets.", registry=self.registry)
        for kind in ERROR_KINDS:  # so that every series exists, at 0, from the first scrape on
            self._errors.labels(kind)
        for stage in (*SERVER_STAGES, *POLICY_STAGES):
            self._stages.labels(stage)

    def error(self, kind: ErrorKind) -> None:
        """Count one error."""
        self._errors.labels(kind).inc()

    def answered(self, stages_s: Mapping[str, float]) -> None:
        """Count one answer and the seconds of its stages."""
        self.answers.inc()
        for stage, seconds in stages_s.items():
            self._stages.labels(stage).observe(seconds)

    def text(self) -> str:
        """Everything, as GET /metrics answers it."""
        return generate_latest(self.registry).decode()
