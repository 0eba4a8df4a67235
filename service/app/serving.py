"""What REST and gRPC do alike on the event loop: blocking calls on a bounded pool of threads, single recalls through
the micro-batcher, stores whose wait holds no thread.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from service.app.engine import Engine
from service.app.recall_schemas import RecallReply
from service.app.schemas import RecallRequest, StoreReply, StoreRequest
from service.errors import TooBusy

P = ParamSpec("P")
T = TypeVar("T")

POOL_THREADS = 8  # blocked on disk or in a model; more would only share the same cores
POOL_WAITING_MAX = 256  # requests held in memory, bodies included


class Pool:
    """Runs blocking calls; refuses when too many wait already."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="request")
        self._pending = 0

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Raises `TooBusy`. Cancelled before its turn, the call is not made."""
        if self._pending >= POOL_WAITING_MAX:
            raise TooBusy(f"{POOL_WAITING_MAX} requests are waiting already", retry_after_s=1)
        self._pending += 1
        try:
            work = partial(contextvars.copy_context().run, call, *args, **kwargs)  # the caller goes along
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._pending -= 1


async def recall(engine: Engine, pool: Pool, collection: str, request: RecallRequest) -> RecallReply:
    cue = request.cue
    if (
        cue is not None
        and engine.has_come_to(collection, request.min_version)
        and not {"image", "text", "id"} & cue.model_fields_set
    ):
        prepared = engine.prepare(collection, request)  # vectors need no encoding: a thread would cost more
    else:
        prepared = await pool.run(engine.prepare, collection, request)
    if prepared.single:
        recalled = await asyncio.wrap_future(engine.submit(prepared))
    else:
        recalled = await pool.run(engine.recall_batch, prepared)
    return engine.recall_reply(prepared, recalled)


async def store(engine: Engine, pool: Pool, collection: str, request: StoreRequest) -> StoreReply:
    accepted = await pool.run(engine.accept, collection, request)
    if request.wait and accepted.done is not None:
        await asyncio.wait([asyncio.wrap_future(accepted.done)], timeout=request.timeout_s)
    return await pool.run(engine.store_reply, accepted)
