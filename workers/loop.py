"""The loop that runs background jobs: claim, run, finish; one thread per kind, so that a long calibration never
holds up another kind. Store jobs go through a pipeline instead (`ingest`).

Rules:
- A job is claimed under a lease that its handler's beats renew; a worker that dies loses it, and the job resumes
  elsewhere.
- However a job ends, whoever waits for it hears it.
- A handler's own error fails the job with its code; an unexpected one is logged and reported as `internal`.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from service.app.engine import Engine, Handler
from service.errors import Conflict, EngramError
from service.storage.jobs import Job
from workers.ingest import POLL_S, Ingest

log = structlog.get_logger()

SEAL_POLL_S = 1.0
EXPIRE_S = 15.0  # what has expired is not returned, only still held: well within the minute that is promised
HOUSEKEEPING_S = 3600.0  # what is removed has an hour's grace, so oftener would find nothing


class Cancelled(Exception):
    """The job is no longer ours: cancelled, deleted with its collection, or taken over."""


class Worker(threading.Thread):
    def __init__(self, engine: Engine, kind: str, handler: Handler) -> None:
        super().__init__(name=f"worker-{kind}", daemon=True)
        self._engine = engine
        self._kind = kind
        self._handler = handler
        self._owner = f"{uuid.uuid4()}-{kind}"
        self._stopping = threading.Event()

    def run(self) -> None:
        repository = self._engine.repository
        while not self._stopping.is_set():
            seen = self._engine.resources.enqueued
            try:
                job = repository.claim([self._kind], self._owner)
            except EngramError as error:
                log.warning("no job could be claimed", kind=self._kind, detail=error.detail)
                self._stopping.wait(POLL_S)
                continue
            if job is None:
                self._engine.resources.wait_for_work(seen, POLL_S)
            else:
                self._run(job)

    def stop(self) -> None:
        """Ask the loop to end after the job it is at; at the next beat, that job goes back to the queue of those to
        resume.
        """
        self._stopping.set()

    def _run(self, job: Job) -> None:
        status = "done"
        try:
            result = self._handler(job, lambda progress: self._beat(job, progress))
            self._engine.repository.finish(job.id, result, self._owner)
        except Cancelled:
            status = "cancelled"
        except EngramError as error:
            status = "cancelled" if isinstance(error, Conflict) else "failed"
            self._fail(job, error.code, error.detail)
        except Exception:
            status = "failed"
            log.exception("a job failed", kind=job.kind, job=job.id)
            self._fail(job, "internal", "the server met an error of its own; its log has the details")
        self._engine.resources.metrics.jobs.labels(job.kind, status).inc()
        self._engine.resources.ended(job.id)

    def _beat(self, job: Job, progress: float) -> None:
        if self._stopping.is_set() or not self._engine.repository.heartbeat(job.id, self._owner, progress):
            raise Cancelled

    def _fail(self, job: Job, code: str, detail: str) -> None:
        try:
            self._engine.repository.fail(job.id, {"code": code, "detail": detail}, self._owner)
        except EngramError as error:
            log.warning("a job's failure could not be written", job=job.id, detail=error.detail)


class Housekeeper(threading.Thread):
    """Looks each second whether a bank should be sealed or a snapshot made, which keys there are and what is queued,
    four times a minute for what has expired, and each hour after what storage no longer needs.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="housekeeper", daemon=True)
        self._engine = engine
        self._stopping = threading.Event()

    def run(self) -> None:
        engine = self._engine
        every_s = {
            engine.follow_keys: SEAL_POLL_S,
            engine.watch_queue: SEAL_POLL_S,
            engine.snapshot_on_schedule: SEAL_POLL_S,
            engine.expire: EXPIRE_S,
            engine.housekeep: HOUSEKEEPING_S,
        }
        due = dict.fromkeys(every_s, 0.0)
        while not self._stopping.wait(SEAL_POLL_S):
            engine.seal()
            for task, at in due.items():
                if (now := time.monotonic()) >= at:
                    due[task] = now + every_s[task]
                    try:
                        task()
                    except EngramError as error:
                        log.warning("housekeeping failed", task=task.__name__, detail=error.detail)

    def stop(self) -> None:
        self._stopping.set()


@contextmanager
def running(engine: Engine) -> Iterator[None]:
    """Workers for every kind of job the engine has (unless the settings leave them to other processes), and the
    housekeeper, while the block runs."""
    workers: list[Worker | Housekeeper | Ingest] = [Housekeeper(engine)]
    if engine.resources.settings.jobs:
        workers += [Worker(engine, kind, handler) for kind, handler in engine.handlers().items()]
        workers += [Ingest(engine.resources)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.stop()
        engine.resources.wake_workers()
        for worker in workers:
            worker.join()
