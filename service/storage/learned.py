"""What was learned from a collection: its kernels with how each was trained, and its gates' calibration records.

Life of a kernel (one of a space is active at most):

    put_kernel ──activate──▶ active ──the next one activated, or retire_kernel──▶ retired
        │                                                                            │
        └──it did not beat what was there──▶ dropped ◀──another one retired──────────┘

Rules:
- Activating and retiring change what a recall answers, so they are writes: each takes the collection's next version.
- Only active and retired kernels keep their weight, so a space has two at most: the one in use, and the one before it
  to go back to. Of the others the record stays, for the newest `RECORDS_KEPT`.
- Numbers count up per space and are never used again: the newest kernel of a space is always kept.
- A kernel may come with calibration records: both are replaced in one transaction, since a threshold holds for the
  kernel that it was set under.
- What is learned is learned under what was learned before, on a server that may share the database with others. Each
  change takes the collection's next revision, and names the one that it stands on: another one is a conflict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, case, delete, func, insert, select, update

from service.errors import LearnedElsewhere
from service.storage.database import Database
from service.storage.following import revise
from service.storage.memories import lock_version, set_version
from service.storage.tables import collections, gates, kernels
from service.storage.writer import Writer

Weight = NDArray[np.float32]

RECORDS_KEPT = 100
"""Kernels kept per space. Their records are some kilobytes each; a hundred trainings back nobody asks."""


@dataclass(frozen=True)
class Gate:
    """A calibration record and when it was made."""

    record: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True, eq=False)
class StoredKernel:
    """A kernel of (rows, dimension), `number` in its space. `weight` is W where it is active, else None."""

    space: str
    number: int
    objective: str
    status: Literal["active", "retired", "dropped"]
    rows: int
    dimension: int
    weight: Weight | None
    record: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True)
class KernelPut:
    """The kernel's number in its space, and the collection's version and revision after (unchanged if it was not
    activated)."""

    number: int
    version: int
    revision: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Retired:
    """The collection's version and revision after (unchanged if there was no kernel)."""

    version: int
    revision: int


class Learned:
    """The kernel and gate methods of `Repository`."""

    _database: Database
    _writer: Writer

    def put_kernel(
        self,
        collection_id: int,
        space: str,
        objective: str,
        weight: Weight,
        record: dict[str, Any],
        activate: bool,
        gates: Mapping[str, dict[str, Any]] | None = None,
        then: Callable[[KernelPut], None] = lambda _: None,
        at: int | None = None,
    ) -> KernelPut:
        """Keep a trained kernel W (rows, dimension) with its training record, in one transaction.

        With `activate` it takes the place of the space's active one, under the collection's next version. Else it is
        dropped: its shape and record are kept, W is not. `gates`, if given, replace all calibration records. `then` as
        in `Writer.submit`. `at`: the revision that it was trained under. Raises `CollectionNotFound`,
        `LearnedElsewhere` (to be activated, and that has passed), and as `Writer.submit` does.
        """
        rows, dimension = weight.shape
        now = datetime.now(UTC)

        def run(connection: Connection) -> KernelPut:
            version = lock_version(connection, collection_id)
            revision = _revision(connection, collection_id)
            if activate:
                _check_revision(revision, at)
                revision = revise(connection, collection_id)
                _retire(connection, collection_id, space)
                version += 1
                set_version(connection, collection_id, version)
            ours = (kernels.c.collection_id == collection_id) & (kernels.c.space == space)
            last = connection.execute(select(func.max(kernels.c.number)).where(ours)).scalar()
            number = 1 if last is None else last + 1
            connection.execute(
                insert(kernels).values(
                    collection_id=collection_id,
                    space=space,
                    number=number,
                    objective=objective,
                    status="active" if activate else "dropped",
                    rows=rows,
                    dimension=dimension,
                    weight=np.ascontiguousarray(weight, dtype="<f4").tobytes() if activate else None,
                    record=record,
                    created_at=now,
                )
            )
            connection.execute(
                delete(kernels).where(ours, kernels.c.status == "dropped", kernels.c.number <= number - RECORDS_KEPT)
            )
            if gates is not None:
                _replace_gates(connection, collection_id, gates)
            return KernelPut(number, version, revision)

        return self._writer.submit(run, then, on=collection_id)

    def retire_kernel(
        self,
        collection_id: int,
        space: str,
        then: Callable[[Retired], None] = lambda _: None,
        at: int | None = None,
    ) -> Retired:
        """Let a space be without a kernel. `then` as in `Writer.submit`. `at`: the revision that the kernel was seen
        at. Raises `CollectionNotFound`, `LearnedElsewhere`."""

        def run(connection: Connection) -> Retired:
            version = lock_version(connection, collection_id)
            _check_revision(_revision(connection, collection_id), at)
            if not _retire(connection, collection_id, space):
                return Retired(version, _revision(connection, collection_id))
            set_version(connection, collection_id, version + 1)
            return Retired(version + 1, revise(connection, collection_id))

        return self._writer.submit(run, then, on=collection_id)

    def get_kernels(self, collection_id: int) -> list[StoredKernel]:
        """All kernels kept, by space and number; those that are active with their weight."""
        c = kernels.c
        weight = case((c.status == "active", c.weight))
        query = (
            select(c.space, c.number, c.objective, c.status, c.rows, c.dimension, weight, c.record, c.created_at)
            .where(c.collection_id == collection_id)
            .order_by(c.space, c.number)
        )
        with self._database.read() as connection:
            return [
                StoredKernel(*row[:6], _weight(row.rows, row.dimension, row[6]), *row[7:])
                for row in connection.execute(query)
            ]

    def get_kernel_weight(self, collection_id: int, space: str, number: int) -> Weight | None:
        """W of an active or retired kernel, as when one goes back to it; None of any other."""
        c = kernels.c
        query = select(c.rows, c.dimension, c.weight).where(
            c.collection_id == collection_id, c.space == space, c.number == number
        )
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _weight(*row)

    def put_gates(
        self,
        collection_id: int,
        records: Mapping[str, dict[str, Any]],
        at: int | None = None,
        then: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Keep these calibration records by modality, in place of all earlier ones; the collection's revision after.

        `at`: the revision that they were made under. `then` as in `Writer.submit`. Raises
        `CollectionNotFound`, `LearnedElsewhere`.
        """

        def run(connection: Connection) -> int:
            lock_version(connection, collection_id)
            _check_revision(_revision(connection, collection_id), at)
            _replace_gates(connection, collection_id, records)
            return revise(connection, collection_id)

        return self._writer.submit(run, then, on=collection_id)

    def get_gates(self, collection_id: int) -> dict[str, Gate]:
        """The calibration records by modality."""
        query = select(gates.c.modality, gates.c.record, gates.c.created_at).where(
            gates.c.collection_id == collection_id
        )
        with self._database.read() as connection:
            return {modality: Gate(record, created_at) for modality, record, created_at in connection.execute(query)}


def _retire(connection: Connection, collection_id: int, space: str) -> bool:
    """Retire the space's active kernel, and drop the one retired before. False where none is active."""
    ours = (kernels.c.collection_id == collection_id) & (kernels.c.space == space)
    active = ours & (kernels.c.status == "active")
    if connection.execute(select(kernels.c.key).where(active)).scalar() is None:
        return False
    retired = ours & (kernels.c.status == "retired")
    connection.execute(update(kernels).where(retired).values(status="dropped", weight=None))
    connection.execute(update(kernels).where(active).values(status="retired"))
    return True


def _replace_gates(connection: Connection, collection_id: int, records: Mapping[str, dict[str, Any]]) -> None:
    now = datetime.now(UTC)
    rows = [
        {"collection_id": collection_id, "modality": modality, "record": record, "created_at": now}
        for modality, record in records.items()
    ]
    connection.execute(delete(gates).where(gates.c.collection_id == collection_id))
    if rows:
        connection.execute(insert(gates), rows)


def _revision(connection: Connection, collection_id: int) -> int:
    """To be asked under the collection's lock."""
    query = select(collections.c.revision).where(collections.c.id == collection_id)
    return int(connection.execute(query).scalar_one())


def _check_revision(revision: int, at: int | None) -> None:
    if at not in (None, revision):
        raise LearnedElsewhere("what was learned of the collection has been changed by another server meanwhile")


def _weight(rows: int, dimension: int, weight: bytes | None) -> Weight | None:
    """Writable, as torch wants it."""
    return None if weight is None else np.frombuffer(bytearray(weight), dtype="<f4").reshape(rows, dimension)
