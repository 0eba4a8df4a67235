"""Drafts: a space's patterns under another encoder, made beside those in use until they take their place, all at once.

Life of a draft:

    put_drafts ──▶ draft ──swap_space──▶ pattern
                     └──its memory is written again, or its job ends──▶ void: passed over, and removed

Rules:
- A draft belongs to a job and to one version of its memory, so nobody who writes memories has to know of drafts.
- A memory that cannot be encoded has a draft too, without a vector and with why: it is not tried again and again.
- Swapping is one transaction: patterns, configuration, kernels, calibration records, and the end of the job. It copies
  the drafts, so it takes as long as writing them does, and other writes wait meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from sqlalchemy import Connection, bindparam, delete, exists, func, insert, literal, or_, select, update

from service.errors import Conflict
from service.storage.database import Database
from service.storage.following import revise
from service.storage.jobs import ENDED, end_job
from service.storage.memories import Drafted, Vector, lock, unexpired
from service.storage.tables import collections, gates, jobs, kernels, memories, pattern_drafts, patterns
from service.storage.writer import Writer

REMOVED_AT_ONCE = 10_000
"""Drafts removed in one transaction: tens of milliseconds, for which other writes wait."""


@dataclass(frozen=True)
class Original:
    """What a memory was made from, at one of its versions."""

    key: int
    id: str
    version: int
    text: str | None
    blob_hash: str | None


@dataclass(frozen=True, eq=False)
class Draft:
    """A memory's block under another encoder, (dimension,) float32; None where `lost` says why there is none."""

    key: int
    version: int
    vector: Vector | None
    lost: str | None = None


@dataclass(frozen=True)
class Lost:
    """The memories that have a pattern and lost it in the drafts: how many, and the first ones with why."""

    count: int
    first: list[tuple[str, str]]


@dataclass(frozen=True)
class Swapped:
    """The collection's version after, how many memories have the space, those that were deleted since nothing was left
    of them, and the collection's revision after."""

    version: int
    memories: int
    deleted: list[str]
    revision: int = field(default=0, compare=False)


_d = pattern_drafts.c


class Drafts:
    """The draft methods of `Repository`."""

    _database: Database
    _writer: Writer

    def undrafted(
        self, collection_id: int, drafted: Drafted, source: Literal["image", "text"], after: int, limit: int
    ) -> list[Original]:
        """The next `limit` memories with a key over `after` that the space can be made of, or is, and that have no
        draft."""
        with self._database.read() as connection:
            query = _undrafted(collection_id, drafted, source)
            rows = connection.execute(query.where(memories.c.key > after).order_by(memories.c.key).limit(limit))
            return [Original(*row) for row in rows]

    def undrafted_of(
        self, collection_id: int, drafted: Drafted, source: Literal["image", "text"], ids: Sequence[str]
    ) -> list[Original]:
        """Those of `ids` (`IN_MAX` at most) that are there and have no draft."""
        with self._database.read() as connection:
            query = _undrafted(collection_id, drafted, source).where(memories.c.id.in_(ids)).order_by(memories.c.key)
            return [Original(*row) for row in connection.execute(query)]

    def count_drafts(self, job_id: str) -> int:
        key = select(jobs.c.key).where(jobs.c.id == job_id).scalar_subquery()
        with self._database.read() as connection:
            query = select(func.count()).select_from(pattern_drafts).where(_d.job_key == key)
            return connection.execute(query).scalar_one()

    def pattern_dimension(self, collection_id: int, space: str) -> int | None:
        """The dimension of the patterns stored in a space; None where there are none."""
        query = (
            select(patterns.c.dimension)
            .join(memories)
            .where(memories.c.collection_id == collection_id, patterns.c.space == space)
            .limit(1)
        )
        with self._database.read() as connection:
            return connection.execute(query).scalar()

    def iter_origins(self, collection_id: int, space: str, chunk: int = 4096) -> Iterator[tuple[str, bool, str | None]]:
        """The id of each memory that has a pattern in the space, whether it has a text, and its original's hash."""
        query = (
            select(memories.c.id, memories.c.text.is_not(None), memories.c.blob_hash)
            .join(patterns)
            .where(memories.c.collection_id == collection_id, patterns.c.space == space, unexpired())
            .order_by(memories.c.key)
            .execution_options(yield_per=chunk)
        )
        with self._database.read() as connection, connection.execute(query) as rows:
            for id_, has_text, blob_hash in rows:
                yield id_, bool(has_text), blob_hash

    def count_originals(self, collection_id: int, source: Literal["image", "text"]) -> int:
        """How many memories have what a space of this source is made from."""
        query = select(func.count()).where(memories.c.collection_id == collection_id, _original(source).is_not(None))
        with self._database.read() as connection:
            return connection.execute(query).scalar_one()

    def put_drafts(self, job_id: str, drafts: Sequence[Draft]) -> None:
        """Keep drafts, in place of earlier ones of their memories; of memories written since they were read, none.

        Raises `Conflict` if the job no longer runs.
        """
        made = {draft.key: draft for draft in drafts}

        def run(connection: Connection) -> None:
            running = (jobs.c.id == job_id) & (jobs.c.status == "running")
            moved = update(jobs).where(running).values(attempts=0, updated_at=datetime.now(UTC))
            job_key = connection.execute(moved.returning(jobs.c.key)).scalar()
            if job_key is None:
                raise Conflict(f"The operation {job_id} no longer runs.")
            there = select(memories.c.key, memories.c.version).where(memories.c.key.in_(made))
            current = [made[key] for key, version in connection.execute(there) if made[key].version == version]
            connection.execute(delete(pattern_drafts).where(_d.job_key == job_key, _d.memory_key.in_(made)))
            rows = [
                {
                    "job_key": job_key,
                    "memory_key": draft.key,
                    "version": draft.version,
                    "dimension": None if draft.vector is None else len(draft.vector),
                    "vector": None if draft.vector is None else np.ascontiguousarray(draft.vector, "<f4").tobytes(),
                    "lost": draft.lost,
                }
                for draft in current
            ]
            if rows:
                connection.execute(insert(pattern_drafts), rows)

        self._writer.submit(run)

    def lost(self, collection_id: int, drafted: Drafted, first: int) -> Lost:
        """What the drafts lost of the patterns there are."""
        query = _lost(collection_id, drafted)
        with self._database.read() as connection:
            count = connection.execute(select(func.count()).select_from(query.subquery())).scalar_one()
            rows = connection.execute(query.order_by(memories.c.key).limit(first))
            return Lost(count, [(row.id, row.lost) for row in rows])

    def swap_space(
        self,
        collection_id: int,
        drafted: Drafted,
        at: int,
        config: dict[str, Any],
        gates_gone: Sequence[str],
        result: dict[str, Any],
        then: Callable[[Swapped | None], None] = lambda _: None,
    ) -> Swapped | None:
        """Let a job's drafts take the place of the space's patterns, in one transaction that also ends the job; None
        (and nothing changes) where the collection is not at version `at` any more.

        It takes a version, and a generation. A memory that is left without any pattern is deleted. The space's kernels
        are dropped, and the calibration records `gates_gone`; `config` is the collection's from then on. The job is
        done with `result`, the version, and the numbers of memories that have the space and are deleted. `then` as in
        `Writer.submit`. Raises `CollectionNotFound`, and `Conflict` if the job no longer runs.
        """
        space = drafted.space

        def run(connection: Connection) -> Swapped | None:
            version, generation = lock(connection, collection_id)
            if version != at:
                return None
            ours = select(memories.c.key).where(memories.c.collection_id == collection_id)
            connection.execute(delete(patterns).where(patterns.c.space == space, patterns.c.memory_key.in_(ours)))
            fresh = (
                select(_d.memory_key, literal(space), literal("f4"), _d.dimension, _d.vector)
                .select_from(memories)
                .join(pattern_drafts, drafted.of_memory(pattern_drafts))
                .where(memories.c.collection_id == collection_id, _d.vector.is_not(None))
            )
            columns = ["memory_key", "space", "dtype", "dimension", "vector"]
            copied = insert(patterns).from_select(columns, fresh).execution_options(preserve_rowcount=True)
            made = connection.execute(copied).rowcount
            deleted = _delete_bare(connection, collection_id, drafted)
            used = (kernels.c.collection_id == collection_id) & (kernels.c.space == space)
            connection.execute(
                update(kernels).where(used, kernels.c.status != "dropped").values(status="dropped", weight=None)
            )
            gone = (gates.c.collection_id == collection_id) & (gates.c.modality == bindparam("gone"))
            if gates_gone:
                connection.execute(delete(gates).where(gone), [{"gone": modality} for modality in gates_gone])
            connection.execute(
                update(collections)
                .where(collections.c.id == collection_id)
                .values(version=version + 1, generation=generation + 1, config=config)
            )
            revision = revise(connection, collection_id)
            outcome = {**result, "version": version + 1, "memories": made, "deleted": len(deleted)}
            if not end_job(connection, drafted.job_id, "done", progress=1.0, result=outcome):
                raise Conflict(f"The operation {drafted.job_id} no longer runs.")
            return Swapped(version + 1, made, deleted, revision)

        return self._writer.submit(run, then, on=collection_id)

    def remove_drafts(self, job_id: str | None = None) -> None:
        """Remove the drafts of a job, or (None) of all jobs that have ended."""
        key = select(jobs.c.key).where(jobs.c.status.in_(ENDED) if job_id is None else jobs.c.id == job_id)
        some = select(_d.job_key, _d.memory_key).where(_d.job_key.in_(key)).limit(REMOVED_AT_ONCE)
        these = (_d.job_key == bindparam("job")) & (_d.memory_key == bindparam("memory"))

        def run(connection: Connection) -> int:
            rows = [{"job": job, "memory": memory} for job, memory in connection.execute(some)]
            if rows:
                connection.execute(delete(pattern_drafts).where(these), rows)
            return len(rows)

        while self._writer.submit(run) == REMOVED_AT_ONCE:
            pass


def _original(source: Literal["image", "text"]) -> Any:
    return memories.c.blob_hash if source == "image" else memories.c.text


def _undrafted(collection_id: int, drafted: Drafted, source: Literal["image", "text"]) -> Any:
    c = memories.c
    is_made = exists().where(patterns.c.memory_key == c.key, patterns.c.space == drafted.space)
    return (
        select(c.key, c.id, c.version, c.text, c.blob_hash)
        .select_from(memories)
        .outerjoin(pattern_drafts, drafted.of_memory(pattern_drafts))
        .where(c.collection_id == collection_id, _d.memory_key.is_(None), or_(_original(source).is_not(None), is_made))
    )


def _lost(collection_id: int, drafted: Drafted) -> Any:
    made = (patterns.c.memory_key == memories.c.key) & (patterns.c.space == drafted.space)
    return (
        select(memories.c.key, memories.c.id, _d.lost)
        .select_from(memories)
        .join(pattern_drafts, drafted.of_memory(pattern_drafts))
        .join(patterns, made)
        .where(memories.c.collection_id == collection_id, _d.vector.is_(None), unexpired())
    )


def _delete_bare(connection: Connection, collection_id: int, drafted: Drafted) -> list[str]:
    """Delete the memories that lost their only pattern; their ids."""
    some = exists().where(patterns.c.memory_key == memories.c.key)
    query = (
        select(memories.c.key, memories.c.id)
        .select_from(memories)
        .join(pattern_drafts, drafted.of_memory(pattern_drafts))
        .where(memories.c.collection_id == collection_id, _d.vector.is_(None), ~some)
    )
    rows = connection.execute(query).all()
    if rows:
        this = memories.c.key == bindparam("this")
        connection.execute(delete(memories).where(this), [{"this": row.key} for row in rows])
    return [row.id for row in rows]
