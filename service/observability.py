"""What can be seen from outside while it runs: metrics for Prometheus, and structured logs on standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Generic, TypeVar

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

M = TypeVar("M", bound=MetricWrapperBase)

# A recall is tenths of a millisecond over vectors and up to a second over a photograph.
SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class _Children(dict[tuple[str, ...], M], Generic[M]):
    """A metric's children by their labels: looking one up here costs a tenth of what `labels` does."""

    def __init__(self, metric: M) -> None:
        super().__init__()
        self.metric = metric

    def __missing__(self, labels: tuple[str, ...]) -> M:
        child = self[labels] = self.metric.labels(*labels)
        return child


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
        self.calls = Counter("engram_grpc_requests", "gRPC calls", ["method", "status"], registry=self.registry)
        self.encodings = Counter(
            "engram_encode_cache",
            "Vectors that were needed, by whether they were remembered",
            ["encoder", "source", "outcome"],
            registry=self.registry,
        )
        self.encode_cache_bytes = Gauge(
            "engram_encode_cache_bytes", "Held by remembered vectors", registry=self.registry
        )
        self.encode_batch = Histogram(
            "engram_encode_batch_items", "Items that an encoder was given at once", ["encoder", "source"],
            buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry,
        )  # fmt: skip
        self.gate_margin = Histogram(
            "engram_gate_margin", "Score of a judged cue less its threshold: over 0 it is accepted", ["collection"],
            buckets=(-0.5, -0.2, -0.1, -0.05, -0.02, 0, 0.02, 0.05, 0.1, 0.2, 0.5), registry=self.registry,
        )  # fmt: skip
        self.jobs_waiting = Gauge(
            "engram_jobs_waiting", "Jobs queued, of all servers of the database", ["kind"], registry=self.registry
        )
        self.jobs_oldest_s = Gauge(
            "engram_jobs_oldest_seconds", "Age of the oldest of these", ["kind"], registry=self.registry
        )
        self.bank_lag = Gauge(
            "engram_bank_lag_versions", "Versions by which a bank was behind its database when it last looked",
            ["collection"], registry=self.registry,
        )  # fmt: skip
        # By the names of keys, of which there are a thousand at most. Requests without a key are not here.
        self.key_requests = Counter("engram_key_requests", "Requests let in", ["key"], registry=self.registry)
        self.key_bytes = Counter("engram_key_bytes_in", "Bytes of bodies received", ["key"], registry=self.registry)
        self.key_stored = Counter(
            "engram_key_stored", "Memories accepted to be stored", ["key"], registry=self.registry
        )
        self.key_recalls = Counter("engram_key_recalls", "Cues recalled", ["key"], registry=self.registry)
        self._by_key = tuple(map(_Children, (self.key_requests, self.key_bytes, self.key_stored, self.key_recalls)))
        self._recalls = _Children(self.recalls)
        self._margins = _Children(self.gate_margin)
        self._kinds_waiting: set[str] = set()
        self._stages = _Children(self.recall_seconds)
        self._requests = _Children(self.requests)
        self._calls = _Children(self.calls)
        self._encodings = _Children(self.encodings)

    def recalled(self, collection: str, spent_s: Mapping[str, float], verdicts: Iterable[str | None]) -> None:
        """Count a batch's cues by verdict, and its time by stage."""
        for stage, seconds in spent_s.items():
            self._stages[stage,].observe(seconds)
        for verdict in verdicts:
            self._recalls[collection, verdict or "error"].inc()

    def judged(self, collection: str, margin: float) -> None:
        self._margins[collection,].observe(margin)

    def queued(self, waiting: Mapping[str, tuple[int, float]]) -> None:
        """Note how many jobs of each kind wait, and the age in seconds of the oldest."""
        for kind in self._kinds_waiting.difference(waiting):
            self.jobs_waiting.labels(kind).set(0)
            self.jobs_oldest_s.labels(kind).set(0)
        for kind, (number, oldest_s) in waiting.items():
            self.jobs_waiting.labels(kind).set(number)
            self.jobs_oldest_s.labels(kind).set(oldest_s)
        self._kinds_waiting.update(waiting)

    def looked_up(self, encoder: str, source: str, hit: bool) -> None:
        self._encodings[encoder, source, "hit" if hit else "miss"].inc()

    def answered(self, method: str, status: int) -> None:
        self._requests[method, str(status)].inc()

    def called(self, method: str, status: str) -> None:
        self._calls[method, status].inc()

    def used(self, key: str | None, *, requests: int = 0, bytes_in: int = 0, stored: int = 0, recalls: int = 0) -> None:
        """Count what a key was used for."""
        if key is None:
            return
        for children, amount in zip(self._by_key, (requests, bytes_in, stored, recalls), strict=True):
            if amount:
                children[key,].inc(amount)

    def forget_keys_but(self, names: Collection[str]) -> None:
        """Drop what is counted by the names of keys that are gone."""
        for children in self._by_key:
            for labels in [labels for labels in list(children) if labels[0] not in names]:
                children.pop(labels, None)
                _remove(children.metric, *labels)

    def forget(self, collection: str) -> None:
        """Drop what is counted by this collection's name, if anything is."""
        for labels in [labels for labels in list(self._recalls) if labels[0] == collection]:
            self._recalls.pop(labels, None)
            _remove(self.recalls, *labels)
        self._margins.pop((collection,), None)
        _remove(self.gate_margin, collection)
        _remove(self.bank_lag, collection)
        _remove(self.stored, collection)
        _remove(self.memories, collection)


def _remove(metric: MetricWrapperBase, *labels: str) -> None:
    with suppress(KeyError):  # what earlier releases of prometheus_client raise where the labels are not there
        metric.remove(*labels)


def configure_logging(level: int = logging.INFO) -> None:
    """Structured lines on standard error: readable on a terminal, JSON elsewhere.

    Tracebacks are plain: one with local variables could show what is stored, or a key.
    """
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if terminal else [structlog.processors.format_exc_info]),
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
            if terminal
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # Looked up for each line: a program around the engine may put another stream there.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
