"""Streaming store: memories are stored as they come, and each is answered as soon as it is on disk.

Rules:
- What has arrived while a batch was stored is the next batch, in the order it came; batches follow one another, so the
  later of two memories of one id is the later one here too.
- What waits is bounded; while it is, nothing more is read, and the client's writes wait in turn.
- A bad memory is reported under its position. What is wrong with the stream itself ends it, with a status; what was
  answered before is stored.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from service.app import serving
from service.app.engine import Engine
from service.app.schemas import StoreRequest
from service.app.serving import Pool
from service.rpc.methods import Method, StoreStreamReply
from service.rpc.requests import Asked, parsed

WAITING_BYTES_MAX = 8 * 2**20  # of one stream: some batches of vectors, or a few photographs
STORED_AT_ONCE = (
    500  # a commit of 500 vectors is tens of milliseconds: the first answer is not far, the share of syncs small
)


class Arrived:
    """Memories read ahead of what is stored."""

    def __init__(self) -> None:
        self._memories: deque[tuple[Any, int]] = deque()  # with their share of the bytes
        self._bytes = 0
        self._ended = False
        self._error: BaseException | None = None
        self._changed = asyncio.Condition()

    async def put(self, memories: list[Any], size: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._bytes == 0 or self._bytes + size <= WAITING_BYTES_MAX)
            share = size // max(1, len(memories))
            self._memories.extend((memory, share) for memory in memories)
            self._bytes += share * len(memories)
            self._changed.notify_all()

    async def end(self, error: BaseException | None = None) -> None:
        async with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    async def take(self) -> list[Any]:
        """What is there, at most `STORED_AT_ONCE`; nothing at the end. Raises what reading raised, after the rest."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._memories or self._ended)
            if not self._memories and self._error is not None:
                raise self._error
            taken = [self._memories.popleft() for _ in range(min(STORED_AT_ONCE, len(self._memories)))]
            self._bytes -= sum(share for _, share in taken)
            self._changed.notify_all()
            return [memory for memory, _ in taken]


async def store_stream(
    engine: Engine,
    pool: Pool,
    method: Method,
    asked: Asked,
    rest: AsyncIterator[bytes],
    wait_max_s: Callable[[], float],
) -> AsyncGenerator[StoreStreamReply, None]:
    """`wait_max_s()`: the longest wait for encoding that the call's deadline leaves now."""
    path, opening = asked
    await pool.run(engine.collection, path["collection"])  # raises `CollectionNotFound` before anything more is read
    arrived = Arrived()

    async def read() -> None:
        try:
            await arrived.put(opening.memories, 0)
            async for raw in rest:
                await arrived.put((await parsed(pool, method, raw)).body.memories, len(raw))
        except Exception as error:
            await arrived.end(error)
        else:
            await arrived.end()

    reading = asyncio.ensure_future(read())
    done = 0
    try:
        while memories := await arrived.take():
            request = StoreRequest(memories=memories, wait=opening.wait, timeout_s=wait_max_s())
            reply = await serving.store(engine, pool, path["collection"], request)
            yield StoreStreamReply(
                first=done, results=reply.results, version=reply.version, operation_id=reply.operation_id
            )
            done += len(memories)
    finally:
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
