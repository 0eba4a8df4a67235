"""Import and export over HTTP: bodies that are streamed, both ways at once.

An import's body is read by a thread that stores it, chunk by chunk as it asks for them, so a slow disk holds the sender
back and nothing piles up here. Its answer is written meanwhile, a line an event.

Rules:
- Until its first line an import, like an export until its first chunk, may still be answered with a problem.
- The answer of an import is no `StreamingResponse`: that one looks for a disconnect where the body comes from, and
  would swallow parts of it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, cast

import structlog
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.app.engine import Engine
from service.app.exporting import Export
from service.app.lines import Lines, failed
from service.app.transfer_schemas import (
    MEDIA_TYPES,
    Event,
    Format,
    ImportOptions,
)
from service.errors import TooBusy, Unavailable, UnsupportedMediaType

log = structlog.get_logger()

TRANSFERS_MAX = 8  # at once: each holds a thread and a few batches, an export a reader of the database

FORMATS: dict[str, Format] = {kind: form for form, kind in MEDIA_TYPES.items()} | {
    "application/ndjson": "ndjson", "application/jsonl": "ndjson", "application/x-parquet": "parquet",
}  # fmt: skip


class Transfers:
    """The threads of imports and exports."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(TRANSFERS_MAX, thread_name_prefix="transfer")
        self._under_way = 0
        self._lock = threading.Lock()

    async def import_rows(self, engine: Engine, collection: str, request: Request, options: ImportOptions) -> Response:
        """Raises `CollectionNotFound`, `UnsupportedMediaType`, `TooBusy`, and as `run_import` before its first line."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        form = FORMATS.get(kind)
        if form is None:
            raise UnsupportedMediaType(f"rows are sent as {', '.join(MEDIA_TYPES.values())}, not {kind or 'nothing'}")
        self._begin()
        lines = Lines(asyncio.get_running_loop())
        body = _Body(request.stream(), asyncio.get_running_loop())
        begin = partial(engine.import_rows, collection, form, body, options)
        self._threads.submit(copy_context().run, self._import, lines, begin)  # the caller goes along
        first = await lines.next()
        if isinstance(first, BaseException):
            raise first
        return _Answer(first, lines)

    def _import(self, lines: Lines, begin: Callable[[], Iterator[Event]]) -> None:
        try:
            events = begin()
            try:
                for event in events:
                    lines.put(event)
            finally:
                cast(Any, events).close()
        except BaseException as error:
            lines.fail(error)
        finally:
            self._end()
            lines.end()

    async def export(self, begin: Callable[[], Export], name: str) -> Response:
        """Raises what `begin` raises, and what keeps the first chunk from being read."""
        self._begin()
        loop = asyncio.get_running_loop()
        reading = threading.Lock()  # a generator cannot be closed while it runs
        exported: Export | None = None

        def take() -> bytes | None:
            nonlocal exported
            with reading:
                exported = exported or begin()
                return next(exported.chunks, None)

        def close() -> None:
            with reading:
                if exported is not None:
                    cast(Any, exported.chunks).close()
            self._end()

        async def chunks(chunk: bytes | None) -> AsyncIterator[bytes]:
            try:
                while chunk is not None:
                    yield chunk
                    chunk = await loop.run_in_executor(self._threads, take)
            finally:
                self._threads.submit(close)

        try:
            first = await loop.run_in_executor(self._threads, take)
        except BaseException:
            self._threads.submit(close)
            raise
        assert exported is not None
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return StreamingResponse(chunks(first), media_type=exported.media_type, headers=headers)

    def _begin(self) -> None:
        with self._lock:
            if self._under_way >= TRANSFERS_MAX:
                raise TooBusy(f"{TRANSFERS_MAX} imports and exports are under way already", retry_after_s=5)
            self._under_way += 1

    def _end(self) -> None:
        with self._lock:
            self._under_way -= 1


class _Body:
    """A request's body, for a thread: the loop is asked for a chunk when the thread wants one."""

    def __init__(self, stream: AsyncIterator[bytes], loop: asyncio.AbstractEventLoop) -> None:
        self._stream = stream
        self._loop = loop
        self._rest = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        """Raises `Unavailable` where the sender has gone."""
        while not self._rest:
            try:
                chunk = asyncio.run_coroutine_threadsafe(self._next(), self._loop).result()
            except ClientDisconnect:
                raise Unavailable("the sender has gone before the end of the body") from None
            if chunk is None:
                return b""
            self._rest = memoryview(chunk)
        taken, self._rest = self._rest[:size], self._rest[size:]
        return bytes(taken)

    async def _next(self) -> bytes | None:
        return await anext(self._stream, None)


class _Answer(Response):
    media_type = "application/x-ndjson"

    def __init__(self, first: Event | None, lines: Lines) -> None:
        super().__init__()
        del self.headers["content-length"]  # of a body that is whole
        self._first = first
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        event: Event | BaseException | None = self._first
        while event is not None:
            if isinstance(event, BaseException):
                event = failed(event, self._lines.progress)
            line = event.model_dump_json().encode() + b"\n"
            await send({"type": "http.response.body", "body": line, "more_body": True})
            event = await self._lines.next()
        await send({"type": "http.response.body", "body": b""})
