"""The engine: every use case behind one object, for REST, for the workers and for a client in the same process.

It is opened on a data folder, which it owns until it is closed. Loading rebuilds the banks from SQL.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import structlog

from service.app import collections, memories, payload_indexes, restore, snapshot_schedule, snapshots
from service.app.absent import AbsentEncoder
from service.app.access import CALLER, Level, Need, check
from service.app.admission import Admission
from service.app.batching import MicroBatcher
from service.app.calibrate import run_calibrate_job
from service.app.completion import describe
from service.app.cues import CueBlocks, cue_of_memory, encode_cues, in_batches, read_parts
from service.app.diagnose import diagnose
from service.app.encoding import Parts, run_once
from service.app.exporting import Export, export
from service.app.fields import AtVersion
from service.app.following import Follower
from service.app.freshness import live_at, stored_at
from service.app.importing import run_import
from service.app.kernel_schemas import KernelList, TrainKernel
from service.app.kernels import enqueue_kernel, listed, retire, run_kernel_job
from service.app.keys import Keys
from service.app.known_cues import enqueue_training
from service.app.limits import Limiter
from service.app.live import LiveCollection
from service.app.memory_schemas import (
    CountReply,
    CountRequest,
    DeleteReply,
    DeleteRequest,
    GetReply,
    GetRequest,
    MemoryInfo,
    PatchReply,
    PatchRequest,
    PayloadIndex,
    PayloadIndexList,
    ScrollReply,
    ScrollRequest,
)
from service.app.notices import Notices
from service.app.patch import patch
from service.app.recall import Recalled, empty_result, recall_blocks
from service.app.recall_options import Resolved, check_size, resolve
from service.app.recall_schemas import RecallReply, Timings
from service.app.reencode import enqueue_reencode, run_reencode_job
from service.app.reencode_schemas import ReencodeRequest
from service.app.reports import Diagnostics
from service.app.resources import (
    CALIBRATE_JOB,
    KERNEL_JOB,
    REENCODE_JOB,
    RESTORE_JOB,
    SNAPSHOT_JOB,
    Resources,
)
from service.app.rows import Readable
from service.app.schemas import (
    CollectionConfig,
    CollectionInfo,
    CollectionList,
    EncoderList,
    Operation,
    OperationList,
    Problem,
    RecallRequest,
    StoreReply,
    StoreRequest,
    TrainRequest,
)
from service.app.sizing import size
from service.app.sizing_schemas import Sizing, SizingRequest
from service.app.snapshot_schemas import RestoreRequest, ScheduleRequest, SnapshotInfo, SnapshotList, SnapshotSchedule
from service.app.snapshots import Receiving
from service.app.store import STORE_JOB, Accepted, accept, reply
from service.app.transfer_schemas import Event, ExportRequest, Format, ImportOptions, Totals
from service.encoders import registry
from service.encoders.cards import cards
from service.encoders.device import check_device
from service.errors import CollectionNotFound, Conflict, ContentNotFound, EngramError, NothingObserved, Unavailable
from service.settings import Settings
from service.storage.blobs import Blobs
from service.storage.database import Database
from service.storage.folder import DataFolder
from service.storage.jobs import Job
from service.storage.repository import Repository
from service.storage.writer import Writer

log = structlog.get_logger()

T = TypeVar("T")

Handler = Callable[[Job, Callable[[float], None]], dict[str, Any]]

LEVELS: Mapping[str, Level] = {STORE_JOB: "write"}  # to end an operation; of any other kind only an admin may

STAGES = tuple(Timings.__annotations__)
OPERATIONS_LISTED = 100
RECALL_BATCH_MAX = 256  # cues of one micro-batch
RECALL_QUEUE_MAX = 4_096  # cues waiting: at some thousand recalls a second, about a second's worth


@dataclass(frozen=True, eq=False)
class PreparedRecall:
    """A recall whose cues are read and encoded, ready for the bank."""

    live: LiveCollection
    options: Resolved
    cues: list[CueBlocks | EngramError]
    single: bool
    started: float
    encode_s: float


class Engine:
    def __init__(self, settings: Settings, *, load: bool = True) -> None:
        """Open the data folder and load every collection; without `load` that is left to `load`, before which nothing
        else is to be asked of it but `check_ready`. Raises `FolderInUse`, `StorageUnavailable`, `DeviceMissing`.
        """
        with ExitStack() as opened:  # whatever was opened is closed again if the next thing fails
            self.folder = DataFolder.open(settings.data)
            opened.callback(self.folder.close)
            url = settings.database_url
            database = Database.open(self.folder.database_path if url is None else url.get_secret_value())
            opened.callback(database.close)
            writer = Writer(database)
            opened.callback(writer.close)
            self.repository = Repository(database, writer)
            self.blobs = Blobs(settings.originals or self.folder.blobs_path)
            if self.repository.is_shared:
                place = f"{socket.gethostname()}:{(settings.originals or self.folder.blobs_path).absolute()}"
                identity = self.repository.share_originals(self.blobs, place)
            device = check_device(settings.encoder_device)
            make_encoder = partial(registry.make, threads=settings.threads, device=device)
            self.resources = Resources(settings, self.repository, self.blobs, make_encoder)
            opened.callback(self.resources.close)
            key = None if settings.api_key is None else settings.api_key.get_secret_value()
            self.keys = Keys(self.repository, key)
            opened.callback(self.keys.close)
            limiter = Limiter(settings.rate_limit, settings.concurrent_max)
            self.admission = Admission(self.keys, limiter, self.resources.metrics)
            self._follower = Follower(self.resources)
            opened.callback(self._follower.stop)
            if self.repository.is_shared and settings.redis_url is not None:
                address = settings.redis_url.get_secret_value()
                notices = Notices(address, f"engram:{identity}", self._follower.wake)
                opened.callback(notices.close)
                self.resources.tell = notices.tell
            self.loading: str | None = "opening the data folder"  # what is still done before it is ready
            self._closing = False
            if load:
                self.load()
            self._recalls: MicroBatcher[tuple[LiveCollection, Resolved], CueBlocks, Recalled] = MicroBatcher(
                "recall", self._run_recalls, batch_max=RECALL_BATCH_MAX, queue_max=RECALL_QUEUE_MAX
            )
            opened.callback(self._recalls.close)
            self._opened = opened.pop_all()

    def load(self, warm: bool = False) -> None:
        """Load every collection, and follow what other servers write from then on. One that cannot be loaded answers
        its own requests with why; the others are not held up. One whose encoder has changed is loaded, and refuses what
        needs it.

        `warm`: run every encoder once, so that no caller waits for what its first run takes besides. Stops half way
        at `stop_loading`.
        """
        rows = self.repository.list_collections()
        for number, row in enumerate(rows, start=1):
            self.loading = f"loading collection {number} of {len(rows)}: {row.name}"
            if self._closing:
                return
            try:
                self.resources.add(collections.load(self.resources, row))
            except EngramError as error:
                log.error("a collection could not be loaded", collection=row.name, detail=error.detail)
                self.resources.broken[row.name] = error
        lives = list(self.resources.lives.values())
        made = {space.encoder: None for live in lives for space in live.spaces.values() if space.encoder}
        encoders = [encoder for encoder in made if not isinstance(encoder, AbsentEncoder)]
        for number, encoder in enumerate(encoders if warm else (), start=1):
            self.loading = f"warming encoder {number} of {len(encoders)}: {encoder.name}"
            if self._closing:
                return
            try:
                run_once(encoder)
            except EngramError as error:  # its collections still answer what needs no encoding
                log.error("an encoder could not be run", encoder=encoder.name, detail=error.detail)
        if self._closing:
            return
        if self.repository.is_shared:
            self._follower.start()
        else:
            self.repository.release_leases()
        for live in lives:
            self.resources.calibrate_if_due(live)
        self.loading = None

    def stop_loading(self) -> None:
        self._closing = True

    def close(self) -> None:
        """Answer what waits, then let go: recalls, then background work, then storage, and the folder's lock last."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def encoders(self) -> EncoderList:
        """Those there are, and whether their weights are here; none is loaded."""
        return EncoderList(encoders=cards())

    # --- collections ---

    def create_collection(self, name: str, config: CollectionConfig) -> CollectionInfo:
        return collections.info(collections.create(self.resources, name, config))

    def collection(self, name: str) -> CollectionInfo:
        return collections.info(self.resources.live(name))

    def collections(self) -> CollectionList:
        """Those that the caller may read."""
        self.resources.look()
        caller = CALLER.get()
        found = [live for live in list(self.resources.lives.values()) if caller.may_read(live.name)]
        lives = sorted(found, key=lambda live: live.name)
        return CollectionList(collections=[collections.info(live) for live in lives])

    def diagnostics(self, name: str) -> Diagnostics:
        return diagnose(self.resources, self.resources.live(name))

    def size(self, name: str, request: SizingRequest) -> Sizing:
        return size(self.resources, self.resources.live(name), request)

    def delete_collection(self, name: str) -> None:
        collections.delete(self.resources, name)

    # --- store ---

    def accept(self, name: str, request: StoreRequest) -> Accepted:
        accepted = self._written(name, lambda live: accept(self.resources, live, request))
        stored = sum(result.status != "error" for result in accepted.results)
        self.resources.metrics.used(CALLER.get().name, stored=stored)
        return accepted

    def _written(self, name: str, write: Callable[[LiveCollection], T]) -> T:
        """What a write gives. One that finds its collection gone, which another has taken the place of meanwhile (by a
        restore, or made anew; here or at another server), is done there. Raises `CollectionNotFound`, and what `write`
        does.
        """
        live = self.resources.live(name)
        try:
            return write(live)
        except CollectionNotFound:
            self.resources.look()
            if (now := self.resources.live(name)) is live:
                raise
            return write(now)

    def store_reply(self, accepted: Accepted) -> StoreReply:
        return reply(self.resources, accepted)

    def store(self, name: str, request: StoreRequest) -> StoreReply:
        """Store and, with `wait`, wait at most `timeout_s` for what needs encoding."""
        accepted = self.accept(name, request)
        if request.wait and accepted.done is not None:
            wait([accepted.done], request.timeout_s)  # on a timeout the reply carries the operation, which goes on
        return self.store_reply(accepted)

    # --- recall ---

    def prepare(self, name: str, request: RecallRequest) -> PreparedRecall:
        """Read and encode the cues. A single bad cue raises; in a batch it becomes its own result's error."""
        started = time.perf_counter()
        live = live_at(self.resources, name, request)
        options = resolve(live, request)
        single = request.cue is not None
        cues = [request.cue] if request.cue is not None else request.cues or []
        if any(cue.id is None for cue in cues):  # a stored memory's patterns are there, whatever became of the encoder
            live.require(live.spaces if options.chosen is None else options.chosen)
        view = live.view()
        check_size(live, options, len(cues))
        blocks: list[CueBlocks | EngramError] = [NothingObserved("not read yet")] * len(cues)

        def read() -> Iterator[tuple[int, Parts]]:
            for i, cue in enumerate(cues):
                try:
                    if cue.id is not None:
                        blocks[i] = cue_of_memory(live, view, cue.id, options.chosen, exclude_self=request.exclude_self)
                        continue
                    yield i, read_parts(cue, live, self.resources.settings.image_pixels_max)
                except EngramError as error:
                    blocks[i] = error

        for batch in in_batches(read()):
            encoded = encode_cues(live, [parts for _, parts in batch], options.chosen, self.resources.encoded)
            for (i, _), outcome in zip(batch, encoded, strict=True):
                blocks[i] = outcome
        if single and isinstance(blocks[0], EngramError):
            raise blocks[0]
        return PreparedRecall(live, options, blocks, single, started, time.perf_counter() - started)

    def has_come_to(self, name: str, version: int | None) -> bool:
        """Whether a collection answers here at once, at this version; another server may have made it, or come to it, a
        moment ago."""
        live = self.resources.lives.get(name)
        return live is not None and (version is None or live.bank.version >= version)

    def submit(self, prepared: PreparedRecall) -> Future[Recalled]:
        """Queue a prepared single cue; cues of other requests that wait meanwhile share its batch."""
        cue = prepared.cues[0]
        assert isinstance(cue, CueBlocks)
        return self._recalls.submit((prepared.live, prepared.options), cue)

    def recall_batch(self, prepared: PreparedRecall) -> Recalled:
        """Recall the good cues of a batch in the calling thread; bad ones answer with their error."""
        good = [cue for cue in prepared.cues if isinstance(cue, CueBlocks)]
        recalled = self._recalled(prepared.live, good, prepared.options)
        answered = iter(recalled.results)
        results = [
            next(answered)
            if isinstance(cue, CueBlocks)
            else empty_result(None, error={"code": cue.code, "detail": cue.detail})
            for cue in prepared.cues
        ]
        return Recalled(recalled.version, results, recalled.stages, [])

    def recall_reply(self, prepared: PreparedRecall, recalled: Recalled) -> RecallReply:
        spent = {**recalled.stages, "encode": prepared.encode_s, "total": time.perf_counter() - prepared.started}
        self.resources.metrics.recalled(prepared.live.name, spent, (result["verdict"] for result in recalled.results))
        for result in recalled.results:
            if (gate := result["gate"]) is not None:
                self.resources.metrics.judged(prepared.live.name, gate["score"] - gate["threshold"])
        self.resources.metrics.used(CALLER.get().name, recalls=len(recalled.results))
        timings = {stage: round(1000 * spent.get(stage, 0.0), 3) for stage in STAGES}
        return {"version": recalled.version, "results": recalled.results, "timings_ms": cast(Timings, timings)}

    def recall(self, name: str, request: RecallRequest) -> RecallReply:
        prepared = self.prepare(name, request)
        return self.recall_reply(prepared, self.recall_batch(prepared))

    def _run_recalls(
        self, key: tuple[LiveCollection, Resolved], cues: Sequence[CueBlocks]
    ) -> Sequence[Recalled | BaseException]:
        live, options = key
        recalled = self._recalled(live, cues, options)
        return [Recalled(recalled.version, [result], recalled.stages, []) for result in recalled.results]

    def _recalled(self, live: LiveCollection, cues: Sequence[CueBlocks], options: Resolved) -> Recalled:
        recalled = recall_blocks(live, cues, options)
        if options.with_text:
            describe(self.repository, live, recalled.results, recalled.heaviest)
        return recalled

    # --- memories ---

    def memory(self, name: str, memory_id: str, request: AtVersion | None = None) -> MemoryInfo:
        """Raises `MemoryNotFound`."""
        live = stored_at(self.resources, name, request or AtVersion())
        return memories.info(self.repository.get_memory(live.id, memory_id))

    def memories(self, name: str, request: GetRequest) -> GetReply:
        return memories.get(self.resources, stored_at(self.resources, name, request), request)

    def scroll(self, name: str, request: ScrollRequest) -> ScrollReply:
        return memories.scroll(self.resources, stored_at(self.resources, name, request), request)

    def patch(self, name: str, memory_id: str, request: PatchRequest) -> PatchReply:
        """Change a memory in part. Raises as `patch.patch`."""
        return self._written(name, lambda live: patch(self.resources, live, memory_id, request))

    def content(self, name: str, memory_id: str) -> tuple[bytes, str]:
        """The original bytes and their media type. Raises `MemoryNotFound`, `ContentNotFound`."""
        found = self.repository.get_memory(self.resources.live(name).id, memory_id)
        if found.blob_hash is None or found.media_type is None:
            raise ContentNotFound(f"memory {memory_id} was stored without an image")
        return self.blobs.get(found.blob_hash), found.media_type

    def delete_memories(self, name: str, ids: Sequence[str], if_version: int | None = None) -> DeleteReply:
        """Raises `PreconditionFailed` where one is not at `if_version`."""
        return self._written(name, lambda live: memories.delete_ids(self.resources, live, ids, if_version))

    def delete(self, name: str, request: DeleteRequest) -> DeleteReply:
        return self._written(name, lambda live: memories.delete(self.resources, live, request))

    def count(self, name: str, request: CountRequest | None = None) -> CountReply:
        request = request or CountRequest()
        at = live_at if request.filter is None else stored_at  # the bank knows how many there are
        return memories.count(self.resources, at(self.resources, name, request), request)

    def put_payload_index(self, name: str, key: str) -> PayloadIndex:
        """Raises `InvalidRequest`: no key, or one too many."""
        return payload_indexes.put(self.resources, self.resources.live(name), key)

    def delete_payload_index(self, name: str, key: str) -> None:
        payload_indexes.delete(self.resources, self.resources.live(name), key)

    def payload_indexes(self, name: str) -> PayloadIndexList:
        return payload_indexes.listed(self.resources.live(name))

    # --- in bulk ---

    def import_rows(self, name: str, form: Format, body: Readable, options: ImportOptions) -> Iterator[Event]:
        """Store rows that come as a stream of bytes; as `run_import`."""
        events = run_import(self.resources, self.resources.live(name), form, body, options)
        return self._counted(events, CALLER.get().name)

    def _counted(self, events: Iterator[Event], caller: str | None) -> Iterator[Event]:
        """The same, with what is stored counted as the caller's."""
        before = 0
        for event in events:
            if isinstance(event, Totals):
                now = event.stored + event.updated
                self.resources.metrics.used(caller, stored=now - before)
                before = now
            yield event

    def export(self, name: str, request: ExportRequest) -> Export:
        """All rows that a filter keeps, at one version, as a stream of bytes."""
        return export(self.resources, self.resources.live(name), request)

    # --- operations and the jobs behind them ---

    def train(self, name: str, request: TrainRequest) -> Operation:
        """Calibrate the gate again, now, with what is supplied; or train a kernel. Raises `InvalidRequest`, naming the
        wrong cues, `UnknownSpace`, `TrainingRefused`.
        """
        live = self.resources.live(name)
        live.require(live.spaces)
        if isinstance(request.root, TrainKernel):
            return self.operation(enqueue_kernel(self.resources, live, request.root))
        return self.operation(enqueue_training(self.resources, live, request.root))

    def reencode(self, name: str, space: str, request: ReencodeRequest) -> Operation:
        """Encode a space again from the originals, in the background. Raises as `enqueue_reencode`."""
        return self.operation(enqueue_reencode(self.resources, self.resources.live(name), space, request))

    # --- snapshots ---

    def create_snapshot(self, name: str) -> Operation:
        """Write the collection, as it is when the operation runs, to one file. Raises `Conflict` while another one is
        made."""
        return self.operation(snapshots.enqueue_snapshot(self.resources, self.resources.live(name)))

    def snapshots(self, name: str) -> SnapshotList:
        """Those kept under a collection's name, whether there is one of that name or not."""
        return snapshots.listed(self.resources, name)

    def snapshot(self, name: str, snapshot_id: str) -> SnapshotInfo:
        """Raises `SnapshotNotFound`, `InvalidSnapshot`."""
        return snapshots.described(self.resources, name, snapshot_id)

    def snapshot_content(self, name: str, snapshot_id: str) -> tuple[int, Iterator[bytes]]:
        """The size of its file, and the bytes of it. Raises `SnapshotNotFound`."""
        return snapshots.content(self.resources, name, snapshot_id)

    def receive_snapshot(self, name: str, snapshot_id: str) -> AbstractContextManager[Receiving]:
        """`with … as receiving`: write it, then keep it. Raises `InvalidRequest`."""
        return snapshots.receiving(self.resources, name, snapshot_id)

    def delete_snapshot(self, name: str, snapshot_id: str) -> None:
        """Raises `SnapshotNotFound`."""
        snapshots.remove(self.resources, name, snapshot_id)

    def restore(self, name: str, snapshot_id: str, request: RestoreRequest) -> Operation:
        """Raises as `enqueue_restore`, and `Forbidden` where the caller may not make the collection to be."""
        check(CALLER.get(), Need("admin"), request.into or name)
        return self.operation(restore.enqueue_restore(self.resources, name, snapshot_id, request))

    def put_snapshot_schedule(self, name: str, request: ScheduleRequest) -> SnapshotSchedule:
        """Have snapshots made at set times; the first one at once."""
        return snapshot_schedule.put(self.resources, name, request)

    def snapshot_schedule(self, name: str) -> SnapshotSchedule:
        """Raises `ScheduleNotFound`."""
        return snapshot_schedule.get(self.resources, name)

    def delete_snapshot_schedule(self, name: str) -> None:
        """None are made at set times any more; what was made stays."""
        snapshot_schedule.delete(self.resources, name)

    def snapshot_on_schedule(self) -> None:
        """Queue the snapshots that are due."""
        snapshot_schedule.tick(self.resources)

    def kernels(self, name: str) -> KernelList:
        return listed(self.resources, self.resources.live(name))

    def retire_kernel(self, name: str, kernel_id: str) -> None:
        """Go on without it. Raises `KernelNotFound`."""
        retire(self.resources, self.resources.live(name), kernel_id)

    def operation(self, operation_id: str) -> Operation:
        """Raises `OperationNotFound`, and `Forbidden` where the caller may not read its collection."""
        found = self._operation(self.repository.get_job(operation_id))
        check(CALLER.get(), Need("read"), found.collection)
        return found

    def cancel(self, operation_id: str) -> Operation:
        """What it has done so far is kept. Raises as `operation`, and `Conflict` once it has ended."""
        found = self.operation(operation_id)
        check(CALLER.get(), Need(LEVELS.get(found.kind, "admin")), found.collection)
        job = self.repository.cancel(operation_id)
        self.resources.ended(operation_id)
        return self._operation(job)

    def retry(self, operation_id: str) -> Operation:
        """Queue it again where it failed, died or was cancelled: what it has done stays done. Raises as `operation`,
        and `Conflict` where it is done, under way, or cannot be gone on with.
        """
        found = self.operation(operation_id)
        check(CALLER.get(), Need(LEVELS.get(found.kind, "admin")), found.collection)
        job = self.repository.get_job(operation_id)
        if job.kind != STORE_JOB and job.kind not in self.handlers():
            raise Conflict(f"an operation of the kind {job.kind} cannot be retried: ask for it again")
        if job.kind == REENCODE_JOB and job.collection_id is not None:
            active = self.repository.active_job(job.collection_id, REENCODE_JOB)
            if active not in (None, operation_id):
                raise Conflict(f"the operation {active} encodes the collection again already; cancel it or wait")
        job = self.repository.retry(operation_id)
        self.resources.wake_workers()
        self.resources.tell(True)
        return self._operation(job)

    def operations(self) -> OperationList:
        """The last hundred, as many of them as the caller may read."""
        found = [self._operation(job) for job in self.repository.list_jobs(OPERATIONS_LISTED)]
        caller = CALLER.get()
        return OperationList(operations=[one for one in found if caller.may_read(one.collection)])

    def _operation(self, job: Job) -> Operation:
        names = {live.id: live.name for live in list(self.resources.lives.values())}
        name = names.get(job.collection_id or -1, restore.target(job))
        return Operation(
            id=job.id, kind=job.kind, collection=name, status=job.status,
            progress=job.progress, result=job.result, error=None if job.error is None else Problem(**job.error),
        )  # fmt: skip

    def handlers(self) -> dict[str, Handler]:
        """What a worker runs for each kind of job: (job, beat) → its result. `beat(progress)` keeps the job ours.

        A store job goes through a pipeline instead (workers/ingest.py).
        """
        return {
            CALIBRATE_JOB: partial(run_calibrate_job, self.resources),
            KERNEL_JOB: partial(run_kernel_job, self.resources),
            REENCODE_JOB: partial(run_reencode_job, self.resources),
            SNAPSHOT_JOB: partial(snapshot_schedule.run_job, self.resources),
            RESTORE_JOB: partial(restore.run_restore_job, self.resources),
        }

    def watch_queue(self) -> None:
        """Let the metrics say what waits. Raises `StorageUnavailable`, `TooBusy`."""
        self.resources.metrics.queued(self.repository.queued_jobs())

    def seal(self) -> None:
        """Start sealing wherever it is due; it goes on in the background."""
        for live in list(self.resources.lives.values()):
            self.resources.seal_if_due(live)

    def expire(self) -> None:
        """Delete the memories that have expired."""
        memories.delete_expired(self.resources)

    def follow_keys(self) -> None:
        """See which keys were made and revoked elsewhere."""
        self.keys.refresh()
        self.resources.metrics.forget_keys_but(self.keys.names)

    def housekeep(self) -> None:
        """Remove originals that nothing names any more, drafts of operations that have ended, what restores took the
        place of, receipts of a day ago, and operations that ended a week ago; and what the log holds of deleted rows.
        """
        self.blobs.remove_unreferenced(self.repository.blob_hashes_in_use)
        self.repository.remove_drafts()
        self.repository.remove_receipts()
        restore.remove_hidden(self.resources)
        self.repository.remove_ended_jobs()
        self.repository.forget_deletions()
        if not self.repository.empty_log():
            log.info("the database's log is emptied an hour later: it was in use")

    def check_ready(self) -> None:
        """Raises `Unavailable` while collections are loaded, saying how far, and while storage does not answer."""
        self.check_loaded()
        self.repository.ping()

    def check_loaded(self) -> None:
        """Raises `Unavailable`."""
        if self.loading is not None:
            raise Unavailable(self.loading, retry_after_s=1)
