"""Files over gRPC: their parts as messages; of an import, what becomes of its rows.

Rules:
- As over REST: an import reads its rows from a thread that stores them, part by part as it asks for them; what it says
  is on its way meanwhile. A slow disk holds the sender back.
- A part that is sent is under what a client takes by default.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import aclosing
from contextvars import copy_context
from functools import partial
from typing import Any, cast

from service.app.engine import Engine
from service.app.lines import Lines, failed
from service.app.snapshot_schemas import SnapshotInfo
from service.app.transfer_schemas import Event
from service.errors import TooBusy, Unavailable
from service.rpc.methods import ExportReply, ImportRowsReply, Method, SnapshotContent
from service.rpc.requests import Asked, parse

TRANSFERS_MAX = 8  # at once: each holds a thread and a few batches, an export a reader of the database
PART_BYTES = 2**20  # sent at once: a client refuses more than 4 MiB by default


class Transfers:
    """The threads of files on their way; on the event loop alone but for what runs in them."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(TRANSFERS_MAX, thread_name_prefix="rpc-transfer")
        self._under_way = 0

    async def export(self, engine: Engine, asked: Asked) -> AsyncGenerator[ExportReply, None]:
        """Raises what the engine raises, and `TooBusy`."""
        begin = partial(engine.export, asked.path["collection"], asked.body)
        async with aclosing(self._parts(lambda: begin().chunks)) as parts:
            async for part in parts:
                yield ExportReply(rows=part)

    async def snapshot(self, engine: Engine, asked: Asked) -> AsyncGenerator[SnapshotContent, None]:
        """A kept snapshot's file. Raises `SnapshotNotFound`, `TooBusy`."""
        begin = partial(engine.snapshot_content, asked.path["collection"], asked.path["snapshot"])
        async with aclosing(self._parts(lambda: begin()[1])) as parts:
            async for part in parts:
                yield SnapshotContent(data=part)

    async def keep_snapshot(
        self, engine: Engine, method: Method, asked: Asked, raws: AsyncIterator[bytes]
    ) -> AsyncGenerator[SnapshotInfo, None]:
        """The one answer to a file. Raises `InvalidRequest`, `InvalidSnapshot`, `SnapshotExists`, `BodyTooLarge`."""
        self._begin()
        run = partial(asyncio.get_running_loop().run_in_executor, self._threads)
        try:
            with engine.receive_snapshot(asked.path["collection"], asked.path["snapshot"]) as receiving:
                await run(receiving.write, asked.body.data)
                async for raw in raws:
                    await run(receiving.write, parse(method, raw).body.data)
                yield await run(receiving.keep)
        finally:
            self._end()

    async def _parts(self, begin: Callable[[], Iterator[bytes]]) -> AsyncGenerator[bytes, None]:
        """What `begin` gives to read, in parts that a client takes."""
        self._begin()
        reading = threading.Lock()  # a generator cannot be closed while it runs
        begun: Any = None
        loop = asyncio.get_running_loop()

        def take() -> bytes | None:
            nonlocal begun
            with reading:
                begun = begun or begin()
                return next(begun, None)

        def close() -> None:
            with reading:
                if begun is not None:
                    begun.close()

        try:
            while (chunk := await loop.run_in_executor(self._threads, take)) is not None:
                for start in range(0, len(chunk), PART_BYTES):
                    yield bytes(chunk[start : start + PART_BYTES])
        finally:
            self._end()
            self._threads.submit(close)

    async def import_rows(
        self, engine: Engine, method: Method, asked: Asked, raws: AsyncIterator[bytes]
    ) -> AsyncGenerator[ImportRowsReply, None]:
        """Raises what the import raises before its first row is read, and `TooBusy`."""
        self._begin()
        loop = asyncio.get_running_loop()
        lines, rows = Lines(loop), _Rows(method, asked.body.rows, raws, loop)
        options = asked.body  # which are the request's own fields
        begin = partial(engine.import_rows, asked.path["collection"], asked.body.format, rows, options)
        running = self._threads.submit(copy_context().run, _run, lines, begin)
        try:
            event = await lines.next()
            if isinstance(event, BaseException):
                raise event
            while event is not None:
                said = failed(event, lines.progress) if isinstance(event, BaseException) else event
                yield ImportRowsReply(said)
                event = await lines.next()
        finally:
            rows.gone()  # where the sender is: what is durable stays
            running.add_done_callback(lambda _: loop.call_soon_threadsafe(self._end))

    def _begin(self) -> None:
        if self._under_way >= TRANSFERS_MAX:
            raise TooBusy(f"{TRANSFERS_MAX} imports, exports and snapshots are under way already", retry_after_s=5)
        self._under_way += 1

    def _end(self) -> None:
        self._under_way -= 1


def _run(lines: Lines, begin: Callable[[], Any]) -> None:
    """An import, in its thread."""
    try:
        events: Any = begin()
        try:
            for event in events:
                lines.put(cast(Event, event))
        finally:
            events.close()
    except BaseException as error:
        lines.fail(error)
    finally:
        lines.end()


class _Rows:
    """A stream's parts of a file, for a thread: the loop is asked for a part when the thread wants one."""

    def __init__(
        self, method: Method, first: bytes, raws: AsyncIterator[bytes], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._method = method
        self._rest = memoryview(first)
        self._raws = aiter(raws)
        self._loop = loop
        self._gone = False
        self._asked: Any = None

    def read(self, size: int, /) -> bytes:
        """Raises `Unavailable` where the sender has gone."""
        while not self._rest:
            if self._gone:
                raise Unavailable("the sender has gone before the end of the rows")
            self._asked = asyncio.run_coroutine_threadsafe(self._next(), self._loop)
            try:
                raw = self._asked.result()
            except (CancelledError, asyncio.CancelledError):
                raise Unavailable("the sender has gone before the end of the rows") from None
            if raw is None:
                return b""
            self._rest = memoryview(parse(self._method, raw).body.rows)
        taken, self._rest = self._rest[:size], self._rest[size:]
        return bytes(taken)

    def gone(self) -> None:
        self._gone = True
        if self._asked is not None:
            self._asked.cancel()

    async def _next(self) -> bytes | None:
        return await anext(self._raws, None)
