"""Snapshots: made of a collection while it answers, kept, listed, sent and received. `restore` brings one back.

Rules:
- A snapshot is of one version: all its rows are of one read of the database, and no original is removed meanwhile.
- It is kept whole or not at all, and its name is decided when its operation is accepted, so an operation that is
  resumed makes the same one.
- Snapshots outlive their collection: they are found by its name, whether there is such a collection or not.
- What is received is read to its end, as for a restore, before it is kept.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import structlog
from pydantic import TypeAdapter, ValidationError

from service.app.fields import Name, faults
from service.app.live import LiveCollection
from service.app.resources import SNAPSHOT_JOB, Resources
from service.app.schemas import Problem
from service.app.snapshot_content import head_of, read, read_head, rows_per_part, written
from service.app.snapshot_schemas import SnapshotId, SnapshotInfo, SnapshotList
from service.errors import BodyTooLarge, Conflict, ContentNotFound, InvalidRequest, InvalidSnapshot, SnapshotExists
from service.storage.jobs import Job
from service.storage.snapshot_file import BLOCK, TAIL_BYTES, SnapshotWriter, head_size, read_tail
from service.storage.snapshot_store import RANGE_BYTES, Kept, KeptFile, SnapshotStore

log = structlog.get_logger()

BEAT_S = 1.0  # progress is seen as often; a beat is a commit, and a lease lasts fifteen seconds
HEAD_READ = 64 * 2**10  # a head is some kilobytes: it comes with the first read

_id: TypeAdapter[str] = TypeAdapter(SnapshotId)
_name: TypeAdapter[str] = TypeAdapter(Name)


class Paced:
    """`beat`, at most each `BEAT_S`."""

    def __init__(self, beat: Callable[[float], None]) -> None:
        self._beat, self._at = beat, time.monotonic()

    def __call__(self, share: float) -> None:
        if time.monotonic() - self._at >= BEAT_S:
            self._at = time.monotonic()
            self._beat(min(1.0, share))


# --- made -------------------------------------------------------------------------------------------------------------


def new_id() -> str:
    """A name that says when, and is nobody else's."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"


def enqueue_snapshot(resources: Resources, live: LiveCollection) -> str:
    """Commit the job of a snapshot; its id. Raises `Conflict` while another one of the collection is made."""
    if (active := resources.repository.active_job(live.id, SNAPSHOT_JOB)) is not None:
        raise Conflict(f"the operation {active} makes a snapshot of {live.name} already; wait for it or cancel it")
    payload = {"snapshot": {"id": new_id(), "scheduled": False}}
    return resources.enqueue(SNAPSHOT_JOB, live.id, payload=payload)[0]


def run_snapshot_job(resources: Resources, job: Job, beat: Callable[[float], None]) -> dict[str, Any]:
    """Write a collection, as it is now, to a file, and keep that."""
    assert job.collection_id is not None
    live = resources.live_by_id(job.collection_id)
    id_: str = job.payload["snapshot"]["id"]
    with resources.workspace.file() as (path, file):
        _write(resources, live, file, Paced(beat))
        file.flush()
        beat(0.95)  # the last look at whether the job is still wanted
        try:
            resources.snapshots.put(live.name, id_, path)
        except SnapshotExists:  # by this same job, before it was interrupted
            log.info("a snapshot was kept already", collection=live.name, snapshot=id_)
    return described(resources, live.name, id_).model_dump(mode="json")


def _write(resources: Resources, live: LiveCollection, file: BinaryIO, beat: Paced) -> None:
    writer = SnapshotWriter(file)
    rows = rows_per_part(sum(space.dimension for space in live.spaces.values()))
    originals = missing = 0
    with resources.blobs.kept(), resources.repository.copying(live.id, list(live.spaces), rows) as copy:
        head = head_of(live, copy, datetime.now(UTC))
        total = max(1, head.memories)
        for parts, entry in enumerate(written(head, copy)):
            writer.add(entry.name, entry.content)
            beat(0.5 * parts * rows / (total * (1 + len(live.spaces))))
        for hash_ in copy.originals:
            try:
                content = resources.blobs.get(hash_)
                if hashlib.sha256(content).hexdigest() != hash_:
                    raise ContentNotFound(f"the original {hash_} is damaged")
            except ContentNotFound as error:
                missing += 1
                log.error("a snapshot lacks an original", collection=live.name, detail=error.detail)
                continue
            writer.add(f"originals/{hash_}", content)
            originals += 1
            beat(0.5 + 0.45 * originals / total)
    writer.finish(originals, missing)


# --- kept -------------------------------------------------------------------------------------------------------------


def info(store: SnapshotStore, kept: Kept) -> SnapshotInfo:
    """What a kept snapshot says of itself; its content is not checked. Raises `InvalidSnapshot`."""
    beginning = store.read(kept, 0, HEAD_READ)
    size = head_size(beginning)
    if size > len(beginning) - BLOCK:
        beginning = store.read(kept, 0, BLOCK + size)
    head = read_head(beginning[BLOCK : BLOCK + size])
    summary = read_tail(store.read(kept, kept.size_bytes - TAIL_BYTES, TAIL_BYTES))
    return SnapshotInfo(
        id=kept.id, collection=kept.collection, size_bytes=kept.size_bytes, sha256=summary.sha256,
        made_of=head.collection, version=head.version, made_at=head.made_at.isoformat(), memories=head.memories,
        originals=summary.originals, originals_missing=summary.missing, spaces=_fingerprints(head.config),
    )  # fmt: skip


def listed(resources: Resources, collection: str) -> SnapshotList:
    """The oldest first; those that cannot be read, with why."""
    found, damaged = [], {}
    for kept in resources.snapshots.list(_checked(_name, collection)):
        try:
            found.append(info(resources.snapshots, kept))
        except InvalidSnapshot as error:
            damaged[kept.id] = Problem(code=error.code, detail=error.detail)
    return SnapshotList(snapshots=sorted(found, key=lambda each: (each.made_at, each.id)), damaged=damaged)


def described(resources: Resources, collection: str, id_: str) -> SnapshotInfo:
    """Raises `SnapshotNotFound`, `InvalidSnapshot`."""
    return info(resources.snapshots, resources.snapshots.find(collection, id_))


def content(resources: Resources, collection: str, id_: str) -> tuple[int, Iterator[bytes]]:
    """The size of a snapshot's file, and its bytes. Raises `SnapshotNotFound`."""
    kept = resources.snapshots.find(collection, id_)
    starts = range(0, kept.size_bytes, RANGE_BYTES)
    return kept.size_bytes, (resources.snapshots.read(kept, start, RANGE_BYTES) for start in starts)


def remove(resources: Resources, collection: str, id_: str) -> None:
    """Raises `SnapshotNotFound`."""
    resources.snapshots.delete(collection, id_)


def verify(
    store: SnapshotStore, kept: Kept, original_bytes_max: int, beat: Callable[[float], None] = lambda _: None
) -> None:
    """Read a kept snapshot to its end. Raises `InvalidSnapshot`, `SnapshotDamaged`, naming what differs."""
    file = KeptFile(store, kept)
    for _ in read(file, original_bytes_max):
        beat(file.at / max(1, kept.size_bytes))


# --- received ---------------------------------------------------------------------------------------------------------


class Receiving:
    """A snapshot on its way in."""

    def __init__(self, resources: Resources, collection: str, id_: str, path: Path, file: BinaryIO) -> None:
        self._resources, self._path, self._file = resources, path, file
        self._collection, self._id = _checked(_name, collection), _checked(_id, id_)
        self._size = 0

    def write(self, data: bytes) -> None:
        """Raises `BodyTooLarge`, `StorageFull`."""
        self._size += len(data)
        bound = self._resources.settings.snapshot_bytes_max
        if self._size > bound:
            raise BodyTooLarge(f"a snapshot has at most {bound:,} bytes here (ENGRAM_SNAPSHOT_BYTES_MAX)")
        self._file.write(data)

    def keep(self) -> SnapshotInfo:
        """Check it, and keep it. One that is there already is as good. Raises `InvalidSnapshot`, `SnapshotExists`."""
        self._file.flush()
        self._file.seek(0)
        for _ in read(self._file, self._resources.settings.body_bytes_max):
            pass
        self._file.seek(-TAIL_BYTES, 2)
        summary = read_tail(self._file.read(TAIL_BYTES))
        store = self._resources.snapshots
        try:
            store.put(self._collection, self._id, self._path)
        except SnapshotExists:
            there = info(store, store.find(self._collection, self._id))
            if there.sha256 != summary.sha256:
                raise
            return there
        return info(store, store.find(self._collection, self._id))


@contextmanager
def receiving(resources: Resources, collection: str, id_: str) -> Iterator[Receiving]:
    """Raises `InvalidRequest` for names that are none; what was written is gone at the end unless it was kept."""
    with resources.workspace.file() as (path, file):
        yield Receiving(resources, collection, id_, path, file)


def _checked(adapter: TypeAdapter[str], name: str) -> str:
    try:
        return adapter.validate_python(name)
    except ValidationError as error:
        raise InvalidRequest(f"{name}: {faults(error)}") from None


def _fingerprints(config: dict[str, Any]) -> dict[str, str | None]:
    found = config.get("fingerprints")
    return {str(k): None if v is None else str(v) for k, v in found.items()} if isinstance(found, dict) else {}
