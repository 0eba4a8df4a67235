"""Rows as columns of Arrow: their stream, and Parquet. Numbers reach numpy without being Python's in between.

Rules:
- A moment is a timestamp with its zone, of any unit, or a text.
- A column is a field of a row, or `vectors.` and a space's name, or that name alone where no field has it.
- A batch of an Arrow stream has at most `batch_bytes_max`: its writer has chosen what must be read at once.
- Parquet is read from its end, so its body is kept in a nameless file, at most `spool_bytes_max` of it: nothing is left
  of it however the process ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from service.app.fields import MemoryId, Moment, Text, as_datetime, faults
from service.app.rows import (
    BATCH_BYTES,
    BATCH_ROWS,
    READ_BYTES,
    VECTORS,
    Batch,
    Block,
    Dimensions,
    Fields,
    Readable,
    Rows,
    no_space,
    read_header,
    wrong_dimension,
)
from service.app.transfer_schemas import HEADER, HISTORY, Header
from service.errors import BodyTooLarge, EngramError, InvalidRequest, MalformedBody
from service.storage.disk import os_errors


def read_stream(
    body: Readable, dimensions: Callable[[Header], Dimensions], from_row: int, batch_bytes_max: int
) -> Rows:
    """Raises `MalformedBody`, `InvalidRequest`, `BodyTooLarge`."""
    with _malformed("an Arrow stream"):
        reader = pa.ipc.open_stream(pa.PythonFile(_Exact(body, batch_bytes_max), mode="r"))
    return _from_columns(reader.schema, iter(reader), 1, dimensions, from_row)


@contextmanager
def read_parquet(
    body: Readable, dimensions: Callable[[Header], Dimensions], from_row: int, spool_bytes_max: int, folder: Path
) -> Iterator[Rows]:
    """As `read_stream`; the body is kept in `folder` while the block runs. Raises `StorageFull` besides."""
    with tempfile.TemporaryFile(dir=folder) as spool:
        with os_errors("the body cannot be kept for reading"):
            _spool(body, spool, spool_bytes_max)
        with _malformed("a Parquet file"):
            file = pq.ParquetFile(spool, pre_buffer=False, buffer_size=READ_BYTES)
        groups, first = _groups_from(file, from_row)
        batches = file.iter_batches(BATCH_ROWS, row_groups=groups, use_threads=False)
        yield _from_columns(file.schema_arrow, batches, first, dimensions, from_row)


@contextmanager
def _malformed(what: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError, EOFError) as error:
        raise MalformedBody(f"the body is not {what}: {error}") from None


class _Exact:
    """A stream that gives as many bytes as are asked for, as Arrow wants it, and is not asked for more than a batch."""

    def __init__(self, body: Readable, batch_bytes_max: int) -> None:
        self._body = body
        self._batch_bytes_max = batch_bytes_max
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._batch_bytes_max:
            raise BodyTooLarge(
                f"a batch of the stream has {size} bytes, at most {self._batch_bytes_max} are read at once; "
                "write it in smaller batches"
            )
        parts = []
        while size and (part := self._body.read(size)):
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class _Columns:
    """Names of columns: of fields by field, of vectors by space."""

    fields: dict[str, str]
    vectors: dict[str, str]


def _from_columns(
    schema: pa.Schema,
    batches: Iterator[pa.RecordBatch],
    first: int,
    dimensions: Callable[[Header], Dimensions],
    from_row: int,
) -> Rows:
    packed = (schema.metadata or {}).get(HEADER.encode())
    try:
        header = Header() if packed is None else read_header(orjson.loads(packed))
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the schema's metadata {HEADER} is not JSON: {error}") from None
    taken = dimensions(header)
    return Rows(header, _column_batches(batches, first, _columns(schema, taken), taken, from_row))


def _columns(schema: pa.Schema, dimensions: Dimensions) -> _Columns:
    """Raises `InvalidRequest` for a column that is none of a row's, or of a type that it cannot be."""
    fields: dict[str, str] = {}
    vectors: dict[str, str] = {}
    for column in schema:
        name, kind = column.name, column.type
        if name in HISTORY:
            continue
        space = name.removeprefix(VECTORS)
        if name in FIELD_TYPES:
            if name in fields:
                raise InvalidRequest(f"there are two columns {name}")
            if not pa.types.is_null(kind) and not FIELD_TYPES[name][0](kind):
                raise InvalidRequest(f"column {name} holds {FIELD_TYPES[name][1]}, not {kind}")
            fields[name] = name
        elif space in dimensions:
            if space in vectors:
                raise InvalidRequest(f"the columns {vectors[space]} and {name} are both of space {space}")
            if not (_holds_numbers(kind) or _is_bytes(kind)):
                raise InvalidRequest(f"column {name} holds lists of numbers, or their bytes, not {kind}")
            if dimensions[space] is not None:
                vectors[space] = name
        elif name.startswith(VECTORS):
            raise no_space(space, dimensions)
        else:
            known = [*FIELD_TYPES, *HISTORY, *(VECTORS + each for each in dimensions)]
            raise InvalidRequest(f"column {name} is none of a row's, which are {', '.join(known)}")
    return _Columns(fields, vectors)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _is_moment(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind)) and kind.tz is not None


def _holds_numbers(kind: pa.DataType) -> bool:
    types = pa.types
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return False
    return bool(types.is_floating(kind.value_type) or types.is_integer(kind.value_type))


FIELD_TYPES: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "id": (lambda kind: _is_text(kind) or bool(pa.types.is_integer(kind)), "texts or integers"),
    "text": (lambda kind: _is_text(kind), "texts"),
    "payload": (lambda kind: _is_text(kind) or _is_bytes(kind), "JSON texts"),
    "content": (lambda kind: _is_bytes(kind), "bytes"),
    "expires_at": (lambda kind: _is_text(kind) or _is_moment(kind), "timestamps with their zone, or texts"),
}
TICKS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # of a timestamp, in a second

_id: TypeAdapter[str | None] = TypeAdapter(MemoryId | None)
_text: TypeAdapter[str | None] = TypeAdapter(Text | None)
_moment: TypeAdapter[int] = TypeAdapter(Moment)


def _column_batches(
    batches: Iterator[pa.RecordBatch], first: int, columns: _Columns, dimensions: Dimensions, from_row: int
) -> Iterator[Batch]:
    held: list[pa.RecordBatch] = []
    for some in _slices(batches, from_row - first):
        held.append(some)
        if sum(map(len, held)) >= BATCH_ROWS or sum(_bytes_of(each) for each in held) >= BATCH_BYTES:
            yield _column_batch(held, max(first, from_row), columns, dimensions)
            first, held = max(first, from_row) + sum(map(len, held)), []
    if held:
        yield _column_batch(held, max(first, from_row), columns, dimensions)


def _slices(batches: Iterator[pa.RecordBatch], skipped: int) -> Iterator[pa.RecordBatch]:
    """The rows behind those skipped, in pieces that fill batches: one row has at most what is read at once anyway."""
    room = BATCH_ROWS
    while True:
        with _malformed("whole"):
            whole = next(batches, None)
            if whole is None:
                return
            whole.validate(full=True)  # offsets of a stranger's would be followed out of bounds
        start = min(max(skipped, 0), len(whole))
        skipped -= len(whole)
        most = max(1, BATCH_BYTES // max(1, whole.get_total_buffer_size() // max(1, len(whole))))
        while start < len(whole):
            some = whole.slice(start, min(room, most))
            start += len(some)
            room = room - len(some) or BATCH_ROWS
            yield some


def _bytes_of(batch: pa.RecordBatch) -> int:
    return int(batch.nbytes)


def _column_batch(held: list[pa.RecordBatch], first: int, columns: _Columns, dimensions: Dimensions) -> Batch:
    batch = held[0] if len(held) == 1 else pa.Table.from_batches(held).combine_chunks().to_batches()[0]
    with _malformed("whole"):
        given: dict[str, list[Any]] = {
            name: _values(batch.column(column)) if column in batch.schema.names else [None] * len(batch)
            for name, column in columns.fields.items()
        }
    nothing = [None] * len(batch)
    rows = [_fields(*row) for row in zip(*(given.get(name, nothing) for name in FIELD_TYPES), strict=True)]
    vectors = {}
    for space, column in columns.vectors.items():
        dimension = dimensions[space]
        assert dimension is not None  # `_columns` leaves out the others
        vectors[space], wrong = _block(batch.column(column), dimension)
        for row, length in wrong:
            rows[row] = wrong_dimension(space, dimension, length)
    return Batch(first, rows, vectors)


def _values(column: pa.Array) -> list[Any]:
    """A column's values; of moments, microseconds since 1970: of a year that no date has, too."""
    if not pa.types.is_timestamp(column.type):
        return list(column.to_pylist())
    ticks = TICKS[column.type.unit]
    return [None if value is None else value * 10**6 // ticks for value in column.cast(pa.int64()).to_pylist()]


def _fields(
    id_: Any, text: str | None, payload: str | bytes | None, content: bytes | None, expires_at: int | str | None
) -> Fields | EngramError:
    try:
        parsed = None if payload is None else orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        return InvalidRequest(f"payload: it is not JSON: {error}")
    if parsed is not None and not isinstance(parsed, dict):
        return InvalidRequest("payload: it is a JSON object")
    for where, adapter, value in (("id", _id, None if id_ is None else str(id_)), ("text", _text, text)):
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            return InvalidRequest(f"{where}: {faults(error)}")
    try:
        given = as_datetime(expires_at) if isinstance(expires_at, int) else expires_at
        moment = None if given is None else _moment.validate_python(given)
    except OverflowError:
        return InvalidRequest("expires_at: a date is of the years 1 to 9999")
    except ValidationError as error:
        return InvalidRequest(f"expires_at: {faults(error)}")
    return Fields(None if id_ is None else str(id_), text, parsed, content, moment)


def _block(column: pa.Array, dimension: int) -> tuple[Block, list[tuple[int, int]]]:
    """A column's vectors, and the rows that have another number of values, with it."""
    present = column.is_valid().to_numpy(zero_copy_only=False)
    packed = _is_bytes(column.type)
    if packed:
        lengths = pc.binary_length(column)
    elif pa.types.is_fixed_size_list(column.type):
        lengths = pa.array(np.full(len(column), column.type.list_size, dtype=np.int32))
    else:
        lengths = pc.list_value_length(column)
    counts = pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False)
    good = present & (counts == dimension * (4 if packed else 1))
    kept = column if good.all() else column.filter(pa.array(good))
    if packed:
        flat = np.frombuffer(b"".join(kept.to_pylist()), dtype="<f4")
    else:
        numbers = kept.flatten()
        numbers = numbers if pa.types.is_float32(numbers.type) else pc.cast(numbers, pa.float32(), safe=False)
        flat = numbers.to_numpy(zero_copy_only=False)  # a number that is null is NaN, which is refused later
    values = flat.reshape(-1, dimension)
    if len(values) < len(column):
        values = np.zeros((len(column), dimension), dtype=np.float32)
        values[good] = flat.reshape(-1, dimension)
    wrong = np.flatnonzero(present & ~good)
    return Block(values, good), [(int(row), int(counts[row]) // (4 if packed else 1)) for row in wrong]


def _spool(body: Readable, spool: IO[bytes], bytes_max: int) -> None:
    size = 0
    while chunk := body.read(READ_BYTES):
        size += len(chunk)
        if size > bytes_max:
            raise BodyTooLarge(
                f"a Parquet file of more than {bytes_max} bytes is not kept (ENGRAM_IMPORT_SPOOL_BYTES_MAX); "
                "send it in parts, or as an Arrow stream"
            )
        spool.write(chunk)
    spool.seek(0)


def _groups_from(file: pq.ParquetFile, from_row: int) -> tuple[list[int], int]:
    """The row groups from the one that holds `from_row` on, and the number of their first row."""
    first = 1
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if first + count > from_row:
            return list(range(group, file.num_row_groups)), first
        first += count
    return [], first
