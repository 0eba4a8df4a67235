"""When snapshots of a collection are due: rows beside the collections, so that all servers of a database go by one.

Rules:
- Whoever takes what is due queues its job and sets the next time in one transaction: of several
  servers one does, and none while a snapshot of the collection is under way.
- Times missed are made up for once: the next one is always to come, as many intervals after the last as it takes.
- All changes are made under the lock of the collection's row, as those of what deletes or replaces a collection are.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, insert, or_, select, update

from service.errors import CollectionNotFound, ScheduleNotFound
from service.storage.collection import HIDDEN
from service.storage.database import Database
from service.storage.jobs import ENDED, NewJob, Status, insert_job
from service.storage.tables import collections, jobs, snapshot_schedules
from service.storage.writer import Writer


@dataclass(frozen=True)
class Schedule:
    """`made`: the ids of those that it made and that are kept, the oldest first; `job_id`: of the one under way."""

    collection_id: int
    every_s: int
    keep: int
    next_at: datetime
    job_id: str | None
    made: list[str]
    made_at: datetime | None
    failed_at: datetime | None
    error: dict[str, Any] | None


@dataclass(frozen=True)
class Outcome:
    """How the job of a schedule ended; None: it is there no more."""

    status: Status | None
    error: dict[str, Any] | None = None


_c = snapshot_schedules.c
_COLUMNS = tuple(_c[each.name] for each in fields(Schedule))


class Schedules:
    """The schedule methods of `Repository`."""

    _database: Database
    _writer: Writer

    def put_schedule(self, name: str, every_s: int, keep: int) -> Schedule:
        """Set a collection's; a new one is due at once, a changed one at its interval after the last. Raises
        `CollectionNotFound`.
        """

        def run(connection: Connection) -> Schedule:
            collection_id = _lock(connection, collections.c.name == name)
            this = _c.collection_id == collection_id
            there = _row(connection, collection_id)
            values: dict[str, Any] = {"every_s": every_s, "keep": keep}
            if there is None:
                new = {"collection_id": collection_id, "next_at": datetime.now(UTC), "made": []}
                connection.execute(insert(snapshot_schedules).values(**values, **new))
            else:
                next_at = there.next_at + timedelta(seconds=every_s - there.every_s)
                connection.execute(update(snapshot_schedules).where(this).values(**values, next_at=next_at))
            now = _row(connection, collection_id)
            assert now is not None
            return now

        return self._writer.submit(run, on=self._number(name))

    def get_schedule(self, name: str) -> Schedule:
        """A collection's. Raises `CollectionNotFound`, `ScheduleNotFound`."""
        query = select(collections.c.id, *_COLUMNS).outerjoin_from(collections, snapshot_schedules)
        with self._database.read() as connection:
            row = connection.execute(query.where(collections.c.name == name)).one_or_none()
        if row is None:
            raise CollectionNotFound(f"There is no collection {name!r}.")
        if row.every_s is None:
            raise ScheduleNotFound(f"no snapshots of {name} are made at set times")
        return Schedule(*row[1:])

    def delete_schedule(self, name: str) -> None:
        """A collection's, if it has one. Raises `CollectionNotFound`."""

        def run(connection: Connection) -> None:
            this = _c.collection_id == _lock(connection, collections.c.name == name)
            connection.execute(delete(snapshot_schedules).where(this))

        self._writer.submit(run, on=self._number(name))

    def schedules_to_see(self) -> list[Schedule]:
        """Those that are due, or whose snapshot is under way or has ended."""
        seen = or_(_c.next_at <= datetime.now(UTC), _c.job_id.is_not(None))
        with self._database.read() as connection:
            return [Schedule(*row) for row in connection.execute(select(*_COLUMNS).where(seen))]

    def take_due(self, collection_id: int, kind: str, job: NewJob) -> bool:
        """Queue the job of a schedule that is due, unless one of this kind is under way; whether it was."""

        def run(connection: Connection) -> bool:
            _lock(connection, collections.c.id == collection_id)
            there, now = _row(connection, collection_id), datetime.now(UTC)
            active = (jobs.c.collection_id == collection_id) & (jobs.c.kind == kind) & jobs.c.status.not_in(ENDED)
            if there is None or there.next_at > now or there.job_id is not None:
                return False
            if connection.execute(select(jobs.c.id).where(active).limit(1)).first() is not None:
                return False
            insert_job(connection, collection_id, job)
            passed = (now - there.next_at) // timedelta(seconds=there.every_s)
            next_at = there.next_at + timedelta(seconds=there.every_s * (passed + 1))
            connection.execute(
                update(snapshot_schedules)
                .where(_c.collection_id == collection_id)
                .values(job_id=job.id, next_at=next_at)
            )
            return True

        try:
            return self._writer.submit(run, on=collection_id)
        except CollectionNotFound:
            return False

    def settle(self, collection_id: int, job_id: str) -> Outcome | None:
        """Let a schedule know how its job has ended; None while it has not, or where another server was first. Where
        the job is there no more (a restore took its collection's place) the snapshot is due again.
        """

        def run(connection: Connection) -> Outcome | None:
            _lock(connection, collections.c.id == collection_id)
            there = _row(connection, collection_id)
            if there is None or there.job_id != job_id:
                return None
            query = select(jobs.c.status, jobs.c.error, jobs.c.updated_at).where(jobs.c.id == job_id)
            job = connection.execute(query).one_or_none()
            if job is not None and job.status not in ENDED:
                return None
            values: dict[str, Any] = {"job_id": None}
            error = None
            if job is None:
                values["next_at"] = datetime.now(UTC)
            elif job.status != "done":
                error = job.error or {"code": job.status, "detail": f"the operation was {job.status}"}
                values |= {"error": error, "failed_at": job.updated_at}
            connection.execute(update(snapshot_schedules).where(_c.collection_id == collection_id).values(values))
            return Outcome(None if job is None else job.status, error)

        try:
            return self._writer.submit(run, on=collection_id)
        except CollectionNotFound:  # gone meanwhile, or another has its schedule by now
            return None

    def note_scheduled(self, name: str, id_: str) -> Schedule | None:
        """A snapshot was made for the schedule of the collection that has this name now, and is kept; the schedule, if
        there still is one.
        """

        def run(connection: Connection) -> Schedule | None:
            there = _of_name(connection, name)
            if there is None or id_ in there.made:
                return there
            made = {"made": [*there.made, id_], "made_at": datetime.now(UTC), "error": None, "failed_at": None}
            this = update(snapshot_schedules).where(_c.collection_id == there.collection_id)
            connection.execute(this.values(made))
            return _row(connection, there.collection_id)

        return self._writer.submit(run, on=self._number(name))

    def forget_scheduled(self, name: str, ids: Collection[str]) -> None:
        """These are kept no more."""

        def run(connection: Connection) -> None:
            if (there := _of_name(connection, name)) is not None:
                made = [id_ for id_ in there.made if id_ not in ids]
                this = update(snapshot_schedules).where(_c.collection_id == there.collection_id)
                connection.execute(this.values(made=made))

        if ids:
            self._writer.submit(run, on=self._number(name))

    def _number(self, name: str) -> int | None:
        """Of the collection that has the name now."""
        with self._database.read() as connection:
            return connection.execute(select(collections.c.id).where(collections.c.name == name)).scalar()


def hand_schedule_on(connection: Connection, former: int, successor: int) -> None:
    """The schedule of a collection becomes that of what takes its place, in the transaction that lets it."""
    this = update(snapshot_schedules).where(_c.collection_id == former)
    connection.execute(this.values(collection_id=successor))


def _lock(connection: Connection, this: ColumnElement[bool]) -> int:
    """The number of a collection that nobody deletes or replaces before the transaction ends."""
    shown = ~collections.c.name.startswith(HIDDEN, autoescape=True)
    found: int | None = connection.execute(select(collections.c.id).where(this, shown).with_for_update()).scalar()
    if found is None:
        raise CollectionNotFound("There is no such collection.")
    return found


def _row(connection: Connection, collection_id: int) -> Schedule | None:
    row = connection.execute(select(*_COLUMNS).where(_c.collection_id == collection_id)).one_or_none()
    return None if row is None else Schedule(*row)


def _of_name(connection: Connection, name: str) -> Schedule | None:
    """The schedule of the collection that has the name, under its lock."""
    try:
        return _row(connection, _lock(connection, collections.c.name == name))
    except CollectionNotFound:
        return None
