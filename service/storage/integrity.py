"""What `fsck` asks the database: whether it is whole, and its rows as they are, however damaged; and their mending.

Rules:
- Nothing is parsed on the way out: bytes that are not what they should be are what is looked for.
- A row that the driver cannot even hand out raises `StorageUnavailable`, as a damaged page does.
- What is mended is a write like any other: under the collection's lock, with its next version, so that servers which
  share the database follow it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, LargeBinary, bindparam, delete, exists, func, or_, select, text, type_coerce, update
from sqlalchemy.exc import DBAPIError

from service.errors import StorageUnavailable
from service.storage.collection import Collection, collection_rows
from service.storage.database import Database
from service.storage.following import revise
from service.storage.memories import lock_version, set_version
from service.storage.tables import collections, job_items, jobs, kernels, memories, patterns
from service.storage.writer import Writer

FAULTS_MAX = 100
"""Sentences of SQLite's own check: whoever has more needs a snapshot, not a longer list."""

ROWS_AT_ONCE = 1_000
"""Patterns held while they are looked at; 4 MB at a thousand dimensions."""

MENDED_AT_ONCE = 1_000

_OF_INDEX = re.compile(r"row \d+ missing from index |wrong # of entries in index |non-unique entry in index ")
_OF_ROWS = re.compile(r"CHECK constraint failed in (patterns|kernels)$")  # looked at row by row


@dataclass(frozen=True)
class DatabaseFaults:
    """`structure`: what cannot be mended here. `indexes`: what building the indexes anew mends. `orphans`: by table,
    the rows that belong to nothing, by their rowids."""

    structure: list[str]
    indexes: list[str]
    orphans: dict[str, list[int]]


@dataclass(frozen=True, eq=False)
class StoredPattern:
    """A row of patterns as it is. `has_text`, `blob_hash`: what its memory could be encoded from again."""

    key: int
    id: str
    space: str
    dtype: Any
    dimension: Any
    vector: Any
    has_text: bool
    blob_hash: str | None


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A row of kernels that has, or should have, a weight."""

    key: int
    space: str
    number: int
    status: str
    rows: Any
    dimension: Any
    weight: Any


class Integrity:
    """The methods of `Repository` for checks."""

    _database: Database
    _writer: Writer

    def every_collection(self) -> list[Collection]:
        """The hidden ones, too. Raises `StorageUnavailable` where a configuration cannot be read."""
        with _rows_readable(), self._database.read() as connection:
            return [Collection(*row) for row in connection.execute(collection_rows().order_by(collections.c.id))]

    def database_faults(self) -> DatabaseFaults:
        """SQLite's own check of every page, index and constraint; of PostgreSQL what it has counted itself: pages whose
        checksums were wrong."""
        with _rows_readable(), self._database.read() as connection:
            if self._database.is_postgres:
                counted = "SELECT checksum_failures FROM pg_stat_database WHERE datname = current_database()"
                wrong = connection.execute(text(counted)).scalar() or 0
                told = [f"PostgreSQL has met {wrong:,} pages of this database with a wrong checksum"] if wrong else []
                return DatabaseFaults(told, [], {})
            said = connection.exec_driver_sql(f"PRAGMA integrity_check({FAULTS_MAX})").scalars()
            faults = [line for line in said if line != "ok" and not _OF_ROWS.match(line)]
            orphans: dict[str, list[int]] = {}
            for table, row, *_ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
                orphans.setdefault(table, []).append(row)
        indexes = [line for line in faults if _OF_INDEX.match(line)]
        return DatabaseFaults([line for line in faults if line not in indexes], indexes, orphans)

    def rebuild_indexes(self) -> None:
        self._writer.submit(lambda connection: connection.exec_driver_sql("REINDEX"))

    def remove_orphans(self, orphans: dict[str, list[int]]) -> None:
        """`DatabaseFaults.orphans`; what belongs to them goes with them."""

        def run(connection: Connection) -> None:
            for table, rows in orphans.items():
                connection.execute(text(f'DELETE FROM "{table}" WHERE rowid = :row'), [{"row": row} for row in rows])

        self._writer.submit(run)

    def pattern_dimensions(self, collection_id: int) -> dict[str, dict[int, int]]:
        """By space: how many patterns there are of each dimension."""
        p = patterns.c
        query = select(p.space, p.dimension, func.count()).join_from(patterns, memories)
        query = query.where(memories.c.collection_id == collection_id).group_by(p.space, p.dimension)
        found: dict[str, dict[int, int]] = {}
        with _rows_readable(), self._database.read() as connection:
            for space, dimension, count in connection.execute(query):
                found.setdefault(space, {})[dimension] = count
        return found

    def iter_stored_patterns(self, collection_id: int) -> Iterator[StoredPattern]:
        m, p = memories.c, patterns.c
        query = (
            select(m.key, m.id, p.space, p.dtype, p.dimension, p.vector, m.text.is_not(None), m.blob_hash)
            .join_from(memories, patterns)
            .where(m.collection_id == collection_id)
            .order_by(m.key, p.space)
            .execution_options(yield_per=ROWS_AT_ONCE)
        )
        with _rows_readable(), self._database.read() as connection, connection.execute(query) as rows:
            for row in rows:
                yield StoredPattern(*row)

    def iter_payloads(self, collection_id: int) -> Iterator[tuple[str, bytes]]:
        """The id and the payload of each memory that has one, as bytes."""
        c = memories.c
        query = (
            select(c.id, type_coerce(c.payload, LargeBinary))
            .where(c.collection_id == collection_id, c.payload.is_not(None))
            .order_by(c.key)
            .execution_options(yield_per=ROWS_AT_ONCE)
        )
        with _rows_readable(), self._database.read() as connection, connection.execute(query) as rows:
            for row in rows:
                yield row.id, row.payload

    def lacking(
        self, collection_id: int, space: str, source: Literal["image", "text"], limit: int | None = None
    ) -> list[str]:
        """The ids of the memories that have what a space's encoder reads, and no pattern there."""
        c = memories.c
        made = exists().where(patterns.c.memory_key == c.key, patterns.c.space == space)
        kept = (c.blob_hash if source == "image" else c.text).is_not(None)
        query = select(c.id).where(c.collection_id == collection_id, kept, ~made).order_by(c.key).limit(limit)
        with _rows_readable(), self._database.read() as connection:
            return list(connection.execute(query).scalars())

    def remove_patterns(self, collection_id: int, rows: Sequence[tuple[int, str]]) -> None:
        """Remove patterns, by their memories' keys and their spaces; the memories stay."""
        p = patterns.c
        this = delete(patterns).where(p.memory_key == bindparam("key_"), p.space == bindparam("space_"))

        def run(connection: Connection, part: Sequence[tuple[int, str]]) -> None:
            version = lock_version(connection, collection_id) + 1
            connection.execute(this, [{"key_": key, "space_": space} for key, space in part])
            changed = update(memories).where(memories.c.key == bindparam("key_")).values(version=version)
            connection.execute(changed, [{"key_": key} for key in sorted({key for key, _ in part})])
            set_version(connection, collection_id, version)

        for start in range(0, len(rows), MENDED_AT_ONCE):
            part = rows[start : start + MENDED_AT_ONCE]
            self._writer.submit(lambda connection, part=part: run(connection, part))  # type: ignore[misc]

    def iter_weights(self, collection_id: int) -> Iterator[StoredWeight]:
        c = kernels.c
        kept = or_(c.status != "dropped", c.weight.is_not(None))
        query = select(c.key, c.space, c.number, c.status, c.rows, c.dimension, c.weight)
        query = query.where(c.collection_id == collection_id, kept).order_by(c.key)
        with _rows_readable(), self._database.read() as connection, connection.execute(query) as rows:
            for row in rows:
                yield StoredWeight(*row)

    def drop_kernels(self, collection_id: int, keys: Sequence[int]) -> None:
        """Let kernels go whose weight is damaged; their records stay."""

        def run(connection: Connection) -> None:
            version = lock_version(connection, collection_id)
            these = kernels.c.key.in_(keys)
            connection.execute(update(kernels).where(these).values(status="dropped", weight=None))
            set_version(connection, collection_id, version + 1)
            revise(connection, collection_id)

        self._writer.submit(run)

    def named_originals(self, prefix: str) -> set[str]:
        """The hashes with this beginning that a memory, or an item that waits, names."""
        found: set[str] = set()
        # "g" follows every hexadecimal digit, in every order of letters that a database may have.
        with _rows_readable(), self._database.read() as connection:
            for c in (memories.c.blob_hash, job_items.c.blob_hash):
                between = (c >= prefix) & (c < f"{prefix}g")
                found.update(connection.execute(select(c).where(between).distinct()).scalars())
        return found

    def named_by(self, blob_hash: str) -> list[str]:
        """Who names an original: memories as collection/id, items as operations'."""
        m, i = memories.c, job_items.c
        kept = select(collections.c.name, m.id).join_from(memories, collections).where(m.blob_hash == blob_hash)
        waiting = select(jobs.c.id, i.position).join_from(job_items, jobs).where(i.blob_hash == blob_hash)
        with _rows_readable(), self._database.read() as connection:
            named = [f"{name}/{id_}" for name, id_ in connection.execute(kept.order_by(m.key))]
            return [*named, *(f"item {position} of operation {id_}" for id_, position in connection.execute(waiting))]


@contextmanager
def _rows_readable() -> Iterator[None]:
    """Rows that hold what no driver reads (a text that is no UTF-8, a configuration that is no JSON)."""
    try:
        yield
    except DBAPIError as error:
        said = str(error.orig or error).strip().partition("\n")[0]
        raise StorageUnavailable(f"A row of the database cannot be read: {said}") from error
    except ValueError as error:
        raise StorageUnavailable(f"A row of the database cannot be read: {error}") from error
