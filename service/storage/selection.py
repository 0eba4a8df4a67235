"""Memories chosen by a filter or by their ids: a page of them, their number, their deletion.

Rules:
- The order is that in which memories were first stored. A cursor is a place in it, so whoever reads on meets every
  memory that was there all the while, once, whatever is written meanwhile.
- Many are deleted in several transactions, each with a version of its own: other writes need not wait for all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, TextClause, and_, delete, func, select

from service.core.filter import Clause
from service.storage.database import Database
from service.storage.dialects import Postgres, Sqlite
from service.storage.filtering import Expression
from service.storage.following import note_deleted
from service.storage.memories import IN_MAX, Deleted, Memory, lock_version, read_version, set_version, unexpired
from service.storage.tables import memories, patterns
from service.storage.writer import Writer

DELETED_AT_ONCE = 5_000
"""Memories deleted in one transaction: a tenth of a second or two, which is how long another write may wait."""

_c = memories.c
_COLUMNS: tuple[Any, ...] = (
    _c.key, _c.id, _c.version, _c.text, _c.payload, _c.blob_hash, _c.media_type, _c.created_at, _c.updated_at,
    _c.expires_at,
)  # fmt: skip


@dataclass(frozen=True)
class Page:
    """Memories in order, at a version of their collection; `after` is where to go on, None where nothing follows."""

    version: int
    memories: list[Memory]
    after: int | None


class Selection:
    """The methods of `Repository` that choose among memories. A filter of None keeps all."""

    _database: Database
    _writer: Writer

    def scroll(self, collection_id: int, clause: Clause | None, after: int, limit: int) -> Page:
        """At most `limit` memories whose place is beyond `after` (0: from the first). Raises `CollectionNotFound`."""
        query = (
            select(*_COLUMNS).where(self._kept(collection_id, clause), _c.key > after).order_by(_c.key).limit(limit + 1)
        )
        with self._database.read() as connection:
            version = read_version(connection, collection_id)
            rows = connection.execute(query).all()
            page, more = rows[:limit], len(rows) > limit
            return Page(version, _memories(connection, page), page[-1].key if more else None)

    def get_memories(self, collection_id: int, ids: Sequence[str]) -> Page:
        """Those of `ids` that exist, in the order asked for, each once. Raises `CollectionNotFound`."""
        wanted = list(dict.fromkeys(ids))
        with self._database.read() as connection:
            version = read_version(connection, collection_id)
            rows: list[Row[Any]] = []
            for start in range(0, len(wanted), IN_MAX):
                some = wanted[start : start + IN_MAX]
                rows += connection.execute(select(*_COLUMNS).where(self._kept(collection_id, None), _c.id.in_(some)))
            found = {memory.id: memory for memory in _memories(connection, rows)}
        return Page(version, [found[id_] for id_ in wanted if id_ in found], None)

    def count_where(self, collection_id: int, clause: Clause | None) -> tuple[int, int]:
        """The collection's version, and how many memories the filter keeps. Raises `CollectionNotFound`."""
        with self._database.read() as connection:
            version = read_version(connection, collection_id)
            query = select(func.count()).select_from(memories).where(self._kept(collection_id, clause))
            return version, connection.execute(query).scalar_one()

    def ids_where(self, collection_id: int, clause: Clause) -> Deleted:
        """What `delete_where` would delete. Raises `CollectionNotFound`."""
        with self._database.read() as connection:
            version = read_version(connection, collection_id)
            query = select(_c.id).where(self._kept(collection_id, clause)).order_by(_c.key)
            return Deleted(version, list(connection.execute(query).scalars()))

    def delete_where(
        self, collection_id: int, clause: Clause, then: Callable[[Deleted], None] = lambda _: None
    ) -> Deleted:
        """Delete what the filter keeps; what is stored meanwhile may escape it. `then` is called for every transaction,
        as in `Writer.submit`. Raises `CollectionNotFound`."""
        ids: list[str] = []
        after = 0
        while True:

            def run(connection: Connection, after: int = after) -> tuple[Deleted, int]:
                version = lock_version(connection, collection_id)
                place = and_(self._kept(collection_id, clause), _c.key > after)
                rows = connection.execute(
                    select(_c.key, _c.id).where(place).order_by(_c.key).limit(DELETED_AT_ONCE)
                ).all()
                if not rows:
                    return Deleted(version, []), after
                keys = [row.key for row in rows]
                for start in range(0, len(keys), IN_MAX):
                    connection.execute(delete(memories).where(_c.key.in_(keys[start : start + IN_MAX])))
                set_version(connection, collection_id, version + 1)
                note_deleted(connection, collection_id, version + 1, [row.id for row in rows])
                return Deleted(version + 1, [row.id for row in rows]), keys[-1]

            deleted, after = self._writer.submit(
                run, lambda done: then(done[0]) if done[0].ids else None, on=collection_id
            )
            ids += deleted.ids
            if len(deleted.ids) < DELETED_AT_ONCE:
                return Deleted(deleted.version, ids)

    def _kept(self, collection_id: int, clause: Clause | None) -> ColumnElement[bool]:
        this: ColumnElement[bool] = and_(_c.collection_id == collection_id, unexpired())
        if clause is None or clause.empty:
            return this
        kept: TextClause = Expression(clause, Postgres() if self._database.is_postgres else Sqlite()).bound()
        return and_(this, kept)


def _memories(connection: Connection, rows: Sequence[Row[Any]]) -> list[Memory]:
    """Rows of `_COLUMNS` as memories."""
    spaces: dict[int, list[str]] = {row.key: [] for row in rows}
    keys = list(spaces)
    for start in range(0, len(keys), IN_MAX):
        query = select(patterns.c.memory_key, patterns.c.space).where(
            patterns.c.memory_key.in_(keys[start : start + IN_MAX])
        )
        for key, space in connection.execute(query.order_by(patterns.c.memory_key, patterns.c.space)):
            spaces[key].append(space)
    return [Memory(spaces=tuple(spaces[row.key]), **_without_key(row)) for row in rows]


def _without_key(row: Row[Any]) -> dict[str, Any]:
    return {name: value for name, value in row._mapping.items() if name != "key"}
