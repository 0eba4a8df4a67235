"""How many bytes a memory takes in the database, before it is there: how SQLite and PostgreSQL lay rows out.

Sources: SQLite's file format (sqlite.org/fileformat2.html, "B-tree pages", pages of 4,096 bytes) and PostgreSQL's
"Database page layout" and "TOAST" (pages of 8,192). Indexes by an id that is random are two thirds full, as B-trees
are; what is appended in order fills its pages. A row that is replaced leaves room, which is used again and not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RANDOM_FILL = 0.69  # ln 2: a B-tree whose keys come in any order
ORDERED_FILL = 0.9  # PostgreSQL keeps a tenth of an index page free
HASH_BYTES, MEDIA_TYPE_BYTES = 64, 9

SQLITE_PAGE = 4_096
SQLITE_MEMORY = 76  # of a row of `memories`: its header, numbers and two moments as text
SQLITE_PATTERN = 16  # of a row of `patterns`: its header, numbers and dtype
SQLITE_CELL = 7  # its length, its number, and a pointer to it

POSTGRES_PAGE = 8_192 - 24
POSTGRES_TUPLE = 28  # a row's header and the pointer to it
POSTGRES_MEMORY = 40  # key, collection, version and two moments
POSTGRES_PATTERN = 8 + 3 + 4 + 4  # key, dtype, dimension, the vector's length
POSTGRES_INDEX = 12  # an index entry's header and the pointer to it
TOAST_FROM, TOAST_CHUNK, TOAST_CHUNK_TAKES, TOAST_POINTER = 2_032, 1_996, 2_048, 18
TOAST_INDEX = 22


@dataclass(frozen=True)
class RowShape:
    """Mean sizes in bytes. `with_original`: the share of memories that have a file; `spaces`: dimension by name."""

    id_bytes: float
    text_bytes: float
    payload_bytes: float
    with_original: float
    spaces: Mapping[str, int]


def memory_bytes(shape: RowShape, is_postgres: bool) -> float:
    """Of one memory with a vector in every space: its rows, and their share of each index."""
    return _postgres(shape) if is_postgres else _sqlite(shape)


def _sqlite(shape: RowShape) -> float:
    content = shape.id_bytes + shape.text_bytes + shape.payload_bytes
    content += shape.with_original * (HASH_BYTES + MEDIA_TYPE_BYTES)
    indexes = (shape.id_bytes + 14) / RANDOM_FILL + 14 + 12 + shape.with_original * HASH_BYTES / RANDOM_FILL
    patterns = sum(
        _sqlite_row(SQLITE_PATTERN + len(name) + 4 * dimension) + len(name) + 16
        for name, dimension in shape.spaces.items()
    )
    return _sqlite_row(SQLITE_MEMORY + content) + indexes + patterns


def _sqlite_row(size: float) -> float:
    """A row's share of its leaf page, and the overflow pages that it fills alone."""
    overflow, local = 0.0, size
    if size > SQLITE_PAGE - 35:
        least = (SQLITE_PAGE - 12) * 32 // 255 - 23
        local = least + (size - least) % (SQLITE_PAGE - 4)
        local = local if local <= SQLITE_PAGE - 35 else least
        overflow = -(-(size - local) // (SQLITE_PAGE - 4)) * SQLITE_PAGE
    return overflow + SQLITE_PAGE / max(1, (SQLITE_PAGE - 8) // (local + SQLITE_CELL))


def _postgres(shape: RowShape) -> float:
    content = shape.id_bytes + shape.text_bytes + shape.payload_bytes + 8
    content += shape.with_original * (HASH_BYTES + MEDIA_TYPE_BYTES)
    indexes = (8 + 8 + 16 + 3 * POSTGRES_INDEX) / ORDERED_FILL + (8 + shape.id_bytes + POSTGRES_INDEX) / RANDOM_FILL
    indexes += shape.with_original * HASH_BYTES / RANDOM_FILL
    patterns = sum(
        _postgres_row(POSTGRES_PATTERN + len(name) + 1, 4 * dimension)
        + (8 + len(name) + POSTGRES_INDEX + 4) / ORDERED_FILL
        for name, dimension in shape.spaces.items()
    )
    return _postgres_row(POSTGRES_MEMORY + content, 0) + indexes + patterns


def _postgres_row(size: float, vector_bytes: int) -> float:
    """A row's share of its page; a long vector's chunks lie apart, with an index over them."""
    chunks = 0.0
    if POSTGRES_TUPLE + size + vector_bytes > TOAST_FROM:
        whole, rest = divmod(vector_bytes, TOAST_CHUNK)
        chunks = whole * (TOAST_CHUNK_TAKES + TOAST_INDEX) + (rest + 36 + TOAST_INDEX if rest else 0)
        vector_bytes = TOAST_POINTER
    aligned = -(-(POSTGRES_TUPLE - 4 + size + vector_bytes) // 8) * 8 + 4
    return chunks + POSTGRES_PAGE / max(1, POSTGRES_PAGE // aligned)
