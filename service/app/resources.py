"""What the use cases work with: storage, encoders, the collections in memory, and the signals between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from service.app.encoding import EncodeCache
from service.app.handover import Handover
from service.app.live import LiveCollection, MakeEncoder, rows_of
from service.errors import CollectionNotFound, EncodersChanged, EngramError
from service.observability import Metrics
from service.settings import Settings
from service.storage.blobs import Blobs
from service.storage.jobs import NewItem
from service.storage.repository import Repository
from service.storage.snapshot_store import WORKSPACE, Workspace, open_store

log = structlog.get_logger()

CALIBRATE_JOB = "calibrate"
KERNEL_JOB = "kernel"
REENCODE_JOB = "reencode"
SNAPSHOT_JOB = "snapshot"
RESTORE_JOB = "restore"
SUCCESSOR_WAIT_S = 10.0  # loading a hundred thousand memories takes a second
IMPORT_QUIET_S = 2.0  # an import is over when so long nothing of it was stored
IMPORT_SCANNED_MAX = 2**26  # values scanned by a recall until then: some 20 ms, where a scan is 2 ms else


@dataclass(frozen=True)
class _Waiting:
    collection_id: int | None
    done: Future[None]


class Resources:
    def __init__(self, settings: Settings, repository: Repository, blobs: Blobs, make_encoder: MakeEncoder) -> None:
        self.settings = settings
        self.repository = repository
        self.blobs = blobs
        self.make_encoder = make_encoder
        folder = settings.data / "snapshots"
        self.snapshots = open_store(settings.snapshots, folder)
        self.workspace = Workspace(folder / WORKSPACE)
        self.metrics = Metrics()
        self.encoded = EncodeCache(settings.encode_cache_bytes, self.metrics)
        self.decoded = Handover()
        self.metrics.encode_cache_bytes.set_function(lambda: self.encoded.bytes)
        self.lives: dict[str, LiveCollection] = {}
        self._by_id: dict[int, LiveCollection] = {}
        self.broken: dict[str, EngramError] = {}  # collections that could not be loaded, and why
        self._waiting: dict[str, _Waiting] = {}
        self._work = threading.Condition()
        self.look: Callable[[], None] = lambda: None  # at what other servers have written, now (see `following`)
        self.tell: Callable[[bool], None] = lambda of_job: None  # other servers of a commit, or a job (see `notices`)
        self._enqueued = 0  # jobs so far: who looked for one sees whether another has come since
        self._calibrating = threading.RLock()  # `enqueue` may itself find the job ended
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="seal")

    # --- collections ---

    def add(self, live: LiveCollection) -> None:
        if self.repository.is_shared:
            live.read_log = partial(self._read_log, live)
            live.tell = lambda: self.tell(False)
            self.tell(False)
        self._by_id[live.id] = live
        self.lives[live.name] = live
        self.metrics.memories.labels(live.name).set_function(lambda: live.view().count)

    def replace(self, live: LiveCollection) -> None:
        """Let a collection under changed encoders take the place of the former, for whoever asks from now on. Called by
        storage.
        """
        former = self._by_id.get(live.id)
        if former is not None:  # else deleted meanwhile
            live.calibration_job = former.calibration_job
            self.add(live)

    def remove(self, live: LiveCollection) -> None:
        """Forget a collection that is gone from SQL, and tell whoever waits for its jobs."""
        if self.lives.get(live.name) is live:  # the name may be another's by now
            del self.lives[live.name]
            self.metrics.forget(live.name)
        self._by_id.pop(live.id, None)
        for job_id, waiting in list(self._waiting.items()):
            if waiting.collection_id == live.id:
                self.ended(job_id)

    def succeed(self, live: LiveCollection) -> None:
        """Let a collection that was loaded anew answer, in place of its former self if there is one."""
        former = self._by_id.get(live.id)
        self.add(live)
        if former is not None:
            live.calibration_job = former.calibration_job
            former.writable.set()

    def live(self, name: str) -> LiveCollection:
        """Raises `CollectionNotFound`, or why the collection could not be loaded."""
        if name not in self.lives:
            self.look()
        live = self.lives.get(name)
        if live is not None:
            return live
        if name in self.broken:
            raise self.broken[name]
        raise CollectionNotFound(f"there is no collection {name}")

    def live_by_id(self, collection_id: int) -> LiveCollection:
        """Raises `CollectionNotFound`."""
        if collection_id not in self._by_id:
            self.look()
        live = self._by_id.get(collection_id)
        if live is None:
            raise CollectionNotFound("the collection was deleted meanwhile")
        return live

    def find(self, collection_id: int) -> LiveCollection | None:
        return self._by_id.get(collection_id)

    def all_lives(self) -> list[LiveCollection]:
        return list(self._by_id.values())

    def successor(self, live: LiveCollection) -> LiveCollection:
        """What a collection is under the encoders that it has by now, where a commit was refused for them. Raises
        `CollectionNotFound`, `EncodersChanged`.
        """
        deadline = time.monotonic() + SUCCESSOR_WAIT_S
        while (now := self.live_by_id(live.id)) is live:
            if time.monotonic() >= deadline:
                raise EncodersChanged(f"the encoders of {live.name} have changed; they are not loaded here yet")
            self.look()
        return now

    def _read_log(self, live: LiveCollection) -> None:
        """Bring a bank to the version that the database has, or a later one. 4,096 rows come at once; what is more is
        seen in parts, at the former version. To be called under `live.following`.
        """
        layout = [(space.name, space.dimension) for space in live.spaces.values()]
        before = live.bank.version
        with self.repository.iter_patterns(live.id, layout, since=before) as stream:
            deleted = stream.deleted
            if deleted is None:
                deleted = list(set(live.bank.view().all_ids()) - self.repository.ids(live.id))
            rows = None
            for chunk in stream.chunks:
                if rows is not None:
                    live.bring(rows, deleted, before)
                    deleted = []
                rows = rows_of(chunk)
            live.described = live.described or (rows is not None and self.repository.is_described(live.id))
            live.bring(rows, deleted, stream.version)

    @contextmanager
    def learning(self, collection_id: int) -> Iterator[LiveCollection]:
        """The collection, of which nothing is learned by others and no encoder changes while the block runs."""
        while True:
            live = self.live_by_id(collection_id)
            with live.learning:
                if self._by_id.get(collection_id) is live:
                    yield live
                    return

    # --- jobs ---

    def enqueue(
        self,
        kind: str,
        collection_id: int | None,
        items: Sequence[NewItem] = (),
        payload: Mapping[str, Any] | None = None,
    ) -> tuple[str, Future[None]]:
        """Commit a job and wake a worker. The future ends with the job, however it ends."""
        job_id = self.repository.enqueue(kind, collection_id, {**(payload or {}), "items": len(items)}, items)
        return job_id, self.watch(collection_id, job_id)

    def watch(self, collection_id: int | None, job_id: str) -> Future[None]:
        """Wake a worker for a job that is committed. The future ends with the job, however it ends."""
        with self._work:
            waiting = self._waiting.setdefault(job_id, _Waiting(collection_id, Future()))
            self._enqueued += 1
            self._work.notify_all()
        self.tell(True)
        # A worker may have finished it before the future was there to be told.
        if self.repository.get_job(job_id).status not in ("queued", "running"):
            self.ended(job_id)
        return waiting.done

    def ended(self, job_id: str) -> None:
        """Tell whoever waits for a job, here or at another server, that it has ended, however it did."""
        self.tell(False)
        self._hear(job_id)

    def _hear(self, job_id: str) -> None:
        with self._work:
            waiting = self._waiting.pop(job_id, None)
        if waiting is None:
            return
        live = None if waiting.collection_id is None else self._by_id.get(waiting.collection_id)
        with self._calibrating:
            if live is not None and live.calibration_job == job_id:
                live.calibration_job = None
        waiting.done.set_result(None)

    def hear_of_ended(self) -> None:
        """Tell whoever waits for jobs that other servers have ended."""
        for job_id in self.repository.ended(list(self._waiting)):
            self._hear(job_id)

    @property
    def enqueued(self) -> int:
        return self._enqueued

    def wait_for_work(self, since: int, timeout_s: float) -> None:
        """Wait until there is more work than when `enqueued` was `since`, which is to be read before looking for any:
        else a job that comes between the look and the wait would lie until the timeout.
        """
        with self._work:
            self._work.wait_for(lambda: self._enqueued != since, timeout_s)

    def wake_workers(self) -> None:
        with self._work:
            self._enqueued += 1
            self._work.notify_all()

    # --- what follows from a write ---

    def after_write(self, live: LiveCollection) -> None:
        """Seal and recalibrate in the background where it is due."""
        self.seal_if_due(live)
        self.calibrate_if_due(live)

    def seal_if_due(self, live: LiveCollection) -> None:
        """To be asked after writes, and every second or so: graphs are merged further when writes pause. While rows are
        imported it waits, up to a bound: else most graphs would be built only to be built again, larger.
        """
        if time.monotonic() - live.imported_s < IMPORT_QUIET_S and live.bank.scanned_values < IMPORT_SCANNED_MAX:
            return
        if live.bank.seal_due() and live.sealing.acquire(blocking=False):
            self._sealer.submit(self._seal, live)

    def calibrate_if_due(self, live: LiveCollection) -> None:
        with self._calibrating:
            if live.calibration_job is None and not live.faulty and live.calibration_state() in ("pending", "stale"):
                if self.repository.is_shared and (job_id := self.repository.active_job(live.id, CALIBRATE_JOB)):
                    with self._work:
                        self._waiting[job_id] = _Waiting(live.id, Future())
                    live.calibration_job = job_id
                    return
                job_id, done = self.enqueue(CALIBRATE_JOB, live.id)
                live.calibration_job = None if done.done() else job_id

    def _seal(self, live: LiveCollection) -> None:
        try:
            while live.bank.seal_due() and live.bank.seal():
                pass
        except Exception:
            # The tail is still scanned exactly: answers stay right, only slower.
            log.exception("sealing failed", collection=live.name)
        finally:
            live.sealing.release()

    def close(self) -> None:
        self._sealer.shutdown(wait=True, cancel_futures=True)
        for job_id in list(self._waiting):
            self.ended(job_id)
