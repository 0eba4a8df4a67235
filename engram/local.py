"""The engine in this process, behind the client's protocol: no server, no JSON, the same requests and replies.

The only module of the client that imports the engine, and torch with it.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import structlog
from pydantic import BaseModel

from engram.transport import Body, imported
from service import settings
from service.api.bodies import validate
from service.app.engine import Engine
from service.app.operations import OPERATIONS
from service.app.transfer_schemas import MEDIA_TYPES, ExportRequest, ImportOptions
from service.observability import configure_logging
from workers.loop import running

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 8  # as many as the server's own: the rest would only share the same cores
HERE = ("ENGRAM_ENCODER_DEVICE", "ENGRAM_SNAPSHOTS")  # of the server's settings those that mean something without it


class LocalTransport:
    """Nothing here is cut off by `timeout_s`: the engine is this process."""

    def __init__(self, path: Path) -> None:
        if not structlog.is_configured():  # else the program around the engine has its own way
            configure_logging(logging.WARNING)
        with ExitStack() as opened:  # whatever was opened is closed again if the next thing fails
            self._engine = opened.enter_context(Engine(settings.load(_environment(), data=path)))
            opened.enter_context(running(self._engine))
            self._opened = opened.pop_all()

    def call(
        self, operation: str, path: Mapping[str, str], body: Body | None = None, *, timeout_s: float | None = None
    ) -> Body:
        asked = OPERATIONS[operation]
        request = None if asked.request is None else validate(asked.request, body or {})
        reply = asked.call(self._engine, path, request)
        if isinstance(reply, BaseModel):
            return reply.model_dump()
        return {} if reply is None else dict(reply)

    def content(self, collection: str, memory_id: str, *, timeout_s: float | None = None) -> bytes:
        return self._engine.content(collection, memory_id)[0]

    def import_rows(
        self, collection: str, media_type: str, rows: bytes, options: Body, *, timeout_s: float | None = None
    ) -> list[Body]:
        form = next(form for form, kind in MEDIA_TYPES.items() if kind == media_type)
        events = self._engine.import_rows(collection, form, io.BytesIO(rows), validate(ImportOptions, options))
        return imported([event.model_dump() for event in events])

    def export(self, collection: str, options: Body, *, timeout_s: float | None = None) -> Generator[bytes, None, None]:
        chosen = {**options, "filter": json.loads(options["filter"])} if "filter" in options else options
        yield from self._engine.export(collection, validate(ExportRequest, chosen)).chunks

    def download(self, collection: str, snapshot_id: str, write: Callable[[bytes], object]) -> None:
        for piece in self._engine.snapshot_content(collection, snapshot_id)[1]:
            write(piece)

    def upload(self, collection: str, snapshot_id: str, pieces: Iterator[bytes]) -> Body:
        with self._engine.receive_snapshot(collection, snapshot_id) as receiving:
            for piece in pieces:
                receiving.write(piece)
            return receiving.keep().model_dump()

    def close(self) -> None:
        self._opened.close()


class AsyncLocalTransport:
    """The same in threads. The folder is opened there too, when it is first asked for anything: that takes seconds.

    A call whose await is cancelled goes on in its thread; `close` waits for it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="client")
        self._opening = asyncio.Lock()
        self._local: LocalTransport | None = None

    async def open(self) -> LocalTransport:
        async with self._opening:
            if self._local is None:
                self._local = await self._run(LocalTransport, self._path)
        return self._local

    async def call(
        self, operation: str, path: Mapping[str, str], body: Body | None = None, *, timeout_s: float | None = None
    ) -> Body:
        return await self._run((await self.open()).call, operation, path, body)

    async def content(self, collection: str, memory_id: str, *, timeout_s: float | None = None) -> bytes:
        return await self._run((await self.open()).content, collection, memory_id)

    async def import_rows(
        self, collection: str, media_type: str, rows: bytes, options: Body, *, timeout_s: float | None = None
    ) -> list[Body]:
        return await self._run((await self.open()).import_rows, collection, media_type, rows, options)

    async def export(
        self, collection: str, options: Body, *, timeout_s: float | None = None
    ) -> AsyncGenerator[bytes, None]:
        chunks = (await self.open()).export(collection, options)
        try:
            while (chunk := await self._run(next, chunks, None)) is not None:
                yield chunk
        finally:
            await self._run(chunks.close)

    async def download(self, collection: str, snapshot_id: str, write: Callable[[bytes], object]) -> None:
        await self._run((await self.open()).download, collection, snapshot_id, write)

    async def upload(self, collection: str, snapshot_id: str, pieces: Iterator[bytes]) -> Body:
        return await self._run((await self.open()).upload, collection, snapshot_id, pieces)

    async def close(self) -> None:
        async with self._opening:
            await asyncio.to_thread(self._threads.shutdown)
            if self._local is not None:
                await asyncio.to_thread(self._local.close)
                self._local = None

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args, **kwargs))


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in HERE if name in os.environ}
