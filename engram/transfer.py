"""Import and export as a client does them: part by part, and a part again where a connection was lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram.replies import Reply
from engram.rows import ROW_ENDINGS, RowFile, open_rows, parts_of_memories
from engram.steps import Close, Export, SendRows, Steps, Take, Work
from engram.transport import Body
from service.errors import InvalidRequest, NotWritable

if TYPE_CHECKING:
    from engram.asking import CollectionAsking

REFUSALS_KEPT_MAX = 1_000  # in the reply; `refused` is called with every one


@dataclass(frozen=True)
class Refusal(Reply):
    """A row that was not stored, and why. Rows are counted from 1; `id` is None where it has none, or is no row."""

    row: int
    id: str | None
    code: str
    detail: str


@dataclass(frozen=True)
class Imported:
    """`durable_row`: this row of the source and all before it are on disk, or refused. `refusals`: the first thousand.
    `encoded`: the spaces whose vectors were made here, not taken."""

    rows: int = 0
    stored: int = 0
    updated: int = 0
    refused: int = 0
    durable_row: int = 0
    version: int | None = None
    encoded: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Progress:
    """How far an import is: `done` of `size` are sent, bytes or rows (0: that is not known)."""

    imported: Imported
    done: int
    size: int


def import_rows(
    asking: CollectionAsking,
    source: str | Path | Iterable[Mapping[str, Any]],
    from_row: int,
    progress: Callable[[Progress], None] | None,
    refused: Callable[[Refusal], None] | None,
) -> Steps[Imported]:
    """See `Collection.import_rows`."""
    told = Imported(durable_row=from_row - 1)
    with ExitStack() as opened:
        options: Body = {}
        if isinstance(source, str | Path):
            rows: RowFile = yield Work(partial(opened.enter_context, open_rows(Path(source), from_row)))
            parts, options = rows.parts, {"prefix": rows.prefix}
        elif from_row == 1:
            parts = parts_of_memories(source)
        else:
            raise InvalidRequest("from_row is of a file; of memories leave out those that are stored already")
        while (part := (yield Work(partial(next, parts, None)))) is not None:
            numbered = {**options, "offset": part.first - 1}
            sent = SendRows(asking.name, part.media_type, part.body, numbered, asking.options.timeout_s)
            events: list[Body] = yield from asking.again(sent, True)
            told = _told(told, events, refused)
            if progress is not None:
                progress(Progress(told, part.done, part.size))
    return told


def _told(before: Imported, events: list[Body], refused: Callable[[Refusal], None] | None) -> Imported:
    """What is known with what is said of one more part."""
    refusals = [Refusal.of(event) for event in events if event["event"] == "refused"]
    if refused is not None:
        for refusal in refusals:
            refused(refusal)
    last = events[-1]
    return Imported(
        before.rows + last["rows"],
        before.stored + last["stored"],
        before.updated + last["updated"],
        before.refused + last["refused"],
        last["durable_row"],
        max((v for v in (before.version, last["version"]) if v is not None), default=None),
        tuple(events[0]["encoded"]),
        (before.refusals + tuple(refusals))[:REFUSALS_KEPT_MAX],
    )


def export_options(vectors: bool, content: bool, filter: Mapping[str, Any] | None) -> Body:
    return {"vectors": vectors, "content": content} | ({} if filter is None else {"filter": json.dumps(filter)})


def open_export(asking: CollectionAsking, options: Body) -> Steps[Any]:
    """A handle to `take_export` from and to `close_export`."""
    return (yield Export(asking.name, options, asking.options.timeout_s))


def take_export(chunks: Any) -> Steps[bytes | None]:
    chunk: bytes | None = yield Take(chunks)
    return chunk


def close_export(chunks: Any) -> Steps[None]:
    yield Close(chunks)


def export(asking: CollectionAsking, path: Path, format: str | None, options: Body) -> Steps[int]:
    """Write to a file, which takes the place of another once it is whole; its size. Raises `NotWritable`."""
    chosen = format or ROW_ENDINGS.get(path.suffix.lower())
    if chosen is None:
        raise InvalidRequest(f"{path} ends in none of {', '.join(ROW_ENDINGS)}: say its format")
    chunks = yield from open_export(asking, {"format": chosen, **options})
    partial_ = path.with_name(f".{path.name}.part")
    size = 0
    try:
        with partial_.open("wb") as file:
            while (chunk := (yield from take_export(chunks))) is not None:
                size += yield Work(partial(file.write, chunk))
        partial_.replace(path)
    except OSError as error:
        raise NotWritable(f"{path}: {error.strerror or error}") from None
    finally:
        partial_.unlink(missing_ok=True)
        yield from close_export(chunks)
    return size
