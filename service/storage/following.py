"""What servers that share a database ask it about each other's writes.

Rules:
- A collection's row says all that has changed: `version` moves with its memories and kernels, `generation` with its
  encoders, `revision` with what was learned of it (kernels, calibration) and its configuration.
- Rows say what was written since a version; what was deleted since is in `deletions`, kept for `KEPT_S`. Who is further
  behind compares all ids (`PatternStream.deleted` is None).
- Only PostgreSQL is shared, so only there deletions are noted.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, delete, func, insert, select, update

from service.errors import OriginalsElsewhere
from service.storage.blobs import Blobs
from service.storage.collection import HIDDEN
from service.storage.database import Database
from service.storage.jobs import ENDED
from service.storage.tables import collections, deletions, facts, jobs
from service.storage.writer import Writer

KEPT_S = 3600.0
"""A server that does not hear of the others for longer has more to catch up with than deletions."""


@dataclass(frozen=True)
class Head:
    """Where a collection stands."""

    id: int
    name: str
    version: int
    generation: int
    revision: int


class Following:
    """The methods of `Repository` that servers follow each other by."""

    _database: Database
    _writer: Writer

    @property
    def is_shared(self) -> bool:
        """Whether other servers may write to the database as well."""
        return self._database.is_postgres

    def heads(self) -> list[Head]:
        """All collections, as they stand; but hidden ones (see `copies`)."""
        c = collections.c
        shown = select(c.id, c.name, c.version, c.generation, c.revision).where(~c.name.startswith(HIDDEN))
        with self._database.read() as connection:
            rows = connection.execute(shown.order_by(c.id))
            return [Head(*row) for row in rows]

    def ended(self, job_ids: Collection[str]) -> set[str]:
        """Those of these jobs that have ended, or are there no more."""
        with self._database.read() as connection:
            alive = select(jobs.c.id).where(jobs.c.id.in_(list(job_ids)), jobs.c.status.not_in(ENDED))
            return set(job_ids).difference(connection.execute(alive).scalars())

    def share_originals(self, blobs: Blobs, place: str) -> str:
        """Make sure that the originals which `blobs` keeps are those of this database; the first server to ask decides.
        `place` is how an operator would name them. Returns what names the database. Raises `OriginalsElsewhere`.
        """

        def run(connection: Connection) -> tuple[str, str]:
            kept: dict[str, str] = {}
            kept.update((row.name, row.value) for row in connection.execute(select(facts)))
            if "originals" not in kept:
                kept = {"originals": blobs.identity() or uuid.uuid4().hex, "originals_at": place}
                connection.execute(insert(facts), [{"name": name, "value": value} for name, value in kept.items()])
                blobs.identify(kept["originals"])
            return kept["originals"], kept["originals_at"]

        theirs, where = self._writer.submit(run)
        if blobs.identity() != theirs:
            raise OriginalsElsewhere(
                f"this database's originals are in another folder (at first {where}), and {place} is not it: set "
                "ENGRAM_ORIGINALS to a folder that all its servers see"
            )
        return theirs

    def forget_deletions(self, older_than_s: float = KEPT_S) -> None:
        """Shorten the log of deletions."""
        c = deletions.c
        old = c.deleted_at <= datetime.now(UTC) - timedelta(seconds=older_than_s)

        def run(connection: Connection) -> None:
            ends = select(c.collection_id, func.max(c.version)).where(old).group_by(c.collection_id)
            for collection_id, version in connection.execute(ends).all():
                connection.execute(
                    update(collections).where(collections.c.id == collection_id).values(deletions_from=version)
                )
                connection.execute(delete(deletions).where(c.collection_id == collection_id, c.version <= version))

        self._writer.submit(run)


def note_deleted(connection: Connection, collection_id: int, version: int, ids: Sequence[str]) -> None:
    """Let other servers know, in the transaction that deletes, whose version this is."""
    if connection.dialect.name != "postgresql" or not ids:
        return
    now = datetime.now(UTC)
    connection.execute(
        insert(deletions),
        [{"collection_id": collection_id, "version": version, "id": id_, "deleted_at": now} for id_ in ids],
    )


def revise(connection: Connection, collection_id: int) -> int:
    """Let other servers know that what was learned of a collection, or its configuration, changes; its revision."""
    row = update(collections).where(collections.c.id == collection_id)
    revised = row.values(revision=collections.c.revision + 1).returning(collections.c.revision)
    return int(connection.execute(revised).scalar_one())
