"""Jobs: work that was accepted and is done later, as rows that survive the process.

Life of a job (every other change of status is refused or ignored, as the method says):

    queued ──claim──▶ running ──finish──▶ done
      │                │  ▲  └──fail────▶ failed ──requeue, retry──▶ queued
      │                │  └─claim, once its lease has run out; after ATTEMPTS_MAX of them ──▶ dead ──retry──▶ queued
      └────cancel──────┴─────────────────▶ cancelled ──retry, where it had no items──▶ queued

Rules:
- A job belongs to its claimer until its lease runs out; heartbeats renew it. A claimer that died therefore loses it by
  itself.
- `attempts` counts claims since the job last answered an item: a job that moves forward is not dead however often it is
  interrupted.
- Jobs may be claimed together; one that was interrupted before runs by itself, so that a job which kills its worker
  takes no other with it.
- Items are answered in the transaction that does their work, once, and only while the job runs: nothing is done twice,
  and nothing is stored after `cancel` returned.
- An item that is answered keeps its answer, not what it was: that is a memory by then, which may be deleted.
- A job that is done keeps its result, not its items; one that was cancelled keeps those answered. One that failed or
  died keeps all of them until it is removed, so that it can be retried.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Any, Literal

from sqlalchemy import Connection, bindparam, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from service.errors import CollectionNotFound, Conflict, OperationNotFound
from service.storage.database import Database
from service.storage.tables import job_items, jobs
from service.storage.writer import Writer

Status = Literal["queued", "running", "done", "failed", "cancelled", "dead"]
ENDED: tuple[Status, ...] = ("done", "failed", "cancelled", "dead")
RETRIED: tuple[Status, ...] = ("failed", "cancelled", "dead")

ATTEMPTS_MAX = 5
"""Claims without progress after which a job is taken to be what kills its worker."""

LEASE_S = 15.0
"""Far above the second between two heartbeats, so that a slow machine does not lose its jobs; short enough to wait for
where several servers share a database."""

ENDED_KEPT_S = 7 * 24 * 3600.0
"""How long an ended job can be asked about."""


@dataclass(frozen=True)
class Job:
    """A job as its row says. `progress` is in 0..1; `attempts` counts claims since it last moved forward."""

    id: str
    collection_id: int | None
    kind: str
    status: Status
    progress: float
    payload: dict[str, Any]
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    attempts: int
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class NewItem:
    """An item to be worked on. `blob_hash` names the original it needs, which is kept until the item is answered."""

    body: dict[str, Any]
    blob_hash: str | None = None


def _new_id() -> str:
    return str(uuid.uuid4())


@dataclass(frozen=True)
class NewJob:
    """A job to be queued with its items."""

    kind: str
    payload: dict[str, Any]
    items: Sequence[NewItem] = ()
    id: str = field(default_factory=_new_id)


@dataclass(frozen=True)
class JobItem:
    """An item that waits for its answer. `position` is its place in the request."""

    position: int
    body: dict[str, Any]


@dataclass(frozen=True)
class ItemAnswer:
    """What became of an item."""

    position: int
    status: Literal["done", "failed"]
    result: dict[str, Any]


@dataclass(frozen=True)
class JobItems:
    """The items of a job that writes answer: its i-th write is item `positions[i]`, and `notes[i]`, if given, joins
    its result. `failed` are answered with them."""

    job_id: str
    positions: list[int]
    notes: list[dict[str, Any]] = field(default_factory=list)
    failed: list[ItemAnswer] = field(default_factory=list)


_JOB_COLUMNS = tuple(jobs.c[each.name] for each in fields(Job))


class Jobs:
    """The job methods of `Repository`."""

    _database: Database
    _writer: Writer

    def enqueue(
        self, kind: str, collection_id: int | None, payload: dict[str, Any], items: Sequence[NewItem] = ()
    ) -> str:
        """Queue a job with its items and return its id; it is on disk then. Raises `CollectionNotFound`."""
        job = NewJob(kind, payload, items)
        self._writer.submit(lambda connection: insert_job(connection, collection_id, job), on=collection_id)
        return job.id

    def claim(self, kinds: Sequence[str], owner: str, lease_s: float = LEASE_S) -> Job | None:
        """Take the oldest job of these kinds that is queued, or running with a lease that has run out; None if there is
        none.

        Jobs found with `ATTEMPTS_MAX` attempts are declared dead on the way.
        """
        claimed = self.claim_together(kinds, owner, 1, lease_s=lease_s)
        return claimed[0] if claimed else None

    def claim_together(
        self, kinds: Sequence[str], owner: str, limit: int, *, beside: bool = False, lease_s: float = LEASE_S
    ) -> list[Job]:
        """As `claim`, up to `limit` of the oldest in their order: one that was interrupted before alone, others up to
        it. `beside`: jobs claimed earlier still run, so an interrupted one is left where it is.
        """

        def run(connection: Connection) -> list[Job]:
            now = datetime.now(UTC)
            free = or_(jobs.c.status == "queued", (jobs.c.status == "running") & (jobs.c.lease_until <= now))
            query = select(jobs.c.key, jobs.c.attempts).where(jobs.c.kind.in_(kinds), free).order_by(jobs.c.key)
            oldest = query.limit(limit).with_for_update(skip_locked=True)
            claimed: list[int] = []
            while not claimed and (rows := connection.execute(oldest).all()):
                dead = [row.key for row in rows if row.attempts >= ATTEMPTS_MAX]
                if dead:
                    error = {
                        "code": "dead",
                        "detail": f"The job was interrupted {ATTEMPTS_MAX} times without progress.",
                    }
                    ended = {"status": "dead", "error": error, "lease_until": None, "updated_at": now}
                    connection.execute(update(jobs).where(jobs.c.key.in_(dead)).values(ended))
                    continue
                fresh = list(takewhile(lambda row: row.attempts == 0, rows))
                claimed = [row.key for row in (fresh if fresh or beside else rows[:1])]
                if not claimed:
                    return []
            taken = {
                "status": "running", "owner": owner, "attempts": jobs.c.attempts + 1,
                "lease_until": now + timedelta(seconds=lease_s), "updated_at": now,
            }  # fmt: skip
            if claimed:
                connection.execute(update(jobs).where(jobs.c.key.in_(claimed)).values(taken))
            these = select(*_JOB_COLUMNS).where(jobs.c.key.in_(claimed)).order_by(jobs.c.key)
            return [Job(*row) for row in connection.execute(these)]

        return self._writer.submit(run)

    def heartbeat(self, id_: str, owner: str, progress: float, lease_s: float = LEASE_S) -> bool:
        """Renew the lease and note the progress (0..1). False means stop: the job is no longer `owner`'s (cancelled,
        deleted, taken)."""
        return id_ in self.heartbeats(owner, {id_: progress}, lease_s)

    def heartbeats(self, owner: str, progress: Mapping[str, float], lease_s: float = LEASE_S) -> set[str]:
        """As `heartbeat`, of several jobs by their ids; those that are still `owner`'s."""

        def run(connection: Connection) -> set[str]:
            now = datetime.now(UTC)
            until = now + timedelta(seconds=lease_s)
            kept = set()
            for id_, share in progress.items():
                mine = (jobs.c.id == id_) & (jobs.c.owner == owner) & (jobs.c.status == "running")
                values = {"progress": share, "lease_until": until, "updated_at": now}
                if connection.execute(update(jobs).where(mine).values(values)).rowcount == 1:
                    kept.add(id_)
            return kept

        return self._writer.submit(run)

    def finish(self, id_: str, result: dict[str, Any], owner: str | None = None) -> bool:
        """The job is done. False (and nothing changes) if it no longer runs (cancelled, deleted, or finished by
        another), or runs as another `owner`'s by now."""
        return id_ in self.finish_together({id_: result}, owner)

    def finish_together(self, results: Mapping[str, dict[str, Any]], owner: str | None = None) -> set[str]:
        """As `finish`, of several jobs by their ids, in one transaction; those that are done by it."""

        def run(connection: Connection) -> set[str]:
            ended = {
                id_: end_job(connection, id_, "done", of=owner, progress=1.0, result=result)
                for id_, result in results.items()
            }
            return {id_ for id_, done in ended.items() if done}

        return self._writer.submit(run)

    def fail(self, id_: str, error: dict[str, Any], owner: str | None = None) -> bool:
        """The job cannot be done; `error` is {"code", "detail"}. False (and nothing changes) as of `finish`."""
        return self._writer.submit(lambda connection: end_job(connection, id_, "failed", of=owner, error=error))

    def requeue(self, collection_id: int, kind: str, codes: Collection[str]) -> int:
        """Queue a collection's jobs of this kind again that failed with one of these codes; their number."""
        c = jobs.c
        ended = (c.collection_id == collection_id) & (c.kind == kind) & (c.status == "failed")
        again = update(jobs).where(c.key == bindparam("this"), c.status == "failed")
        again = again.values(status="queued", error=None, attempts=0, updated_at=datetime.now(UTC))

        def run(connection: Connection) -> int:
            failed = connection.execute(select(c.key, c.error).where(ended))
            keys = [key for key, error in failed if error is not None and error["code"] in codes]
            if keys:
                connection.execute(again, [{"this": key} for key in keys])
            return len(keys)

        return self._writer.submit(run)

    def retry(self, id_: str) -> Job:
        """Queue a job again that failed, died or was cancelled; it goes on at its first item without an answer.

        Raises `OperationNotFound`, and `Conflict` if it is done, under way, or was cancelled and let go of its items.
        """
        again = {"status": "queued", "error": None, "result": None, "attempts": 0, "updated_at": datetime.now(UTC)}

        def run(connection: Connection) -> Job:
            job = _get(connection, id_)
            if job.status not in RETRIED:
                raise Conflict(
                    f"The operation {id_} is {job.status}: only one that failed, died or was cancelled can be retried."
                )
            if job.status == "cancelled" and job.payload.get("items"):
                raise Conflict(
                    f"The operation {id_} was cancelled, and what it had not done by then is gone: send it again."
                )
            connection.execute(update(jobs).where(jobs.c.id == id_).values(again))
            return _get(connection, id_)

        return self._writer.submit(run)

    def cancel(self, id_: str) -> Job:
        """Cancel a job that is queued or running; one cancelled before stays so. What it has already done is kept.

        Raises `OperationNotFound`, and `Conflict` if the job has ended otherwise.
        """

        def run(connection: Connection) -> Job:
            job = _get(connection, id_)
            if job.status in ENDED and job.status != "cancelled":
                raise Conflict(f"The operation {id_} has ended: {job.status}.")
            end_job(connection, id_, "cancelled")
            return _get(connection, id_)

        return self._writer.submit(run)

    def get_job(self, id_: str) -> Job:
        """Raises `OperationNotFound`."""
        with self._database.read() as connection:
            return _get(connection, id_)

    def active_job(self, collection_id: int, kind: str) -> str | None:
        """A job of this kind that is queued or runs; None if there is none."""
        c = jobs.c
        active = (c.collection_id == collection_id) & (c.kind == kind) & c.status.not_in(ENDED)
        with self._database.read() as connection:
            return connection.execute(select(c.id).where(active).limit(1)).scalar()

    def queued_jobs(self) -> dict[str, tuple[int, float]]:
        """By kind: how many jobs are queued, and the age of the oldest in seconds."""
        c = jobs.c
        query = select(c.kind, func.count(), func.min(c.created_at)).where(c.status == "queued").group_by(c.kind)
        now = datetime.now(UTC)
        with self._database.read() as connection:
            return {kind: (count, (now - oldest).total_seconds()) for kind, count, oldest in connection.execute(query)}

    def list_jobs(self, limit: int) -> list[Job]:
        """The `limit` jobs queued last, the newest first."""
        with self._database.read() as connection:
            rows = connection.execute(select(*_JOB_COLUMNS).order_by(jobs.c.key.desc()).limit(limit))
            return [Job(*row) for row in rows]

    def pending_items(self, job_id: str, limit: int, after: int = -1) -> list[JobItem]:
        """The first `limit` items behind position `after` that are not answered yet, in order."""
        query = (
            select(job_items.c.position, job_items.c.body)
            .join(jobs)
            .where(jobs.c.id == job_id, job_items.c.status == "queued", job_items.c.position > after)
            .order_by(job_items.c.position)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [JobItem(*row) for row in connection.execute(query)]

    def finish_items(self, job_id: str, answers: Sequence[ItemAnswer]) -> None:
        """Answer items without storing anything (those that failed, as a rule). Raises as `answer_items` does."""
        self.answer_together({job_id: answers})

    def answer_together(self, answers: Mapping[str, Sequence[ItemAnswer]]) -> None:
        """As `finish_items`, of several jobs by their ids: of all, or of none."""

        def run(connection: Connection) -> None:
            for job_id, each in answers.items():
                answer_items(connection, job_id, each)

        self._writer.submit(run)

    def item_answers(self, job_id: str) -> list[ItemAnswer]:
        """The items answered so far, in order; gone once the job is done."""
        query = (
            select(job_items.c.position, job_items.c.status, job_items.c.result)
            .join(jobs)
            .where(jobs.c.id == job_id, job_items.c.status != "queued")
            .order_by(job_items.c.position)
        )
        with self._database.read() as connection:
            return [ItemAnswer(*row) for row in connection.execute(query)]

    def release_leases(self) -> None:
        """End all leases, so that jobs of a former process can be claimed at once. For the one owner of a database, at
        open."""
        now = datetime.now(UTC)
        ended = update(jobs).where(jobs.c.status == "running").values(lease_until=now)
        self._writer.submit(lambda connection: connection.execute(ended))

    def remove_ended_jobs(self, older_than_s: float = ENDED_KEPT_S) -> int:
        """Remove the jobs that ended longer ago than this; their number is returned."""
        before = datetime.now(UTC) - timedelta(seconds=older_than_s)
        old = delete(jobs).where(jobs.c.status.in_(ENDED), jobs.c.updated_at <= before)
        return self._writer.submit(lambda connection: connection.execute(old).rowcount)


def insert_job(connection: Connection, collection_id: int | None, job: NewJob) -> None:
    """Queue a job in the caller's transaction. Raises `CollectionNotFound`."""
    now = datetime.now(UTC)
    row = {
        "id": job.id, "collection_id": collection_id, "kind": job.kind, "status": "queued", "progress": 0.0,
        "payload": job.payload, "attempts": 0, "created_at": now, "updated_at": now,
    }  # fmt: skip
    try:
        key = connection.execute(insert(jobs).returning(jobs.c.key), row).scalar_one()
    except IntegrityError:
        raise CollectionNotFound("The collection was deleted.") from None
    if job.items:
        rows = [
            {"job_key": key, "position": i, "body": item.body, "blob_hash": item.blob_hash, "status": "queued"}
            for i, item in enumerate(job.items)
        ]
        connection.execute(insert(job_items), rows)


def answer_items(connection: Connection, job_id: str, answers: Sequence[ItemAnswer]) -> None:
    """Answer items of a running job, in the caller's transaction.

    Raises `Conflict`, so that the caller's work is undone with it, if the job no longer runs (cancelled, deleted) or
    one of the items has been answered before.
    """
    now = datetime.now(UTC)
    running = (jobs.c.id == job_id) & (jobs.c.status == "running")
    key = connection.execute(
        update(jobs).where(running).values(attempts=0, updated_at=now).returning(jobs.c.key)
    ).scalar()
    if key is None:
        raise Conflict(f"The operation {job_id} no longer runs.")
    if not answers:
        return
    query = (
        update(job_items)
        .where(
            job_items.c.job_key == key,
            job_items.c.position == bindparam("at"),
            job_items.c.status == "queued",
        )
        .values(status=bindparam("outcome"), result=bindparam("answer"), body={}, blob_hash=None)
    )
    rows = [{"at": each.position, "outcome": each.status, "answer": each.result} for each in answers]
    if connection.execute(query, rows).rowcount != len(answers):
        raise Conflict(f"Items of the operation {job_id} have been answered before.")


def end_job(connection: Connection, id_: str, status: Status, *, of: str | None = None, **values: Any) -> bool:
    """Move a job to an end from where that is allowed, in the caller's transaction; whether it was. `of`: its owner."""
    begins: tuple[Status, ...] = ("queued", "running") if status == "cancelled" else ("running",)
    query = (
        update(jobs)
        .where(jobs.c.id == id_, jobs.c.status.in_(begins), *([] if of is None else [jobs.c.owner == of]))
        .values(status=status, lease_until=None, updated_at=datetime.now(UTC), **values)
        .returning(jobs.c.key)
    )
    key = connection.execute(query).scalar()
    items = delete(job_items).where(job_items.c.job_key == key)
    if key is not None and status == "done":
        connection.execute(items)
    if key is not None and status == "cancelled":
        connection.execute(items.where(job_items.c.status == "queued"))
    return key is not None


def _get(connection: Connection, id_: str) -> Job:
    row = connection.execute(select(*_JOB_COLUMNS).where(jobs.c.id == id_)).one_or_none()
    if row is None:
        raise OperationNotFound(f"There is no operation {id_!r}.")
    return Job(*row)
