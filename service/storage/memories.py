"""Memories and their patterns: writing, reading one, and streaming all to a bank.

Rules:
- A batch is one transaction and takes one version: the collection's next number, under the collection's row lock.
- Storing an id that exists replaces all of the memory (text, payload, original, patterns); its place in the order
  stays.
- Nothing is done per value in Python: a vector is one bytes object on the way in, and a chunk of them one copy on the
  way out.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    ColumnElement,
    Connection,
    LargeBinary,
    Row,
    and_,
    bindparam,
    delete,
    func,
    insert,
    select,
    type_coerce,
    union,
    update,
)

from service.errors import CollectionNotFound, EncodersChanged, MemoryNotFound
from service.storage.database import Database
from service.storage.following import note_deleted
from service.storage.jobs import ItemAnswer, JobItems, answer_items
from service.storage.tables import collections, deletions, job_items, jobs, memories, pattern_drafts, patterns
from service.storage.writer import Writer

Vector = NDArray[np.float32]

IN_MAX = 1000
"""Values in one `IN`: databases bound them (SQLite to 32,766), and statements of few sizes are compiled once."""


# Every recall of captions asks this, and building it takes as long as running it.
_DESCRIBE = select(memories.c.id, memories.c.text, memories.c.blob_hash.is_not(None)).where(
    memories.c.collection_id == bindparam("collection"), memories.c.id.in_(bindparam("ids", expanding=True))
)


@dataclass(frozen=True, eq=False)
class MemoryWrite:
    """A memory to be stored. `vectors` maps a space to its block, (dimension,) float32."""

    id: str
    text: str | None = None
    payload: dict[str, Any] | None = None
    blob_hash: str | None = None
    media_type: str | None = None
    vectors: Mapping[str, Vector] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """The batch's version, and what became of each write, in order."""

    version: int
    statuses: list[Literal["stored", "updated"]]


@dataclass(frozen=True)
class Deleted:
    """The ids that existed, in the order asked for, and the collection's version after (unchanged if there was
    none)."""

    version: int
    ids: list[str]


@dataclass(frozen=True)
class Memory:
    """A stored memory without its vectors. `version` is that of its last write; `spaces` are those it has a pattern
    in."""

    id: str
    version: int
    text: str | None
    payload: dict[str, Any] | None
    blob_hash: str | None
    media_type: str | None
    created_at: datetime
    updated_at: datetime
    spaces: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """What a memory says of itself: its caption, and whether its original is kept."""

    text: str | None
    has_original: bool


@dataclass(frozen=True, eq=False)
class PatternChunk:
    """Rows of a collection in order: `vectors[space]` is (rows, dimension) float32, zero where a memory lacks the
    space; payloads are JSON."""

    ids: list[str]
    vectors: dict[str, Vector]
    payloads: list[bytes | None]


@dataclass(frozen=True, eq=False)
class PatternStream:
    """All of a collection at one `version`: `count` memories, in chunks; or what was written since a version, with what
    was `deleted` since (None: no longer known)."""

    version: int
    count: int
    chunks: Iterator[PatternChunk]
    deleted: list[str] | None = None


@dataclass(frozen=True)
class Drafted:
    """A job's drafts of a space (see `drafts`)."""

    space: str
    job_id: str

    def of_memory(self, drafts: Any) -> ColumnElement[bool]:
        """That a row of (an alias of) the drafts is this job's, and of the memory as it is."""
        key = select(jobs.c.key).where(jobs.c.id == self.job_id).scalar_subquery()
        c = drafts.c
        return and_(c.memory_key == memories.c.key, c.job_key == key, c.version == memories.c.version)


class Memories:
    """The memory methods of `Repository`."""

    _database: Database
    _writer: Writer

    def put_memories(
        self,
        collection_id: int,
        writes: Sequence[MemoryWrite],
        answering: Sequence[JobItems] = (),
        then: Callable[[Written], None] = lambda _: None,
        generation: int | None = None,
    ) -> Written:
        """Store or replace memories in one transaction, under one version; of writes with one id the last wins.

        The items of jobs that the writes are, job by job in the writes' order, are answered in the same transaction:
        {"id", "status", "version"} and the notes. `then` as in `Writer.submit`. `generation`: the collection's, when
        the vectors were made. Raises `CollectionNotFound`, `EncodersChanged` (it has another generation now: the
        vectors are of a former encoder), `Conflict` (a job no longer runs, or its items are answered), and as
        `Writer.submit` does.
        """
        winners = {write.id: write for write in writes}
        blocks = {
            write.id: [(space, len(vector), _to_bytes(vector)) for space, vector in write.vectors.items()]
            for write in winners.values()
        }

        def run(connection: Connection) -> Written:
            before, now = lock(connection, collection_id)
            if generation not in (None, now):
                raise EncodersChanged("an encoder of the collection changed after these memories were encoded")
            version = before + 1
            keys = _keys(connection, collection_id, list(winners))
            statuses = _statuses(writes, known=keys)
            _write_memories(connection, collection_id, version, list(winners.values()), keys)
            rows = [
                {"memory_key": keys[id_], "space": space, "dtype": "f4", "dimension": dimension, "vector": vector}
                for id_, spaces in blocks.items()
                for space, dimension, vector in spaces
            ]
            if rows:
                connection.execute(insert(patterns), rows)
            set_version(connection, collection_id, version)
            done = zip(writes, statuses, strict=True)
            for job in answering:
                notes = job.notes or [{}] * len(job.positions)
                answers = [
                    ItemAnswer(position, "done", {**note, "id": write.id, "status": status, "version": version})
                    for position, note, (write, status) in zip(job.positions, notes, done, strict=False)
                ]
                answer_items(connection, job.job_id, [*answers, *job.failed])
            return Written(version, statuses)

        return self._writer.submit(run, then)

    def delete_memories(
        self, collection_id: int, ids: Sequence[str], then: Callable[[Deleted], None] = lambda _: None
    ) -> Deleted:
        """Delete memories and their patterns in one transaction; ids that do not exist are passed over. Raises
        `CollectionNotFound`."""

        def run(connection: Connection) -> Deleted:
            version = lock_version(connection, collection_id)
            keys = _keys(connection, collection_id, ids)
            if not keys:
                return Deleted(version, [])
            connection.execute(
                delete(memories).where(memories.c.key == bindparam("this")), [{"this": key} for key in keys.values()]
            )
            set_version(connection, collection_id, version + 1)
            note_deleted(connection, collection_id, version + 1, list(keys))
            return Deleted(version + 1, [id_ for id_ in dict.fromkeys(ids) if id_ in keys])

        return self._writer.submit(run, then)

    def get_memory(self, collection_id: int, id_: str) -> Memory:
        """Raises `MemoryNotFound`."""
        c = memories.c
        columns = (c.version, c.text, c.payload, c.blob_hash, c.media_type, c.created_at, c.updated_at)
        with self._database.read() as connection:
            values: dict[str, Any] = dict(_find(connection, collection_id, id_, *columns)._mapping)
            spaces = (
                select(patterns.c.space).where(patterns.c.memory_key == values.pop("key")).order_by(patterns.c.space)
            )
            return Memory(id=id_, spaces=tuple(connection.execute(spaces).scalars()), **values)

    def describe(self, collection_id: int, ids: Sequence[str]) -> dict[str, Description]:
        """Of those of `ids` that are stored now, in one query for each `IN_MAX` of them."""
        found: dict[str, Description] = {}
        with self._database.read() as connection:
            for part in _parts(ids):
                rows = connection.execute(_DESCRIBE, {"collection": collection_id, "ids": part})
                found.update((id_, Description(text, bool(kept))) for id_, text, kept in rows)
        return found

    def is_described(self, collection_id: int) -> bool:
        """Whether any memory of the collection has a caption or an original."""
        c = memories.c
        some = (c.collection_id == collection_id) & (c.text.is_not(None) | c.blob_hash.is_not(None))
        with self._database.read() as connection:
            return connection.execute(select(memories.c.key).where(some).limit(1)).first() is not None

    def count_since(self, collection_id: int, version: int) -> int:
        """How many memories were last written after `version`."""
        query = select(func.count()).where(memories.c.collection_id == collection_id, memories.c.version > version)
        with self._database.read() as connection:
            return connection.execute(query).scalar_one()

    def get_vectors(self, collection_id: int, id_: str) -> dict[str, Vector]:
        """The memory's blocks by space, each (dimension,) float32. Raises `MemoryNotFound`."""
        with self._database.read() as connection:
            key = _find(connection, collection_id, id_)[0]
            rows = connection.execute(select(patterns.c.space, patterns.c.vector).where(patterns.c.memory_key == key))
            return {space: from_bytes([vector], len(vector) // 4)[0] for space, vector in rows}

    def count(self, collection_id: int) -> int:
        """How many memories the collection holds; none if there is no such collection."""
        with self._database.read() as connection:
            query = select(func.count()).where(memories.c.collection_id == collection_id)
            return connection.execute(query).scalar_one()

    @contextmanager
    def iter_patterns(
        self,
        collection_id: int,
        spaces: Sequence[tuple[str, int]],
        chunk: int = 4096,
        *,
        ids: Sequence[str] | None = None,
        since: int | None = None,
        drafted: Drafted | None = None,
    ) -> Iterator[PatternStream]:
        """Stream a collection in the order its memories were first stored, as it is when the block is entered.

        `spaces` gives (name, dimension) of the blocks wanted; a stored block of another dimension is a `ValueError`.
        `ids`: of the memories wanted, `IN_MAX` at most (None: all). `since`: only those written after that version. The
        blocks of the space `drafted` are a job's drafts. The stream is valid inside the block alone. Raises
        `CollectionNotFound`.
        """
        blocks: list[Any] = []
        joined: Any = memories
        for space, _ in spaces:
            if drafted is not None and drafted.space == space:
                block: Any = pattern_drafts.alias()
                joined = joined.outerjoin(block, drafted.of_memory(block))
            else:
                block = patterns.alias()
                joined = joined.outerjoin(block, (block.c.memory_key == memories.c.key) & (block.c.space == space))
            blocks.append(block)
        wanted: list[ColumnElement[bool]] = [] if ids is None else [memories.c.id.in_(ids)]
        wanted += [] if since is None else [memories.c.version > since]
        rows = (
            select(memories.c.id, type_coerce(memories.c.payload, LargeBinary), *(block.c.vector for block in blocks))
            .select_from(joined)
            .where(memories.c.collection_id == collection_id, *wanted)
            .order_by(memories.c.key)
            .execution_options(yield_per=chunk)
        )

        def chunks(connection: Connection) -> Generator[PatternChunk, None, None]:
            with connection.execute(rows) as result:  # closed, too, where the stream is left early
                for part in result.partitions():
                    ids, payloads, *vectors = map(list, zip(*part, strict=True))
                    named = zip(spaces, vectors, strict=True)
                    yield PatternChunk(ids, {space: from_bytes(each, size) for (space, size), each in named}, payloads)

        with self._database.read() as connection:
            version = read_version(connection, collection_id)
            count = connection.execute(
                select(func.count()).where(memories.c.collection_id == collection_id)
            ).scalar_one()
            deleted = None if since is None else _deleted_since(connection, collection_id, since)
            with closing(chunks(connection)) as stream:
                yield PatternStream(version, count, stream, deleted)

    def ids(self, collection_id: int) -> set[str]:
        """The ids of all memories."""
        with self._database.read() as connection:
            return set(
                connection.execute(select(memories.c.id).where(memories.c.collection_id == collection_id)).scalars()
            )

    def blob_hashes_in_use(self, hashes: Sequence[str]) -> set[str]:
        """Those of `hashes` that a memory, or an item of a job, still names."""
        used: set[str] = set()
        with self._database.read() as connection:
            for part in _parts(hashes):
                named = (select(c.blob_hash).where(c.blob_hash.in_(part)) for c in (memories.c, job_items.c))
                used.update(connection.execute(union(*named)).scalars())
        return used


def lock(connection: Connection, collection_id: int) -> tuple[int, int]:
    """The collection's version and generation, which nobody else changes before this transaction ends. Raises
    `CollectionNotFound`."""
    c = collections.c
    row = connection.execute(select(c.version, c.generation).where(c.id == collection_id).with_for_update()).first()
    if row is None:
        raise CollectionNotFound("The collection was deleted.")
    return row.version, row.generation


def lock_version(connection: Connection, collection_id: int) -> int:
    """The version alone, as `lock`."""
    return lock(connection, collection_id)[0]


def read_version(connection: Connection, collection_id: int) -> int:
    """The collection's version as a read sees it. Raises `CollectionNotFound`."""
    version: int | None = connection.execute(
        select(collections.c.version).where(collections.c.id == collection_id)
    ).scalar()
    if version is None:
        raise CollectionNotFound("The collection was deleted.")
    return version


def set_version(connection: Connection, collection_id: int, version: int) -> None:
    """To be called under `lock_version`, with the number after the one that it gave."""
    connection.execute(update(collections).where(collections.c.id == collection_id).values(version=version))


def _deleted_since(connection: Connection, collection_id: int, version: int) -> list[str] | None:
    """The ids deleted after a version; None where that is longer ago than deletions are known for."""
    known = select(collections.c.deletions_from).where(collections.c.id == collection_id)
    if connection.execute(known).scalar_one() > version:
        return None
    c = deletions.c
    return list(connection.execute(select(c.id).where(c.collection_id == collection_id, c.version > version)).scalars())


def _write_memories(
    connection: Connection, collection_id: int, version: int, writes: Sequence[MemoryWrite], keys: dict[str, int]
) -> None:
    """Insert the memories that `keys` does not know, adding their keys to it; replace the others and drop their
    patterns."""
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
        }
        known = write.id in keys
        rows[known].append({**row, "this": keys[write.id]} if known else {**row, "created_at": now})
    if rows[True]:
        replaced = [{"this": row["this"]} for row in rows[True]]
        connection.execute(delete(patterns).where(patterns.c.memory_key == bindparam("this")), replaced)
        connection.execute(update(memories).where(memories.c.key == bindparam("this")), rows[True])
    if rows[False]:
        inserted = connection.execute(insert(memories).returning(memories.c.id, memories.c.key), rows[False])
        keys.update((id_, key) for id_, key in inserted)


def _statuses(writes: Sequence[MemoryWrite], known: Mapping[str, int]) -> list[Literal["stored", "updated"]]:
    seen = set(known)
    statuses: list[Literal["stored", "updated"]] = []
    for write in writes:
        statuses.append("updated" if write.id in seen else "stored")
        seen.add(write.id)
    return statuses


def _keys(connection: Connection, collection_id: int, ids: Sequence[str]) -> dict[str, int]:
    """The keys of those of `ids` that exist."""
    keys: dict[str, int] = {}
    for part in _parts(ids):
        query = select(memories.c.id, memories.c.key).where(
            memories.c.collection_id == collection_id, memories.c.id.in_(part)
        )
        keys.update((id_, key) for id_, key in connection.execute(query))
    return keys


def _find(connection: Connection, collection_id: int, id_: str, *columns: Any) -> Row[Any]:
    """The key of a memory, then `columns`. Raises `MemoryNotFound`."""
    query = select(memories.c.key, *columns).where(memories.c.collection_id == collection_id, memories.c.id == id_)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise MemoryNotFound(f"There is no memory {id_!r}.")
    return row


def _parts(values: Sequence[str]) -> Iterator[Sequence[str]]:
    return (values[start : start + IN_MAX] for start in range(0, len(values), IN_MAX))


def _to_bytes(vector: Vector) -> bytes:
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()


def from_bytes(vectors: Sequence[bytes | None], dimension: int) -> Vector:
    """(rows,) raw vectors → (rows, dimension) float32, zero where there is none; writable, as torch wants it."""
    zero = bytes(4 * dimension)
    joined = bytearray().join([zero if vector is None else vector for vector in vectors])
    return np.frombuffer(joined, dtype="<f4").reshape(len(vectors), dimension)
