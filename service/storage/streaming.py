"""Memories whole, streamed at one version: what an export reads.

Rules:
- A stream is one read: it sees the collection as it is when the block is entered, whatever is written meanwhile. While
  it is open SQLite's log grows with what is written.
- Rows come in the order in which they were first stored, in chunks that hold a bounded number of values.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, LargeBinary, select, type_coerce

from service.core.filter import Clause
from service.storage.memories import from_bytes, read_version
from service.storage.selection import Selection
from service.storage.tables import memories, patterns

CHUNK_ROWS, CHUNK_VALUES = 512, 2**20
"""At most so many rows, with payloads and texts of at most 75 kB each, and 4 MB of vectors."""

_c = memories.c
_COLUMNS: tuple[Any, ...] = (
    _c.id, _c.version, _c.text, type_coerce(_c.payload, LargeBinary), _c.blob_hash, _c.media_type, _c.created_at,
    _c.updated_at, _c.expires_at,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class MemoryChunk:
    """Columns of some memories, in order. `payloads` are JSON; `expires_at` is in microseconds since 1970;
    `vectors[space]` is (rows, dimension) float32, and `has[space]`, (rows,), says which have one."""

    ids: list[str]
    versions: list[int]
    texts: list[str | None]
    payloads: list[bytes | None]
    blob_hashes: list[str | None]
    media_types: list[str | None]
    created_at: list[datetime]
    updated_at: list[datetime]
    expires_at: list[int | None]
    vectors: dict[str, NDArray[np.float32]]
    has: dict[str, NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class MemoryStream:
    version: int
    chunks: Iterator[MemoryChunk]


class Streaming(Selection):
    """The method of `Repository` that streams memories. A filter of None keeps all."""

    @contextmanager
    def iter_memories(
        self, collection_id: int, spaces: Sequence[tuple[str, int]], clause: Clause | None = None
    ) -> Iterator[MemoryStream]:
        """Stream what the filter keeps, with the blocks of `spaces` (name, dimension); valid inside the block alone.

        Raises `CollectionNotFound`, and `ValueError` for a stored block of another dimension.
        """
        joined: Any = memories
        blocks = []
        for space, _ in spaces:
            block: Any = patterns.alias()
            joined = joined.outerjoin(block, (block.c.memory_key == _c.key) & (block.c.space == space))
            blocks.append(block)
        rows = max(1, min(CHUNK_ROWS, CHUNK_VALUES // max(1, sum(dimension for _, dimension in spaces))))
        query = (
            select(*_COLUMNS, *(block.c.vector for block in blocks))
            .select_from(joined)
            .where(self._kept(collection_id, clause))
            .order_by(_c.key)
            .execution_options(yield_per=rows)
        )

        def chunks(connection: Connection) -> Generator[MemoryChunk, None, None]:
            with connection.execute(query) as result:  # closed, too, where the stream is left early
                for part in result.partitions():
                    columns = list(map(list, zip(*part, strict=True)))
                    fields, vectors = columns[: len(_COLUMNS)], dict(zip(spaces, columns[len(_COLUMNS) :], strict=True))
                    has = {space: np.array([each is not None for each in v]) for (space, _), v in vectors.items()}
                    ids, versions, texts, payloads, hashes, kinds, created, updated, expires = fields
                    yield MemoryChunk(
                        ids, versions, texts, payloads, hashes, kinds, created, updated, expires,
                        {space: from_bytes(each, dimension) for (space, dimension), each in vectors.items()}, has,
                    )  # fmt: skip

        with self._database.read() as connection:
            version = read_version(connection, collection_id)
            with closing(chunks(connection)) as stream:
                yield MemoryStream(version, stream)
