"""Several store requests under way at once, answered in their order.

A server decodes and encodes one request while the next one is read from disk and sent; with one at a time its model
would wait for the client between them.

Rules:
- Two requests that name one id are never under way together: the later one must be the later one there.
- Threads are daemons: whoever interrupts a program is not kept waiting for answers. What was sent is stored all the
  same.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from engram.replies import StoredItem
from engram.transport import Body

UNDER_WAY_MAX = 3  # one that is encoded, one that is decoded, one that is sent; each holds its pictures here and there

Request = list[Body | StoredItem]
"""Memories, each as it is sent, or already with its answer where it could not be."""


def answered(requests: Iterable[Request], send: Callable[[list[Body]], Body]) -> Iterator[tuple[Request, Body | None]]:
    """Each request with its reply (None where nothing of it was to be sent). Raises what `send` raises."""
    under_way: deque[tuple[Request, set[Any], Future[Body | None]]] = deque()
    for request in requests:
        memories = [memory for memory in request if isinstance(memory, dict)]
        ids = {memory["id"] for memory in memories if isinstance(memory.get("id"), str)}
        while under_way and (len(under_way) == UNDER_WAY_MAX or any(ids & others for _, others, _ in under_way)):
            earlier, _, reply = under_way.popleft()
            yield earlier, reply.result()
        under_way.append((request, ids, _sent(memories, send)))
    for earlier, _, reply in under_way:
        yield earlier, reply.result()


def _sent(memories: list[Body], send: Callable[[list[Body]], Body]) -> Future[Body | None]:
    reply: Future[Body | None] = Future()

    def run() -> None:
        try:
            reply.set_result(send(memories) if memories else None)
        except BaseException as error:
            reply.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()
    return reply
