"""What can be seen from outside while it runs: metrics for Prometheus, and structured logs on standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from functools import cache  # of methods: an engine's metrics live as long as its process, and labels are few

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# A recall is tenths of a millisecond over vectors and up to a second over a photograph.
SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """One registry per engine, so that several engines in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.recalls = Counter("engram_recalls", "Cues recalled", ["collection", "verdict"], registry=self.registry)
        self.recall_seconds = Histogram(
            "engram_recall_stage_seconds",
            "Time of a batch, by stage",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.stored = Counter("engram_stored", "Memories committed", ["collection"], registry=self.registry)
        self.memories = Gauge("engram_memories", "Memories in the bank", ["collection"], registry=self.registry)
        self.jobs = Counter("engram_jobs", "Background jobs ended", ["kind", "status"], registry=self.registry)
        self.requests = Counter("engram_http_requests", "HTTP requests", ["method", "status"], registry=self.registry)

    def recalled(self, collection: str, spent_s: Mapping[str, float], verdicts: Iterable[str | None]) -> None:
        """Count a batch's cues by verdict, and its time by stage."""
        for stage, seconds in spent_s.items():
            self._stage(stage).observe(seconds)
        for verdict in verdicts:
            self._recalls(collection, verdict or "error").inc()

    def answered(self, method: str, status: int) -> None:
        self._requests(method, status).inc()

    @cache  # noqa: B019
    def _requests(self, method: str, status: int) -> Counter:
        return self.requests.labels(method, status)

    @cache  # noqa: B019
    def _recalls(self, collection: str, verdict: str) -> Counter:
        return self.recalls.labels(collection, verdict)

    @cache  # noqa: B019
    def _stage(self, stage: str) -> Histogram:
        return self.recall_seconds.labels(stage)


def configure_logging(level: int = logging.INFO) -> None:
    """Structured lines on standard error: readable on a terminal, JSON elsewhere."""
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if terminal else [structlog.processors.format_exc_info]),
            structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
