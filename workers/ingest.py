"""The pipeline that store jobs go through, so that the model neither waits for files nor for the disk.

    intake ──────────▶ decoders ───────▶ encoder ────────────▶ committer
    claims jobs,       decode files      one thread that       looks for duplicates, commits with the items' answers,
    reads their items  (several threads) only encodes          renews leases, ends jobs

Rules:
- Items go through in the order of their jobs, and of their places within them: what was accepted later is committed
  later, so of two memories with one id the later one stays.
- The encoder takes what is ready, of whatever jobs and collections, `ENCODE_BATCH` at most, and waits for nothing but
  the first: a lone item starts at once, and while a batch is encoded the next one gathers.
- What is between intake and encoder is bounded by `PIXELS_HELD` (pictures are decoded only when there is room for
  them; the picture of one item may be larger) and `ITEMS_HELD`, what is between encoder and committer by `ITEMS_HELD`.
- Items are answered in the transaction that stores them. After a crash a job goes on at its first item that is not
  answered; what was encoded and not committed is encoded again.
- A job that storage could not be asked about, or did not take for now, is let go of: it is resumed once its lease has
  run out, here or elsewhere.
- Of a job that has failed or is no longer ours (cancelled, deleted with its collection, taken over), what is under way
  is dropped. Whoever waits for a job hears its end, whatever it was.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal

import structlog

from service.app.cues import ENCODE_BATCH, PIXELS_AT_ONCE, encode_memories
from service.app.live import LiveCollection
from service.app.resources import Resources
from service.app.store import STORE_JOB, Arriving, arriving, commit_encoded, decode, job_result
from service.encoders.protocol import Picture
from service.errors import Conflict, EncoderMismatch, EncodersChanged, EngramError, StorageUnavailable, TooBusy
from service.storage.jobs import Job

log = structlog.get_logger()

PIXELS_HELD = PIXELS_AT_ONCE  # of decoded pictures: 100 MB, and as much again waits in `Resources.decoded`
PIXELS_ENCODED = PIXELS_HELD // 2  # of one batch, so that there is room for the next one to gather
ITEMS_HELD = 4 * ENCODE_BATCH  # texts and vectors are small; more ahead of the model would gain nothing
JOBS_CLAIMED_MAX = ENCODE_BATCH  # jobs of one item each that fill a batch
DECODERS_MAX = 8  # a core decodes some 200 photographs of a megapixel a second, more than a model on the others takes
BEAT_S = 1.0  # progress is seen as often; a lease lasts fifteen seconds
POLL_S = 1.0  # how late a job can start when nobody told of it

INTERNAL = "the server met an error of its own; its log has the details"


@dataclass(eq=False)
class _Run:
    """A claimed job on its way: `progress` of what is committed; `ended` once nothing more is to be done of it."""

    job: Job
    collection_id: int
    progress: float = 0.0
    ended: Literal["done", "failed", "cancelled"] | None = None


@dataclass(eq=False)
class _Entry:
    """An item on its way, or (without one) the end of its job, with why it cannot be gone on with."""

    run: _Run
    item: Arriving | None
    picture: Future[Picture] | None = None
    failure: EngramError | None = None

    @property
    def pixels(self) -> int:
        return 0 if self.item is None else self.item.pixels


class Ingest:
    """Runs store jobs from `start` to `stop`; `join` waits until nothing of them is under way."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._owner = f"{uuid.uuid4()}-{STORE_JOB}"
        self._stopping = threading.Event()
        self._changed = threading.Condition()  # guards all below
        self._runs: dict[str, _Run] = {}
        self._gathered: deque[_Entry] = deque()
        self._encoded: deque[_Entry] = deque()
        self._items_held = self._pixels_held = 0
        self._encoder_ended = False
        spare = (os.cpu_count() or 1) - resources.settings.threads
        self._decoders = ThreadPoolExecutor(min(DECODERS_MAX, max(1, spare)), thread_name_prefix="decode")
        steps = {"intake": self._take_in, "encode": self._encode, "commit": self._commit}
        self._threads = [threading.Thread(target=step, name=f"ingest-{name}") for name, step in steps.items()]

    def start(self) -> None:
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def stop(self) -> None:
        """Ask the pipeline to end: the batch that is encoded is still committed; jobs that are not done are resumed."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        self._decoders.shutdown(cancel_futures=True)
        for run in self._runs.values():
            self._tell(run)

    # --- intake ---

    def _take_in(self) -> None:
        repository, resources = self._resources.repository, self._resources
        while not self._stopping.is_set():
            seen = resources.enqueued
            try:
                jobs = repository.claim_together([STORE_JOB], self._owner, JOBS_CLAIMED_MAX, beside=bool(self._runs))
            except EngramError as error:
                log.warning("no job could be claimed", kind=STORE_JOB, detail=error.detail)
                self._stopping.wait(POLL_S)
                continue
            if not jobs:
                resources.wait_for_work(seen, POLL_S)
            for run in [run for job in jobs if (run := self._admitted(job)) is not None]:
                self._read(run)
            if any(job.attempts > 1 for job in jobs):  # interrupted before: by itself, see `claim_together`
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping.is_set() or not self._runs)

    def _admitted(self, job: Job) -> _Run | None:
        assert job.collection_id is not None
        run = _Run(job, job.collection_id, job.progress)
        with self._changed:
            if job.id in self._runs:  # its lease ran out under us, and it is ours again
                return None
            self._runs[job.id] = run
        return run

    def _read(self, run: _Run) -> None:
        """Put a job's items into the pipeline, and its end behind them."""
        after, failure = -1, None
        try:
            while items := self._resources.repository.pending_items(run.job.id, ENCODE_BATCH, after):
                for item in items:
                    if self._stopping.is_set():
                        return  # without an end: it is resumed
                    if run.ended:
                        break
                    self._put(_Entry(run, arriving(self._resources, run.collection_id, run.job.id, item)))
                if run.ended:
                    break
                after = items[-1].position
        except EngramError as error:
            failure = error
        except Exception:
            log.exception("a job could not be read", job=run.job.id)
            failure = EngramError(INTERNAL)
        self._put(_Entry(run, None, failure=failure))

    def _put(self, entry: _Entry) -> None:
        def fits() -> bool:
            room = self._pixels_held + entry.pixels <= PIXELS_HELD and self._items_held < ITEMS_HELD
            return room or not self._items_held or self._stopping.is_set()

        with self._changed:
            self._changed.wait_for(fits)
            self._items_held += 1
            self._pixels_held += entry.pixels
            if entry.item is not None and entry.pixels:
                entry.picture = self._decoders.submit(decode, self._resources, entry.item)
            self._gathered.append(entry)
            self._changed.notify_all()

    # --- encoder ---

    def _encode(self) -> None:
        while batch := self._ready():
            items = []
            for entry in batch:
                if entry.item is not None and not entry.run.ended:
                    items.append(entry.item)
                    if entry.picture is not None:
                        _decoded(entry.item, entry.picture)
                entry.picture = None
            try:
                good = [item for item in items if item.outcome is None]
                encoded = encode_memories([(item.parts, item.wanted) for item in good], self._resources.encoded)
                for item, outcome in zip(good, encoded, strict=True):
                    item.outcome = outcome
            except Exception:
                log.exception("a batch could not be encoded")
                for item in items:
                    item.outcome = item.outcome or EngramError(INTERNAL)
            for item in items:
                item.parts.picture = None
            with self._changed:
                self._items_held -= len(batch)
                self._pixels_held -= sum(entry.pixels for entry in batch)
                self._encoded.extend(batch)
                self._changed.notify_all()
                self._changed.wait_for(lambda: len(self._encoded) < ITEMS_HELD or self._stopping.is_set())
        with self._changed:
            self._encoder_ended = True
            self._changed.notify_all()

    def _ready(self) -> list[_Entry]:
        """The next batch: the first entry, once it is decoded, and those behind it that are; none at the stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._gathered or self._stopping.is_set())
            if self._stopping.is_set():
                return []
            first = self._gathered.popleft()
        if first.picture is not None:
            wait([first.picture])
        batch, pixels = [first], first.pixels
        with self._changed:
            while self._gathered and len(batch) < ENCODE_BATCH and pixels < PIXELS_ENCODED:
                entry = self._gathered[0]
                if entry.picture is not None and not entry.picture.done():
                    break
                batch.append(self._gathered.popleft())
                pixels += entry.pixels
        return batch

    # --- committer ---

    def _commit(self) -> None:
        beaten_s = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._encoded or self._encoder_ended, BEAT_S)
                entries = list(self._encoded)
                self._encoded.clear()
                self._changed.notify_all()
                if not entries and self._encoder_ended:
                    return
            self._store(entries)
            self._end([entry for entry in entries if entry.item is None])
            if time.monotonic() - beaten_s >= BEAT_S:
                beaten_s = time.monotonic()
                self._beat()

    def _store(self, entries: Sequence[_Entry]) -> None:
        """Commit a stretch of the pipeline, collection by collection; where that fails, job by job."""
        by_collection: dict[LiveCollection, list[_Entry]] = {}
        for entry in entries:
            if entry.item is not None and not entry.run.ended:
                by_collection.setdefault(entry.item.live, []).append(entry)
        for group in by_collection.values():
            runs = list({entry.run: None for entry in group})
            try:
                self._commit_all(group)
                continue
            except Exception as error:
                if len(runs) == 1:
                    self._lose(runs[0], error)
                    continue
            for run in runs:
                try:
                    self._commit_all([entry for entry in group if entry.run is run])
                except Exception as error:
                    self._lose(run, error)

    def _commit_all(self, group: Sequence[_Entry]) -> None:
        items = [entry.item for entry in group if entry.item is not None]
        while True:
            try:
                commit_encoded(self._resources, items[0].live, items)
                break
            except EncodersChanged:
                self._resources.successor(items[0].live)
                items = [self._encoded_again(entry.run, item) for entry, item in zip(group, items, strict=True)]
        for entry, item in zip(group, items, strict=True):
            entry.run.progress = min(1.0, (item.item.position + 1) / entry.run.job.payload["items"])

    def _encoded_again(self, run: _Run, item: Arriving) -> Arriving:
        """An item that former encoders encoded, by those there are now."""
        again = arriving(self._resources, run.collection_id, item.job_id, item.item)
        try:
            if again.pixels:
                again.parts.picture = decode(self._resources, again)
            (again.outcome,) = encode_memories([(again.parts, again.wanted)], self._resources.encoded)
        except EngramError as error:
            again.outcome = error
        again.parts.picture = None
        return again

    def _end(self, ends: Iterable[_Entry]) -> None:
        """End the jobs of which all items are answered, and let go of those that are lost."""
        results = {}
        runs = []
        for entry in ends:
            run = entry.run
            runs.append(run)
            try:
                if entry.failure is not None:
                    raise entry.failure
                if not run.ended:
                    results[run.job.id] = job_result(self._resources, run.job.id)
            except Exception as error:
                self._lose(run, error)
        done: set[str] = set()
        if results:
            try:
                done = self._resources.repository.finish_together(results, self._owner)
            except Exception as error:
                for run in runs:
                    self._lose(run, error)
        for run in runs:
            run.ended = run.ended or ("done" if run.job.id in done else "cancelled")
        with self._changed:
            for run in runs:
                self._runs.pop(run.job.id, None)
            self._changed.notify_all()
        for run in runs:
            self._tell(run)

    def _lose(self, run: _Run, error: Exception) -> None:
        """Go on without a job. Where it is still ours, and storage answers, it has failed, and the row says why. One
        that lacks its encoder keeps its items, and is queued again when its space has one.
        """
        if run.ended:
            return
        lost = isinstance(error, (Conflict, StorageUnavailable, TooBusy)) and not isinstance(error, EncoderMismatch)
        run.ended = "cancelled" if lost else "failed"
        if lost:
            return
        if not isinstance(error, EngramError):
            log.error("a job failed", kind=STORE_JOB, job=run.job.id, exc_info=error)
            error = EngramError(INTERNAL)
        self._fail(run.job, error)

    def _fail(self, job: Job, error: EngramError) -> None:
        try:
            self._resources.repository.fail(job.id, {"code": error.code, "detail": error.detail}, self._owner)
        except EngramError as unwritten:
            log.warning("a job's failure could not be written", job=job.id, detail=unwritten.detail)

    def _tell(self, run: _Run) -> None:
        self._resources.metrics.jobs.labels(STORE_JOB, run.ended or "cancelled").inc()
        self._resources.ended(run.job.id)

    def _beat(self) -> None:
        """Renew the leases; find out which jobs are not ours any more."""
        with self._changed:
            runs = [run for run in self._runs.values() if not run.ended]
        if not runs:
            return
        try:
            kept = self._resources.repository.heartbeats(self._owner, {run.job.id: run.progress for run in runs})
        except EngramError as error:
            log.warning("leases could not be renewed", detail=error.detail)
            return
        for run in runs:
            if run.job.id not in kept:
                run.ended = "cancelled"


def _decoded(item: Arriving, picture: Future[Picture]) -> None:
    """Take an item's picture, or why there is none."""
    try:
        item.parts.picture = picture.result()
    except EngramError as error:
        item.outcome = error
    except Exception:
        log.exception("a picture could not be read", job=item.job_id)
        item.outcome = EngramError(INTERNAL)
