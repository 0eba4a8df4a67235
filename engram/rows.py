"""Files of rows, cut into parts that are sent one by one.

Strategy: a part is a whole import of its own, small enough to be sent again after a lost connection; once it is
answered its rows are durable. So nothing has to be read while it is sent, and a client holds one part of a file.
NDJSON is cut between lines. Parquet and Arrow (a stream, a file or Feather) are read here and sent as Arrow streams.

Rules:
- The header of a file goes with every part: it says what made the vectors.
- Rows without an id get one of the file's content and their number, so that sending them again stores nothing twice.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import orjson

from service.app.ids import new_id
from service.app.transfer_schemas import HEADER, MEDIA_TYPES
from service.errors import InvalidRequest, MalformedBody, NotFound

if TYPE_CHECKING:
    import pyarrow as pa

PART_BYTES = 16 * 2**20  # sent again after a lost connection, and held in memory; a second's work for a server
PREFIX_BYTES = 64 * 2**10  # of a file, that its rows' ids are made of
ROW_ENDINGS = {
    ".ndjson": "ndjson", ".jsonl": "ndjson", ".parquet": "parquet", ".arrow": "arrow", ".arrows": "arrow",
    ".feather": "arrow", ".ipc": "arrow",
}  # fmt: skip
VECTORS = "vectors."  # what a column of vectors is named with, before its space


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a file from number `first` on, as one body. `done`, `size`: how far in the file its end is, of what."""

    media_type: str
    body: bytes
    first: int
    done: int
    size: int


@dataclass(frozen=True, eq=False)
class RowFile:
    """`config` makes a collection that takes the rows, where the file says what their spaces are; `prefix` is of the
    ids of rows without any."""

    config: dict[str, Any] | None
    prefix: str
    parts: Iterator[Part]


@contextmanager
def open_rows(path: Path, from_row: int = 1) -> Iterator[RowFile]:
    """Raises `NotFound`, `InvalidRequest` (an ending that is none of rows), `MalformedBody`."""
    form = ROW_ENDINGS.get(path.suffix.lower())
    if form is None:
        raise InvalidRequest(f"{path} ends in none of {', '.join(ROW_ENDINGS)}")
    try:
        file = path.open("rb")
    except OSError as error:
        raise NotFound(f"{path}: {error.strerror}") from None
    with file:
        prefix = f"{path.stem[:64]}-{hashlib.sha256(file.read(PREFIX_BYTES)).hexdigest()[:8]}-"
        file.seek(0)
        if form == "ndjson":
            header, config = _header_of_lines(file, path)
            yield RowFile(config, prefix, _parts_of_lines(file, path.stat().st_size, header, from_row))
            return
        import pyarrow as pa  # only these files need it

        try:
            with _batches(file, form) as (schema, count, batches):
                first = next(batches, None)
                again = batches if first is None else chain((first,), batches)
                yield RowFile(_config_of(schema, first), prefix, _parts_of_batches(schema, count, again, from_row))
        except (pa.ArrowException, OSError) as error:
            raise MalformedBody(f"{path} is not whole: {error}") from None


def parts_of_memories(memories: Iterable[Mapping[str, Any]]) -> Iterator[Part]:
    """Memories, `{"id"?, "text"?, "payload"?, "vectors"?, "content"?, "expires_at"?}`, as NDJSON. Those without an id
    get one here, so that a part which is sent again stores nothing twice."""
    lines: list[bytes] = []
    size = number = 0
    for number, memory in enumerate(memories, start=1):
        line = orjson.dumps({"id": new_id(), **_packed(memory)}, option=orjson.OPT_APPEND_NEWLINE)
        lines.append(line)
        size += len(line)
        if size >= PART_BYTES:
            yield Part(MEDIA_TYPES["ndjson"], b"".join(lines), number - len(lines) + 1, number, 0)
            lines, size = [], 0
    if lines:
        yield Part(MEDIA_TYPES["ndjson"], b"".join(lines), number - len(lines) + 1, number, 0)


def _packed(memory: Mapping[str, Any]) -> dict[str, Any]:
    """A memory as a line has it; vectors as their bytes, which is ten times as quick as numbers in words."""
    row = {name: value for name, value in memory.items() if value is not None}
    if "content" in row:
        row["content"] = base64.b64encode(row["content"]).decode()
    if "vectors" in row:
        row["vectors"] = {
            name: base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()
            for name, vector in row["vectors"].items()
        }
    return row


# --- NDJSON -----------------------------------------------------------------------------------------------------------


def _header_of_lines(file: IO[bytes], path: Path) -> tuple[bytes, dict[str, Any] | None]:
    """The file's header, and a configuration: of the header, or by the vectors of its first row."""
    first = file.readline()
    try:
        row = orjson.loads(first) if first.strip() else {}
    except orjson.JSONDecodeError as error:
        raise MalformedBody(f"{path}: the first line is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise MalformedBody(f"{path}: the first line is not a row: a row is a JSON object")
    if row.keys() == {HEADER}:
        return first, row[HEADER].get("config")
    file.seek(0)
    vectors = row.get("vectors")
    return b"", _spaces({name: _length(v) for name, v in vectors.items()} if isinstance(vectors, dict) else {})


def _length(vector: object) -> int:
    if isinstance(vector, str):
        return len(base64.b64decode(vector)) // 4
    return len(vector) if isinstance(vector, list) else 0


def _parts_of_lines(file: IO[bytes], size: int, header: bytes, from_row: int) -> Iterator[Part]:
    number = 1
    while lines := file.readlines(PART_BYTES):
        rows = [line for line in lines if not line.isspace()]
        start, number = number, number + len(rows)
        if number > from_row:
            some = rows[max(0, from_row - start) :]
            yield Part(MEDIA_TYPES["ndjson"], header + b"".join(some), number - len(some), file.tell(), size)


# --- Parquet and Arrow ------------------------------------------------------------------------------------------------


@contextmanager
def _batches(file: IO[bytes], form: str) -> Iterator[tuple[pa.Schema, int, Iterator[pa.RecordBatch]]]:
    """Their schema, how many rows there are (0: that is not known), and small batches of them."""
    import pyarrow as pa

    if form == "parquet":
        import pyarrow.parquet as pq

        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
        batches = parquet.iter_batches(1_000, use_threads=False)
        yield parquet.schema_arrow, parquet.metadata.num_rows, batches
        return
    mapped = pa.memory_map(file.name)  # of a batch, however large, only what is sent is read
    with mapped:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(mapped)
            count = sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
            yield reader.schema, count, (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            stream = pa.ipc.open_stream(mapped)
            yield stream.schema, 0, iter(stream)


def _parts_of_batches(
    schema: pa.Schema, count: int, batches: Iterator[pa.RecordBatch], from_row: int
) -> Iterator[Part]:
    import pyarrow as pa

    number = 1
    held: list[pa.RecordBatch] = []
    size = 0

    def part() -> Part:
        body = io.BytesIO()
        with pa.ipc.new_stream(body, schema) as writer:
            for batch in held:
                writer.write_batch(batch)
        return Part(MEDIA_TYPES["arrow"], body.getvalue(), number - sum(map(len, held)), number - 1, count)

    for whole in batches:
        skipped = min(max(0, from_row - number), len(whole))
        number += skipped
        for batch in _slices(whole.slice(skipped)):
            held.append(batch)
            number += len(batch)
            size += batch.nbytes
            if size >= PART_BYTES:
                yield part()
                held, size = [], 0
    if held:
        yield part()


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Of some megabytes each, as far as rows are alike."""
    each = max(1, batch.nbytes // max(1, len(batch)))
    count = max(1, PART_BYTES // 4 // each)
    return (batch.slice(start, count) for start in range(0, len(batch), count))


def _config_of(schema: pa.Schema, first: pa.RecordBatch | None) -> dict[str, Any] | None:
    """Of the header, or by the columns of vectors: their type says how long they are, or their first value does."""

    header = (schema.metadata or {}).get(HEADER.encode())
    if header is not None:
        config: dict[str, Any] | None = orjson.loads(header).get("config")
        return config
    lengths = ((column.name, _length_in(column, first)) for column in schema)
    return _spaces({name.removeprefix(VECTORS): length for name, length in lengths if length is not None})


def _length_in(column: pa.Field, first: pa.RecordBatch | None) -> int | None:
    """How many values its vectors have, 0 where the first rows do not say; None for a column of something else."""
    import pyarrow as pa

    kind = pa.types
    if kind.is_fixed_size_list(column.type):
        return int(column.type.list_size)
    as_bytes = column.name.startswith(VECTORS) and (kind.is_binary(column.type) or kind.is_large_binary(column.type))
    if not (as_bytes or kind.is_list(column.type) or kind.is_large_list(column.type)):
        return None
    values = [] if first is None else first.column(column.name).drop_null().slice(0, 1).to_pylist()
    length = len(values[0]) if values else 0
    return length // 4 if as_bytes else length


def _spaces(dimensions: Mapping[str, int]) -> dict[str, Any] | None:
    if not dimensions or not all(dimensions.values()):
        return None
    return {"spaces": {name: {"dimension": dimension} for name, dimension in dimensions.items()}}
