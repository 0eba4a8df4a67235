"""A collection as a stream of rows: NDJSON, Arrow's stream, Parquet; of one version, in bounded memory.

Rules:
- What is exported and imported into an empty collection gives the same memories: ids, texts, payloads, vectors, when
  they expire and, with `content`, the originals byte for byte. The header names each space's encoder and its
  fingerprint, by which an import knows whether the vectors are its own encoder's.
- Held are a chunk of rows and, of the originals, `CONTENT_BYTES` and one more.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from service.app.fields import as_datetime
from service.app.live import LiveCollection
from service.app.resources import Resources
from service.app.rows import VECTORS
from service.app.transfer_schemas import HEADER, MEDIA_TYPES, ExportRequest, Header, SpaceOfRows
from service.storage.streaming import MemoryChunk

CONTENT_BYTES = 16 * 2**20
GROUP_BYTES = 16 * 2**20  # of a Parquet row group: what a reader holds at once, and large enough to be read quickly
TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True, eq=False)
class Export:
    """`chunks` is to be read to its end or closed."""

    media_type: str
    chunks: Iterator[bytes]


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows `start` to `stop` of a chunk, with their originals where they are asked for."""

    chunk: MemoryChunk
    start: int
    stop: int
    contents: list[bytes | None] | None


def export(resources: Resources, live: LiveCollection, request: ExportRequest) -> Export:
    """The rows that the filter keeps. Nothing is read before the first chunk is asked for, but for the filter."""
    clause = None if request.filter is None else request.filter.clause()
    spaces = [(space.name, space.dimension) for space in live.spaces.values()] if request.vectors else []
    write = {"ndjson": _lines, "arrow": _arrow, "parquet": _parquet}[request.format]

    def chunks() -> Iterator[bytes]:
        with resources.repository.iter_memories(live.id, spaces, clause) as stream:
            header = header_of(live, stream.version)
            get = resources.blobs.get if request.content else None
            parts = (part for chunk in stream.chunks for part in _parts(chunk, get))
            yield from write(header, dict(spaces), request.content, parts)

    return Export(MEDIA_TYPES[request.format], chunks())


def header_of(live: LiveCollection, version: int) -> Header:
    """What an import needs to make the collection again, and to know the vectors."""
    return Header(
        collection=live.name,
        version=version,
        config=live.config.model_dump(mode="json"),
        spaces={
            space.name: SpaceOfRows(
                encoder=space.config.encoder,
                fingerprint=None if space.encoder is None else space.encoder.fingerprint,
                dimension=space.dimension,
            )
            for space in live.spaces.values()
        },
    )


def _parts(chunk: MemoryChunk, get: Callable[[str], bytes] | None) -> Iterator[_Part]:
    if get is None:
        yield _Part(chunk, 0, len(chunk.ids), None)
        return
    start, size = 0, 0
    contents: list[bytes | None] = []
    for row, hash_ in enumerate(chunk.blob_hashes):
        content = None if hash_ is None else get(hash_)
        contents.append(content)
        size += 0 if content is None else len(content)
        if size >= CONTENT_BYTES or row + 1 == len(chunk.ids):
            yield _Part(chunk, start, row + 1, contents)
            start, size, contents = row + 1, 0, []


# --- NDJSON -----------------------------------------------------------------------------------------------------------


def _lines(header: Header, spaces: dict[str, int], content: bool, parts: Iterator[_Part]) -> Iterator[bytes]:
    yield orjson.dumps({HEADER: header.model_dump(mode="json")}, option=orjson.OPT_APPEND_NEWLINE)
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z
    for part in parts:
        chunk = part.chunk
        lines = []
        for row in range(part.start, part.stop):
            payload, expires = chunk.payloads[row], chunk.expires_at[row]
            line: dict[str, Any] = {
                "id": chunk.ids[row],
                "text": chunk.texts[row],
                "payload": None if payload is None else orjson.Fragment(payload),
                "expires_at": None if expires is None else as_datetime(expires),
                "media_type": chunk.media_types[row],
                "created_at": chunk.created_at[row],
                "updated_at": chunk.updated_at[row],
                "version": chunk.versions[row],
            }
            if spaces:
                line["vectors"] = {name: chunk.vectors[name][row] for name in spaces if chunk.has[name][row]}
            if part.contents is not None:
                original = part.contents[row - part.start]
                line["content"] = None if original is None else base64.b64encode(original).decode()
            lines.append(orjson.dumps(line, option=option))
        yield b"".join(lines)


# --- Arrow and Parquet ------------------------------------------------------------------------------------------------


class _Sink(io.RawIOBase):
    """Bytes on their way from Arrow's writers to whoever takes them."""

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._written.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken, self._written = b"".join(self._written), []
        return taken


def _schema(header: Header, spaces: dict[str, int], content: bool) -> pa.Schema:
    text, number = pa.string(), pa.float32()
    fields = [("id", text), ("text", text), ("payload", text)]
    fields += [(VECTORS + name, pa.list_(number, dimension)) for name, dimension in spaces.items()]
    fields += [
        ("expires_at", TIME),
        ("media_type", text),
        ("created_at", TIME),
        ("updated_at", TIME),
        ("version", pa.int64()),
    ]
    fields += [("content", pa.large_binary())] if content else []
    return pa.schema(fields, metadata={HEADER: header.model_dump_json()})


def _batch(schema: pa.Schema, spaces: dict[str, int], part: _Part) -> pa.RecordBatch:
    chunk, rows = part.chunk, slice(part.start, part.stop)
    vectors = []
    for name, dimension in spaces.items():
        values, has = chunk.vectors[name][rows], chunk.has[name][rows]
        mask = None if has.all() else pa.array(np.logical_not(has))
        vectors.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), dimension, mask=mask))
    payloads = [None if payload is None else payload.decode() for payload in chunk.payloads[rows]]
    fields = [chunk.ids[rows], chunk.texts[rows], payloads]
    history = [
        chunk.expires_at[rows],
        chunk.media_types[rows],
        chunk.created_at[rows],
        chunk.updated_at[rows],
        chunk.versions[rows],
    ]
    contents = [] if part.contents is None else [part.contents]
    columns = [*fields, *vectors, *history, *contents]
    arrays = [
        each if isinstance(each, pa.Array) else pa.array(each, type=column.type)
        for each, column in zip(columns, schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _arrow(header: Header, spaces: dict[str, int], content: bool, parts: Iterator[_Part]) -> Iterator[bytes]:
    schema = _schema(header, spaces, content)
    sink = _Sink()
    with pa.ipc.new_stream(sink, schema) as writer:
        for part in parts:
            writer.write_batch(_batch(schema, spaces, part))
            yield sink.take()
    yield sink.take()


def _parquet(header: Header, spaces: dict[str, int], content: bool, parts: Iterator[_Part]) -> Iterator[bytes]:
    schema = _schema(header, spaces, content)
    sink = _Sink()
    # Vectors hardly ever have a value twice, and originals are compressed already: a dictionary of them is in vain.
    repeated = ["media_type", "version"]
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=repeated) as writer:
        group: list[pa.RecordBatch] = []
        for part in parts:
            group.append(_batch(schema, spaces, part))
            if sum(batch.nbytes for batch in group) >= GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(group, schema))
                group = []
                yield sink.take()
        if group:
            writer.write_table(pa.Table.from_batches(group, schema))
    yield sink.take()
