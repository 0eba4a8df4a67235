"""Storing and deleting memories.

Rules:
- A batch is one transaction and takes one version: the collection's next number, under the collection's row lock.
- Storing an id that exists replaces all of the memory (text, payload, original, patterns); its place in the order
  stays. One that has expired does not exist.
- What a write rests on (a memory's version, a receipt that is not there) is looked up in the transaction that writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from service.errors import EncodersChanged, PreconditionFailed
from service.storage.database import Database
from service.storage.following import note_deleted
from service.storage.jobs import ItemAnswer, JobItems, NewJob, answer_items, insert_job
from service.storage.memories import (
    Deleted,
    MemoryWrite,
    Status,
    Written,
    lock,
    lock_version,
    microseconds_now,
    parts_of,
    set_version,
    to_bytes,
)
from service.storage.receipts import Receipt, check_new, keep_receipt
from service.storage.tables import memories, patterns
from service.storage.writer import Writer

EXPIRED_AT_ONCE = 1_000
"""Expired memories deleted in one transaction: some tens of milliseconds, for which other writes wait."""


@dataclass(frozen=True)
class _Known:
    """A memory as it is found when a write begins."""

    key: int
    version: int
    expired: bool


class Writes:
    """The methods of `Repository` that store and delete memories."""

    _database: Database
    _writer: Writer

    def put_memories(
        self,
        collection_id: int,
        writes: Sequence[MemoryWrite],
        answering: Sequence[JobItems] = (),
        then: Callable[[Written], None] = lambda _: None,
        generation: int | None = None,
        *,
        job: NewJob | None = None,
        receipt: Receipt[Written] | None = None,
    ) -> Written:
        """Store or replace memories in one transaction, under one version; of writes with one id the last wins. A write
        whose `if_version` is not the memory's is refused by itself.

        The items of jobs that the writes are, job by job in the writes' order, are answered in the same transaction:
        {"id", "status", "version"} and the notes. A `job` is queued in it, and a `receipt` kept unless nothing was
        done. `then` as in `Writer.submit`. `generation`: the collection's, when the vectors were made. Raises
        `CollectionNotFound`, `EncodersChanged` (it has another generation now: the vectors are of a former encoder),
        `Conflict` (a job no longer runs, or its items are answered), `AlreadyDone` and `IdempotencyKeyReused` (see
        `receipts`), and as `Writer.submit` does.
        """
        blocks = [[(s, len(vector), to_bytes(vector)) for s, vector in write.vectors.items()] for write in writes]

        def run(connection: Connection) -> Written:
            before, now = lock(connection, collection_id)
            if receipt is not None:
                check_new(connection, collection_id, receipt.asked)
            if generation not in (None, now):
                raise EncodersChanged("an encoder of the collection changed after these memories were encoded")
            known = _known(connection, collection_id, [write.id for write in writes])
            statuses = _statuses(writes, known, before + 1)
            refused = [isinstance(status, PreconditionFailed) for status in statuses]
            written = Written(before if all(refused) else before + 1, statuses)
            last = {write.id: place for place, write in enumerate(writes) if not refused[place]}
            if last:
                places = list(last.values())
                keys = _write_memories(connection, collection_id, written.version, [writes[i] for i in places], known)
                rows = [
                    {"memory_key": keys[id_], "space": space, "dtype": "f4", "dimension": dimension, "vector": vector}
                    for id_, place in last.items()
                    for space, dimension, vector in blocks[place]
                ]
                if rows:
                    connection.execute(insert(patterns), rows)
                set_version(connection, collection_id, written.version)
            _answer(connection, answering, writes, written)
            if job is not None:
                insert_job(connection, collection_id, job)
            if receipt is not None and (last or job is not None):
                keep_receipt(connection, collection_id, receipt.asked, receipt.reply(written))
            return written

        return self._writer.submit(run, then, on=collection_id)

    def delete_memories(
        self,
        collection_id: int,
        ids: Sequence[str],
        then: Callable[[Deleted], None] = lambda _: None,
        if_version: int | None = None,
    ) -> Deleted:
        """Delete memories and their patterns in one transaction; ids that do not exist are passed over.

        `if_version`: the version that each must be at. Raises `CollectionNotFound`, `PreconditionFailed`.
        """

        def run(connection: Connection) -> Deleted:
            version = lock_version(connection, collection_id)
            found = _known(connection, collection_id, ids)
            known = {id_: each for id_, each in found.items() if not each.expired}
            for id_ in ids if if_version is not None else ():
                if (refusal := refused(id_, if_version, known[id_].version if id_ in known else 0)) is not None:
                    raise refusal
            if not known:
                return Deleted(version, [])
            _delete(connection, [each.key for each in known.values()])
            set_version(connection, collection_id, version + 1)
            note_deleted(connection, collection_id, version + 1, list(known))
            return Deleted(version + 1, [id_ for id_ in dict.fromkeys(ids) if id_ in known])

        return self._writer.submit(run, then, on=collection_id)

    def delete_expired(self, collection_id: int, then: Callable[[Deleted], None] = lambda _: None) -> int:
        """Delete what has expired by now, in transactions of `EXPIRED_AT_ONCE` memories; their number is returned.

        `then` is called for every transaction, as in `Writer.submit`. Raises `CollectionNotFound`.
        """
        c = memories.c
        expired = (c.collection_id == collection_id) & (c.expires_at <= microseconds_now())
        some = select(c.key, c.id).where(expired).order_by(c.expires_at).limit(EXPIRED_AT_ONCE)

        def run(connection: Connection) -> Deleted:
            version = lock_version(connection, collection_id)
            rows = connection.execute(some).all()
            if not rows:
                return Deleted(version, [])
            _delete(connection, [row.key for row in rows])
            set_version(connection, collection_id, version + 1)
            note_deleted(connection, collection_id, version + 1, [row.id for row in rows])
            return Deleted(version + 1, [row.id for row in rows])

        count = 0
        while True:
            deleted = self._writer.submit(run, lambda done: then(done) if done.ids else None, on=collection_id)
            count += len(deleted.ids)
            if len(deleted.ids) < EXPIRED_AT_ONCE:
                return count


def refused(id_: str, if_version: int | None, version: int) -> PreconditionFailed | None:
    """Why a write is refused that wants a memory at `if_version`; `version` is where it is (0: it is not there)."""
    if if_version in (None, version):
        return None
    found = f"memory {id_} is at version {version}" if version else f"there is no memory {id_}"
    wanted = f"version {if_version}" if if_version else "one that is not there yet (if_version 0)"
    return PreconditionFailed(f"{found}, and the request is for {wanted}")


def _statuses(writes: Sequence[MemoryWrite], known: Mapping[str, _Known], version: int) -> list[Status]:
    """What becomes of each write, one after the other, when they get this version."""
    at = {id_: each.version for id_, each in known.items() if not each.expired}
    statuses: list[Status] = []
    for write in writes:
        refusal = refused(write.id, write.if_version, at.get(write.id, 0))
        statuses.append(refusal or ("updated" if write.id in at else "stored"))
        if refusal is None:
            at[write.id] = version
    return statuses


def _answer(
    connection: Connection, answering: Sequence[JobItems], writes: Sequence[MemoryWrite], written: Written
) -> None:
    done = zip(writes, written.statuses, strict=True)
    for job in answering:
        answers = []
        notes = job.notes or [{}] * len(job.positions)
        for position, note, (write, status) in zip(job.positions, notes, done, strict=False):
            if isinstance(status, PreconditionFailed):
                error = {"code": status.code, "detail": status.detail}
                answers.append(
                    ItemAnswer(position, "failed", {**note, "id": write.id, "status": "error", "error": error})
                )
            else:
                answer = {**note, "id": write.id, "status": status, "version": written.version}
                answers.append(ItemAnswer(position, "done", answer))
        answer_items(connection, job.job_id, [*answers, *job.failed])


def _write_memories(
    connection: Connection, collection_id: int, version: int, writes: Sequence[MemoryWrite], known: Mapping[str, _Known]
) -> dict[str, int]:
    """Insert the memories that are not known, replace the others and drop their patterns; the keys of all."""
    keys = {write.id: known[write.id].key for write in writes if write.id in known and not known[write.id].expired}
    _delete(connection, [known[write.id].key for write in writes if write.id in known and known[write.id].expired])
    now = datetime.now(UTC)
    rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}  # by whether the memory exists
    for write in writes:
        row = {
            "collection_id": collection_id,
            "id": write.id,
            "version": version,
            "text": write.text,
            "payload": write.payload,
            "blob_hash": write.blob_hash,
            "media_type": write.media_type,
            "updated_at": now,
            "expires_at": write.expires_at,
        }
        exists = write.id in keys
        rows[exists].append({**row, "this": keys[write.id]} if exists else {**row, "created_at": now})
    if rows[True]:
        replaced = [{"this": row["this"]} for row in rows[True]]
        connection.execute(delete(patterns).where(patterns.c.memory_key == bindparam("this")), replaced)
        connection.execute(update(memories).where(memories.c.key == bindparam("this")), rows[True])
    if rows[False]:
        inserted = connection.execute(insert(memories).returning(memories.c.id, memories.c.key), rows[False])
        keys.update((id_, key) for id_, key in inserted)
    return keys


def _delete(connection: Connection, keys: Iterable[int]) -> None:
    rows = [{"this": key} for key in keys]
    if rows:
        connection.execute(delete(memories).where(memories.c.key == bindparam("this")), rows)


def _known(connection: Connection, collection_id: int, ids: Sequence[str]) -> dict[str, _Known]:
    """Those of `ids` that there are rows of."""
    now = microseconds_now()
    c = memories.c
    known: dict[str, _Known] = {}
    for part in parts_of(ids):
        query = select(c.id, c.key, c.version, c.expires_at).where(c.collection_id == collection_id, c.id.in_(part))
        for id_, key, version, expires_at in connection.execute(query):
            known[id_] = _Known(key, version, expires_at is not None and expires_at <= now)
    return known
