"""Changing a part of a memory, and leaving the rest.

Rules:
- What is there is read in the transaction that changes it, so two changes at one moment both stay.
- Rows of patterns are written for the spaces that change, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from service.errors import EncodersChanged, InvalidRequest
from service.storage.database import Database
from service.storage.memories import Vector, find, from_bytes, lock, set_version, to_bytes
from service.storage.receipts import Receipt, check_new, keep_receipt
from service.storage.tables import memories, patterns
from service.storage.writer import Writer
from service.storage.writes import refused

Payload = dict[str, Any]


@dataclass(frozen=True, eq=False)
class MemoryChange:
    """What changes: `values` by column (text, blob_hash, media_type, expires_at), the payload as a function of what it
    is, and vectors by space (None: the memory has the space no more)."""

    values: Mapping[str, Any] = field(default_factory=dict)
    payload: Callable[[Payload | None], Payload | None] | None = None
    vectors: Mapping[str, Vector | None] = field(default_factory=dict)
    if_version: int | None = None


@dataclass(frozen=True, eq=False)
class Changed:
    """What a bank has to be told: the memory as it is now, at the collection's `version`."""

    version: int
    vectors: dict[str, Vector]
    payload: Payload | None
    expires_at: int | None


class Updates:
    """The methods of `Repository` that change memories in part."""

    _database: Database
    _writer: Writer

    def change_memory(
        self,
        collection_id: int,
        id_: str,
        change: MemoryChange,
        then: Callable[[Changed], None] = lambda _: None,
        generation: int | None = None,
        receipt: Receipt[Changed] | None = None,
    ) -> Changed:
        """Change a memory in one transaction, under the collection's next version. `then`, `generation` and `receipt`
        as in `put_memories`.

        Raises `CollectionNotFound`, `MemoryNotFound`, `PreconditionFailed`, `InvalidRequest` (no vector would be left),
        `EncodersChanged`, `AlreadyDone`, `IdempotencyKeyReused`, and what `change.payload` does.
        """
        c = memories.c

        def run(connection: Connection) -> Changed:
            before, now = lock(connection, collection_id)
            if receipt is not None:
                check_new(connection, collection_id, receipt.asked)
            if generation not in (None, now):
                raise EncodersChanged("an encoder of the collection changed after this memory was encoded")
            row = find(connection, collection_id, id_, c.version, c.payload, c.expires_at)
            if (refusal := refused(id_, change.if_version, row.version)) is not None:
                raise refusal
            payload = row.payload if change.payload is None else change.payload(row.payload)
            vectors = _changed_vectors(connection, row.key, change.vectors)
            values = {**change.values, "payload": payload, "version": before + 1, "updated_at": datetime.now(UTC)}
            connection.execute(update(memories).where(c.key == row.key).values(values))
            set_version(connection, collection_id, before + 1)
            changed = Changed(before + 1, vectors, payload, values.get("expires_at", row.expires_at))
            if receipt is not None:
                keep_receipt(connection, collection_id, receipt.asked, receipt.reply(changed))
            return changed

        return self._writer.submit(run, then, on=collection_id)


def _changed_vectors(connection: Connection, key: int, changes: Mapping[str, Vector | None]) -> dict[str, Vector]:
    """Write a memory's vectors that change; all that it has then."""
    p = patterns.c
    rows = connection.execute(select(p.space, p.vector).where(p.memory_key == key))
    kept = {space: from_bytes([vector], len(vector) // 4)[0] for space, vector in rows}
    new = {space: vector for space, vector in changes.items() if vector is not None}
    left = {space: vector for space, vector in kept.items() if space not in changes} | new
    if not left:
        raise InvalidRequest("nothing would be left that fills a space of the memory; to forget it, delete it")
    if gone := [space for space in changes if space in kept]:
        connection.execute(delete(patterns).where(p.memory_key == key, p.space.in_(gone)))
    if new:
        written = [
            {"memory_key": key, "space": space, "dtype": "f4", "dimension": len(vector), "vector": to_bytes(vector)}
            for space, vector in new.items()
        ]
        connection.execute(insert(patterns), written)
    return left
