"""Rows as NDJSON: a JSON object a line.

Rules:
- A line has at most `line_bytes_max`; a longer one is refused, and not kept while it is passed over.
- The first line may be a header, `{"engram": {...}}`. A first line that is no row says that the body is none of rows.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import orjson
from pydantic import BeforeValidator, ValidationError

from service.app.fields import Base64, MemoryId, Moment, Name, Payload, Request, Text, faults, to_array
from service.app.rows import (
    BATCH_BYTES,
    BATCH_ROWS,
    READ_BYTES,
    Batch,
    Block,
    Dimensions,
    Fields,
    Numbers,
    Readable,
    Rows,
    no_space,
    read_header,
    wrong_dimension,
)
from service.app.schemas import ImageInput
from service.app.transfer_schemas import HEADER, Header
from service.errors import BodyTooLarge, EngramError, InvalidRequest, MalformedBody


def _to_numbers(value: object) -> object:
    """A vector may be base64 of little-endian float32 as well: a tenth of the time of a list of numbers."""
    if not isinstance(value, str):
        return to_array(value)
    try:
        packed = base64.b64decode(value, validate=True)
        return to_array(np.frombuffer(packed, dtype="<f4"))
    except (binascii.Error, ValueError):
        raise ValueError("a vector is a list of numbers, or base64 of little-endian float32") from None


if TYPE_CHECKING:
    Vector = Numbers
else:
    Vector = Annotated[Any, BeforeValidator(_to_numbers)]


class RowInput(Request):
    """A line of NDJSON. `image` is what `store` calls the content."""

    id: MemoryId | None = None
    text: Text | None = None
    payload: Payload | None = None
    vectors: dict[Name, Vector] | None = None
    content: Base64 | None = None
    image: ImageInput | None = None
    expires_at: Moment | None = None
    media_type: Any = None
    created_at: Any = None
    updated_at: Any = None
    version: Any = None


def read_lines(body: Readable, dimensions: Callable[[Header], Dimensions], from_row: int, line_bytes_max: int) -> Rows:
    lines = _lines(body, line_bytes_max)
    first = next(lines, None)
    header = Header()
    if first is not None:
        start = _parsed(first)
        if isinstance(start, EngramError) and not isinstance(start, BodyTooLarge):
            raise MalformedBody(f"the first line is not a row: {start.detail}")
        if isinstance(start, dict) and start.keys() == {HEADER}:
            header = read_header(start[HEADER])
        else:
            lines = _behind(first, lines)
    return Rows(header, _line_batches(lines, dimensions(header), from_row))


def _line_batches(lines: Iterator[bytes | None], dimensions: Dimensions, from_row: int) -> Iterator[Batch]:
    rows: list[Fields | EngramError] = []
    vectors: list[dict[str, Numbers]] = []
    size = number = 0
    for number, line in enumerate(lines, start=1):
        if number < from_row:
            continue
        fields, found = _read_line(line, dimensions)
        rows.append(fields)
        vectors.append(found)
        size += 0 if line is None else len(line)
        if len(rows) == BATCH_ROWS or size >= BATCH_BYTES:
            yield Batch(number - len(rows) + 1, rows, _stacked(vectors))
            rows, vectors, size = [], [], 0
    if rows:
        yield Batch(number - len(rows) + 1, rows, _stacked(vectors))


def _lines(body: Readable, bytes_max: int) -> Iterator[bytes | None]:
    """Lines that are not blank; None for one that is too long, which is not kept."""
    begun = bytearray()
    too_long = False
    while chunk := body.read(READ_BYTES):
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            line = bytes(begun) + part if begun else part
            begun.clear()
            if too_long or len(line) > bytes_max:
                yield None
            elif line and not line.isspace():
                yield line
            too_long = False
        if not too_long:
            begun += rest
        if len(begun) > bytes_max:
            too_long = True
            begun.clear()
    if too_long:
        yield None
    elif begun.strip():
        yield bytes(begun)


def _behind(first: bytes | None, lines: Iterator[bytes | None]) -> Iterator[bytes | None]:
    yield first
    yield from lines


def _parsed(line: bytes | None) -> dict[str, Any] | EngramError:
    if line is None:
        return BodyTooLarge("the row has more bytes than a request's body may have")
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return MalformedBody(f"the line is not JSON: {error}")
    return row if isinstance(row, dict) else MalformedBody("a row is a JSON object")


def _read_line(line: bytes | None, dimensions: Dimensions) -> tuple[Fields | EngramError, dict[str, Numbers]]:
    parsed = _parsed(line)
    if isinstance(parsed, EngramError):
        return parsed, {}
    try:
        row = RowInput.model_validate(parsed)
    except ValidationError as error:
        return InvalidRequest(faults(error)), {}
    taken: dict[str, Numbers] = {}
    for name, vector in (row.vectors or {}).items():
        if name not in dimensions:
            return no_space(name, dimensions), {}
        if (dimension := dimensions[name]) is None:
            continue
        if len(vector) != dimension:
            return wrong_dimension(name, dimension, len(vector)), {}
        taken[name] = vector
    content = row.content if row.image is None else row.image.base64
    return Fields(row.id, row.text, row.payload, content, row.expires_at), taken


def _stacked(vectors: list[dict[str, Numbers]]) -> dict[str, Block]:
    blocks = {}
    for name, dimension in {name: len(vector) for each in vectors for name, vector in each.items()}.items():
        has = np.array([name in each for each in vectors])
        values = np.zeros((len(vectors), dimension), dtype=np.float32)
        for row in np.flatnonzero(has):
            values[row] = vectors[row][name]
        blocks[name] = Block(values, has)
    return blocks
