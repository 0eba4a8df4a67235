"""Memories and their patterns: reading one, and streaming all to a bank. They are written in `writes` and `updates`.

Rules:
- A write takes the collection's next version, under the collection's row lock.
- A memory that has expired is not there for whoever asks for it; only a bank's load still meets it, with its moment.
- A moment is a whole number of microseconds since 1970, here and in the bank, so that both compare the same.
- Nothing is done per value in Python: a vector is one bytes object on the way in, and a chunk of them one copy on the
  way out.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
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
    func,
    or_,
    select,
    type_coerce,
    union,
    update,
)

from service.errors import CollectionNotFound, MemoryNotFound, PreconditionFailed
from service.storage.collection import HIDDEN
from service.storage.database import Database
from service.storage.tables import collections, deletions, job_items, jobs, memories, pattern_drafts, patterns
from service.storage.writer import Writer

Vector = NDArray[np.float32]

IN_MAX = 1000
"""Values in one `IN`: databases bound them (SQLite to 32,766), and statements of few sizes are compiled once."""


# Every recall of captions asks this, and building it takes as long as running it.
_DESCRIBE = select(memories.c.id, memories.c.text, memories.c.blob_hash.is_not(None)).where(
    memories.c.collection_id == bindparam("collection"), memories.c.id.in_(bindparam("ids", expanding=True))
)


@dataclass(frozen=True)
class MemorySize:
    """What a memory takes besides its vectors; `blob_hash` names its original."""

    id_bytes: int
    text_bytes: int
    payload_bytes: int
    blob_hash: str | None


@dataclass(frozen=True, eq=False)
class MemoryWrite:
    """A memory to be stored. `vectors` maps a space to its block, (dimension,) float32. `if_version`: the version that
    the memory must be at (0: it must not be there); None: any."""

    id: str
    text: str | None = None
    payload: dict[str, Any] | None = None
    blob_hash: str | None = None
    media_type: str | None = None
    vectors: Mapping[str, Vector] = field(default_factory=dict)
    expires_at: int | None = None
    if_version: int | None = None


Status = Literal["stored", "updated"] | PreconditionFailed


@dataclass(frozen=True)
class Written:
    """The collection's version after (unchanged if nothing was written), and what became of each write, in order."""

    version: int
    statuses: list[Status]

    @property
    def kept(self) -> list[int]:
        """The places of the writes that were not refused."""
        return [place for place, status in enumerate(self.statuses) if not isinstance(status, PreconditionFailed)]


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
    expires_at: int | None
    spaces: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """What a memory says of itself: its caption, and whether its original is kept."""

    text: str | None
    has_original: bool


@dataclass(frozen=True, eq=False)
class PatternChunk:
    """Rows of a collection in order: `vectors[space]` is (rows, dimension) float32, zero where a memory lacks the
    space; payloads are JSON; `expires` are moments, None for a memory that does not expire."""

    ids: list[str]
    vectors: dict[str, Vector]
    payloads: list[bytes | None]
    expires: list[int | None]


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

    def get_memory(self, collection_id: int, id_: str) -> Memory:
        """Raises `MemoryNotFound`."""
        c = memories.c
        columns = (
            c.version, c.text, c.payload, c.blob_hash, c.media_type, c.created_at, c.updated_at, c.expires_at,
        )  # fmt: skip
        with self._database.read() as connection:
            values: dict[str, Any] = dict(find(connection, collection_id, id_, *columns)._mapping)
            spaces = (
                select(patterns.c.space).where(patterns.c.memory_key == values.pop("key")).order_by(patterns.c.space)
            )
            return Memory(id=id_, spaces=tuple(connection.execute(spaces).scalars()), **values)

    def describe(self, collection_id: int, ids: Sequence[str]) -> dict[str, Description]:
        """Of those of `ids` that are stored now, in one query for each `IN_MAX` of them."""
        found: dict[str, Description] = {}
        with self._database.read() as connection:
            for part in parts_of(ids):
                rows = connection.execute(_DESCRIBE, {"collection": collection_id, "ids": part})
                found.update((id_, Description(text, bool(kept))) for id_, text, kept in rows)
        return found

    def is_described(self, collection_id: int) -> bool:
        """Whether any memory of the collection has a caption or an original."""
        c = memories.c
        some = (c.collection_id == collection_id) & (c.text.is_not(None) | c.blob_hash.is_not(None))
        with self._database.read() as connection:
            return connection.execute(select(memories.c.key).where(some).limit(1)).first() is not None

    def version_of(self, collection_id: int) -> int:
        """The number of the collection's last write. Raises `CollectionNotFound`."""
        with self._database.read() as connection:
            return read_version(connection, collection_id)

    def count_since(self, collection_id: int, version: int) -> int:
        """How many memories were last written after `version`."""
        query = select(func.count()).where(memories.c.collection_id == collection_id, memories.c.version > version)
        with self._database.read() as connection:
            return connection.execute(query).scalar_one()

    def get_vectors(self, collection_id: int, id_: str) -> dict[str, Vector]:
        """The memory's blocks by space, each (dimension,) float32. Raises `MemoryNotFound`."""
        with self._database.read() as connection:
            key = find(connection, collection_id, id_)[0]
            rows = connection.execute(select(patterns.c.space, patterns.c.vector).where(patterns.c.memory_key == key))
            return {space: from_bytes([vector], len(vector) // 4)[0] for space, vector in rows}

    def sample_sizes(self, collection_id: int, limit: int) -> list[MemorySize]:
        """Of the memories that were first stored last."""
        c = memories.c
        query = (
            select(c.id, c.text, func.length(c.payload), c.blob_hash)
            .where(c.collection_id == collection_id)
            .order_by(c.key.desc())
            .limit(limit)
        )
        with self._database.read() as connection:
            return [
                MemorySize(len(id_.encode()), len((text or "").encode()), payload or 0, blob_hash)
                for id_, text, payload, blob_hash in connection.execute(query)
            ]

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
            select(
                memories.c.id, type_coerce(memories.c.payload, LargeBinary), memories.c.expires_at,
                *(block.c.vector for block in blocks),
            )
            .select_from(joined)
            .where(memories.c.collection_id == collection_id, *wanted)
            .order_by(memories.c.key)
            .execution_options(yield_per=chunk)
        )  # fmt: skip

        def chunks(connection: Connection) -> Generator[PatternChunk, None, None]:
            with connection.execute(rows) as result:  # closed, too, where the stream is left early
                for part in result.partitions():
                    ids, payloads, expires, *vectors = map(list, zip(*part, strict=True))
                    named = zip(spaces, vectors, strict=True)
                    blocks = {space: from_bytes(each, size) for (space, size), each in named}
                    yield PatternChunk(ids, blocks, payloads, expires)

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
            for part in parts_of(hashes):
                named = (select(c.blob_hash).where(c.blob_hash.in_(part)) for c in (memories.c, job_items.c))
                used.update(connection.execute(union(*named)).scalars())
        return used


def microseconds_now() -> int:
    return time.time_ns() // 1000


def unexpired() -> ColumnElement[bool]:
    """That a memory is still there now."""
    return or_(memories.c.expires_at.is_(None), memories.c.expires_at > microseconds_now())


def lock(connection: Connection, collection_id: int) -> tuple[int, int]:
    """The collection's version and generation, which nobody else changes before this transaction ends. Raises
    `CollectionNotFound`, also of one that a restore took the place of: what is written there goes with it."""
    c = collections.c
    this = select(c.version, c.generation, c.name).where(c.id == collection_id)
    row = connection.execute(this.with_for_update()).first()
    if row is None or row.name.startswith(HIDDEN):
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


def find(connection: Connection, collection_id: int, id_: str, *columns: Any) -> Row[Any]:
    """The key of a memory, then `columns`. Raises `MemoryNotFound`."""
    this = (memories.c.collection_id == collection_id) & (memories.c.id == id_) & unexpired()
    query = select(memories.c.key, *columns).where(this)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise MemoryNotFound(f"There is no memory {id_!r}.")
    return row


def parts_of(values: Sequence[str]) -> Iterator[Sequence[str]]:
    return (values[start : start + IN_MAX] for start in range(0, len(values), IN_MAX))


def to_bytes(vector: Vector) -> bytes:
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()


def from_bytes(vectors: Sequence[bytes | None], dimension: int) -> Vector:
    """(rows,) raw vectors → (rows, dimension) float32, zero where there is none; writable, as torch wants it."""
    zero = bytes(4 * dimension)
    joined = bytearray().join([zero if vector is None else vector for vector in vectors])
    return np.frombuffer(joined, dtype="<f4").reshape(len(vectors), dimension)
