"""Whole collections, out of the database and into it: what snapshots are made of, and what they are restored to.

    stage_collection ─▶ stage_memories … stage_learned ─▶ swap_staged ─▶ remove_hidden of the former

Rules:
- A collection is read in one snapshot of the database: every row is of one version.
- What is restored is put beside what there is, under a name that no caller can give, in transactions small enough for
  writes between them. Nobody sees it before `swap_staged`, which is one transaction.
- Numbers of versions are reserved before (`reserve_versions`), so the memories of a restored collection have versions
  that nobody else was ever given, and the name's sequence goes on above them.
- Rows under a hidden name that no job is at work on are what a crash left: `remove_hidden` removes them bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.errors import CollectionNotEmpty, CollectionNotFound, Conflict, InvalidSnapshot
from service.storage.collection import HIDDEN, Collection, collection_rows
from service.storage.database import Database
from service.storage.jobs import ENDED
from service.storage.schedules import hand_schedule_on
from service.storage.tables import collections, gates, jobs, kernels, memories, name_versions, patterns
from service.storage.writer import Writer

REMOVED_AT_ONCE = 2_000
"""Memories deleted in one transaction: some 50 ms, in which writes wait."""


@dataclass(frozen=True)
class GateRow:
    modality: str
    record: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True)
class KernelRow:
    """`weight`: (rows, dimension) little-endian float32; None of a dropped one."""

    space: str
    number: int
    objective: str
    status: Literal["active", "retired", "dropped"]
    rows: int
    dimension: int
    weight: bytes | None
    record: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True)
class MemoryRow:
    id: str
    version: int
    text: str | None
    payload: dict[str, Any] | None
    blob_hash: str | None
    media_type: str | None
    created_at: datetime
    updated_at: datetime
    expires_at: int | None


@dataclass(frozen=True, eq=False)
class MemoryPart:
    """Memories in order; `vectors[space]` has a memory's little-endian float32, or None, for each."""

    memories: list[MemoryRow]
    vectors: dict[str, list[bytes | None]]


@dataclass(frozen=True, eq=False)
class Copy:
    """All of a collection at its `collection.version`; valid inside `copying`'s block alone, and read in this order."""

    collection: Collection
    kernels: list[KernelRow]
    gates: list[GateRow]
    parts: Iterator[MemoryPart]
    originals: Iterator[str]


_MEMORY = tuple(memories.c[name] for name in MemoryRow.__dataclass_fields__)
_GATE = tuple(gates.c[name] for name in GateRow.__dataclass_fields__)
_KERNEL = tuple(kernels.c[name] for name in KernelRow.__dataclass_fields__)


class Copies:
    """The methods of `Repository` for whole collections."""

    _database: Database
    _writer: Writer

    @contextmanager
    def copying(self, collection_id: int, spaces: Sequence[str], rows: int) -> Iterator[Copy]:
        """All of a collection, `rows` memories at a time. Raises `CollectionNotFound`."""
        blocks = {space: patterns.alias() for space in spaces}
        joined: Any = memories
        for space, block in blocks.items():
            joined = joined.outerjoin(block, (block.c.memory_key == memories.c.key) & (block.c.space == space))
        ours = memories.c.collection_id == collection_id
        some = (
            select(*_MEMORY, *(block.c.vector for block in blocks.values()))
            .select_from(joined)
            .where(ours)
            .order_by(memories.c.key)
            .execution_options(yield_per=rows)
        )
        named = (
            select(memories.c.blob_hash)
            .where(ours, memories.c.blob_hash.is_not(None))
            .distinct()
            .order_by(memories.c.blob_hash)
            .execution_options(yield_per=1000)
        )

        def parts(connection: Connection) -> Generator[MemoryPart, None, None]:
            with connection.execute(some) as result:
                for part in result.partitions():
                    vectors = {space: [row[len(_MEMORY) + i] for row in part] for i, space in enumerate(spaces)}
                    yield MemoryPart([MemoryRow(*row[: len(_MEMORY)]) for row in part], vectors)

        def originals(connection: Connection) -> Generator[str, None, None]:
            with connection.execute(named) as result:
                yield from result.scalars()

        with self._database.read() as connection:
            row = connection.execute(collection_rows().where(collections.c.id == collection_id)).one_or_none()
            if row is None:
                raise CollectionNotFound("The collection was deleted.")
            of_kernels = select(*_KERNEL).where(kernels.c.collection_id == collection_id)
            of_gates = select(*_GATE).where(gates.c.collection_id == collection_id).order_by(gates.c.modality)
            with closing(parts(connection)) as memory_parts, closing(originals(connection)) as hashes:
                yield Copy(
                    Collection(*row),
                    [KernelRow(*each) for each in connection.execute(of_kernels.order_by(kernels.c.key))],
                    [GateRow(*each) for each in connection.execute(of_gates)],
                    memory_parts,
                    hashes,
                )

    # --- staging ---

    def reserve_versions(self, name: str, count: int, above: int, then: Callable[[int], None] = lambda _: None) -> int:
        """Take the next `count` versions of a name, all of them greater than `above`; the number before the first.

        The name's collection, if there is one, stands at the last of them: `then` is called with it, as in
        `Writer.submit`.
        """

        def run(connection: Connection) -> int:
            of_name = collections.c.name == name
            version = connection.execute(select(collections.c.version).where(of_name).with_for_update()).scalar()
            base: int = max(_last(connection, name) if version is None else version, above)
            if version is None:
                connection.execute(delete(name_versions).where(name_versions.c.name == name))
                connection.execute(insert(name_versions).values(name=name, version=base + count))
            else:
                connection.execute(update(collections).where(of_name).values(version=base + count))
            return base

        return self._writer.submit(run, lambda base: then(base + count))

    def stage_collection(
        self, hidden: str, config: dict[str, Any], generation: int, version: int, created_at: datetime
    ) -> int:
        """An empty collection under a hidden name, in place of a former one of that name; its number."""
        row = {"name": hidden, "config": config, "generation": generation, "version": version}

        def run(connection: Connection) -> int:
            new = insert(collections).values(**row, created_at=created_at).returning(collections.c.id)
            return int(connection.execute(new).scalar_one())

        for former in self.hidden_collections():
            if former.name == hidden:
                self.remove_hidden(former.id)
        return self._writer.submit(run)

    def stage_memories(self, collection_id: int, part: MemoryPart) -> None:
        """Raises `InvalidSnapshot` where two memories have one id."""

        def run(connection: Connection) -> None:
            rows = [{"collection_id": collection_id, **vars(memory)} for memory in part.memories]
            try:
                inserted = connection.execute(insert(memories).returning(memories.c.id, memories.c.key), rows)
                keys = {row.id: row.key for row in inserted}
            except IntegrityError:
                raise InvalidSnapshot("two of its memories have one id") from None
            blocks = [
                {"memory_key": keys[memory.id], "space": space, "dtype": "f4", "dimension": len(v) // 4, "vector": v}
                for space, vectors in part.vectors.items()
                for memory, v in zip(part.memories, vectors, strict=True)
                if v is not None
            ]
            if blocks:
                connection.execute(insert(patterns), blocks)

        self._writer.submit(run, on=collection_id)

    def stage_learned(self, collection_id: int, learned: Sequence[KernelRow], records: Sequence[GateRow]) -> None:
        """Raises `InvalidSnapshot` where two kernels, or two gates, are of one name."""

        def run(connection: Connection) -> None:
            for table, rows in ((kernels, learned), (gates, records)):
                if rows:
                    try:
                        connection.execute(insert(table), [{"collection_id": collection_id, **vars(r)} for r in rows])
                    except IntegrityError:
                        raise InvalidSnapshot(f"its {table.name} are not what a collection can have") from None

        self._writer.submit(run, on=collection_id)

    def swap_staged(
        self,
        collection_id: int,
        name: str,
        replace: bool,
        noted: tuple[str, str],
        result: dict[str, Any],
        then: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Let a staged collection have `name`, in one transaction; `result` with its version from then on.

        The collection of that name becomes a hidden one. noted: a job, and where in its payload the outcome is noted.
        Raises `CollectionNotEmpty` where the name's holds memories and `replace` is false, and `Conflict` if the job no
        longer runs. `then` as in `Writer.submit`.
        """
        job_id, key = noted

        def run(connection: Connection) -> dict[str, Any]:
            staged = connection.execute(
                select(collections.c.version).where(collections.c.id == collection_id)
            ).scalar_one()
            query = select(collections.c.id, collections.c.version).where(collections.c.name == name).with_for_update()
            former = connection.execute(query).one_or_none()
            last = _last(connection, name)
            if former is not None:
                last = max(last, former.version)
                held = select(memories.c.key).where(memories.c.collection_id == former.id).limit(1)
                if not replace and connection.execute(held).first() is not None:
                    raise CollectionNotEmpty(f"collection {name} holds memories: give another name, or replace: true")
                hidden = f"{HIDDEN}former-{former.id}"
                connection.execute(update(collections).where(collections.c.id == former.id).values(name=hidden))
            version: int = max(last, staged) + 1
            this = update(collections).where(collections.c.id == collection_id)
            connection.execute(this.values(name=name, version=version))
            if former is not None:
                hand_schedule_on(connection, former.id, collection_id)
            outcome = {**result, "version": version}
            runs = (jobs.c.id == job_id) & (jobs.c.status == "running")
            payload = connection.execute(select(jobs.c.payload).where(runs).with_for_update()).scalar()
            if payload is None:
                raise Conflict(f"The operation {job_id} no longer runs.")
            note = update(jobs).where(runs).values(collection_id=collection_id, payload={**payload, key: outcome})
            connection.execute(note)
            return outcome

        return self._writer.submit(run, then)

    def hidden_collections(self) -> list[Collection]:
        """Those under hidden names: being restored, or what a restore took the place of."""
        query = collection_rows().where(collections.c.name.startswith(HIDDEN, autoescape=True))
        with self._database.read() as connection:
            return [Collection(*row) for row in connection.execute(query)]

    def remove_hidden(self, collection_id: int) -> None:
        """Remove a collection with all its rows, a few at a time."""
        ours = memories.c.collection_id == collection_id
        some = select(memories.c.key).where(ours).order_by(memories.c.key).limit(REMOVED_AT_ONCE)

        def run(connection: Connection) -> int:
            keys = [{"this": key} for key in connection.execute(some).scalars()]
            if keys:
                connection.execute(delete(memories).where(memories.c.key == bindparam("this")), keys)
            else:
                connection.execute(delete(collections).where(collections.c.id == collection_id))
            return len(keys)

        while self._writer.submit(run, on=collection_id):
            pass

    def active_jobs(self, kind: str) -> list[str]:
        """The jobs of this kind that are queued or run, of whatever collection."""
        query = select(jobs.c.id).where(jobs.c.kind == kind, jobs.c.status.not_in(ENDED))
        with self._database.read() as connection:
            return list(connection.execute(query).scalars())


def _last(connection: Connection, name: str) -> int:
    """Where the sequence of a name without a collection stopped."""
    query = select(func.max(name_versions.c.version)).where(name_versions.c.name == name)
    last: int | None = connection.execute(query).scalar()
    return last or 0
