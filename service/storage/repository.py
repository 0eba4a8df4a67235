"""All rows of one database behind one object: collections here; memories (their writes, updates and receipts, and the
choice among them), drafts, jobs, API keys, what was learned, copies of whole collections and checks (`integrity`) in
the modules of their names.

Rules:
- Whoever writes goes through the `Writer` and is answered after the commit; whoever reads sees one state of the
  database.
- Callers name a collection by name once and by its number from then on: a number is never used again, so a collection
  that was deleted and made anew under the same name is not mistaken for the old one.
- Nothing of SQL leaves this package: values in, frozen records out, errors from the tree.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select, text
from sqlalchemy.exc import IntegrityError

from service.errors import CollectionExists, CollectionNotFound
from service.storage.collection import HIDDEN, Collection, collection_rows
from service.storage.copies import Copies
from service.storage.database import Database
from service.storage.drafts import Drafts
from service.storage.following import Following
from service.storage.integrity import Integrity
from service.storage.jobs import Jobs
from service.storage.keys import ApiKeys
from service.storage.learned import Learned
from service.storage.memories import Memories
from service.storage.payload_indexes import PayloadIndexes
from service.storage.receipts import Receipts
from service.storage.schedules import Schedules
from service.storage.streaming import Streaming
from service.storage.tables import collections, name_versions
from service.storage.updates import Updates
from service.storage.writer import Writer
from service.storage.writes import Writes

__all__ = ["Collection", "Repository"]


class Repository(
    Memories,
    Writes,
    Updates,
    Receipts,
    Streaming,
    Drafts,
    Jobs,
    Learned,
    ApiKeys,
    Following,
    PayloadIndexes,
    Schedules,
    Copies,
    Integrity,
):
    """Everything stored in one database. Safe to use from several threads."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self._database = database
        self._writer = writer

    @property
    def is_postgres(self) -> bool:
        return self._database.is_postgres

    def size_bytes(self) -> int:
        """What the whole database takes on disk: tables and indexes, without logs."""
        with self._database.read() as connection:
            if self.is_postgres:
                ours = (
                    "SELECT sum(pg_total_relation_size(oid)) FROM pg_class"
                    " WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace"
                )
                return int(connection.execute(text(ours)).scalar_one() or 0)
            pages, page = (connection.exec_driver_sql(f"PRAGMA {n}").scalar_one() for n in ("page_count", "page_size"))
            return int(pages * page)

    def empty_log(self) -> bool:
        """As `Database.empty_log`."""
        return self._database.empty_log()

    def compact(self) -> None:
        """As `Database.compact`."""
        self._database.compact()

    def ping(self) -> None:
        """Read one row. Raises `StorageUnavailable` while the database does not answer."""
        with self._database.read() as connection:
            connection.execute(select(1)).scalar_one()

    def create_collection(self, name: str, config: dict[str, Any]) -> Collection:
        """An empty collection at version 0, or where the versions of a deleted one of this name stopped. Raises
        `CollectionExists`."""

        def run(connection: Connection) -> Collection:
            last = connection.execute(select(name_versions.c.version).where(name_versions.c.name == name)).scalar()
            version, now = last or 0, datetime.now(UTC)
            row = insert(collections).values(name=name, config=config, version=version, created_at=now)
            try:
                id_ = connection.execute(row.returning(collections.c.id)).scalar_one()
            except IntegrityError:
                raise CollectionExists(f"A collection named {name!r} exists.") from None
            return Collection(id_, name, config, version, now, count=0)

        return self._writer.submit(run)

    def get_collection(self, name: str) -> Collection:
        """Raises `CollectionNotFound`."""
        with self._database.read() as connection:
            row = connection.execute(collection_rows().where(collections.c.name == name)).one_or_none()
        if row is None:
            raise _not_found(name)
        return Collection(*row)

    def list_collections(self) -> list[Collection]:
        """All collections by name, but the hidden ones (see `copies`)."""
        shown = ~collections.c.name.startswith(HIDDEN)
        with self._database.read() as connection:
            rows = connection.execute(collection_rows().where(shown).order_by(collections.c.name))
            return [Collection(*row) for row in rows]

    def delete_collection(self, name: str) -> None:
        """Delete a collection with all its rows in one transaction; deleting takes a version.

        Its blobs are left to `Blobs.remove_unreferenced`. Raises `CollectionNotFound`.
        """

        def run(connection: Connection) -> None:
            this = collections.c.name == name
            version = connection.execute(select(collections.c.version).where(this).with_for_update()).scalar()
            if version is None or name.startswith(HIDDEN):
                raise _not_found(name)
            connection.execute(delete(name_versions).where(name_versions.c.name == name))
            connection.execute(insert(name_versions).values(name=name, version=version + 1))
            connection.execute(delete(collections).where(this))

        self._writer.submit(run)


def _not_found(name: str) -> CollectionNotFound:
    return CollectionNotFound(f"There is no collection {name!r}.")
