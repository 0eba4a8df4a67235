"""The one writer, with group commit.

Strategy: a commit costs a sync of the disk (milliseconds) and a statement costs microseconds, so writes that arrive
while a commit is under way are run together in the next transaction. Each runs in a savepoint, so that one that fails
takes back only its own work.

Rules:
- The writes of a group run in the order of the collections that they lock, those of one collection in the order in
  which they came: two servers whose groups name the same collections would else each hold what the other waits for.
- A write is answered only after the commit that holds it: an acknowledged write is on disk.
- An error of the storage (full, broken) may have ended the whole transaction, and so may a failing commit. Then the
  group is rolled back and each write is run again on its own, so that only those that cannot be done fail. A write may
  therefore run twice, never commit twice: it must act on nothing but its connection.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection

from service.errors import StorageFull, StorageUnavailable, TooBusy, Unavailable
from service.storage.database import Database

T = TypeVar("T")

GROUP_MAX = 64
"""Writes in one transaction: enough to spread the cost of a sync, few enough that the first does not wait long for the
last."""

QUEUE_MAX = 1024
"""Writes waiting. Each is a blocked thread of ours, so more than this means that something is wrong downstream."""


@dataclass(frozen=True, eq=False)
class _Write:
    run: Callable[[Connection], Any]
    then: Callable[[Any], None]
    on: int
    answer: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True)
class _Failed:
    error: Exception


class Writer:
    """Runs functions of a connection, one after the other, in a thread of its own."""

    def __init__(self, database: Database, *, queue_max: int = QUEUE_MAX) -> None:
        self.database = database
        self._queue_max = queue_max
        self._queue: deque[_Write] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engram-writer", daemon=True)
        self._thread.start()

    def submit(
        self, run: Callable[[Connection], T], then: Callable[[T], None] = lambda _: None, *, on: int | None = None
    ) -> T:
        """Run `run` in a transaction and return what it returned once that is committed. `on`: the collection whose row
        it locks, if it locks one.

        `then(result)` is called after the commit, before anybody is answered, in the order of the commits, and whatever
        became of the caller meanwhile: what must follow the database in step belongs there, and should be quick.
        Raises what `run` raised (its work is undone), `TooBusy` if the queue is full, `Unavailable` after `close`,
        `StorageFull`, `StorageUnavailable`.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("a write cannot wait for another write")
        write = _Write(run, then, on or 0)
        with self._changed:
            if self._closed:
                raise Unavailable("The server is shutting down.")
            if len(self._queue) >= self._queue_max:
                raise TooBusy(f"{self._queue_max} writes are waiting.", retry_after_s=1)
            self._queue.append(write)
            self._changed.notify()
        answer: T = write.answer.result()
        return answer

    def close(self) -> None:
        """Refuse new writes, finish those accepted, and stop. Closing twice is harmless."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                group = [self._queue.popleft() for _ in range(min(GROUP_MAX, len(self._queue)))]
                group.sort(key=lambda write: write.on)
            if not group:
                return
            self._commit(group)

    def _commit(self, group: list[_Write]) -> None:
        try:
            with self.database.write() as connection:
                outcomes = [_attempt(connection, write.run) for write in group]
        except Exception as error:
            if len(group) == 1:
                group[0].answer.set_exception(error)
            else:
                for write in group:
                    self._commit([write])
            return
        for write, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, _Failed):
                write.answer.set_exception(outcome.error)
                continue
            try:
                write.then(outcome)
            except Exception as error:  # the write stands; its caller hears what did not follow
                write.answer.set_exception(error)
            else:
                write.answer.set_result(outcome)


def _attempt(connection: Connection, run: Callable[[Connection], Any]) -> Any:
    """What `run` returns, or `_Failed` with its work undone. Raises when the whole transaction may be lost."""
    savepoint = connection.begin_nested()
    try:
        result = run(connection)
    except (StorageFull, StorageUnavailable):
        raise
    except Exception as error:
        savepoint.rollback()
        return _Failed(error)
    savepoint.commit()
    return result
