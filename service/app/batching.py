"""Micro-batching: requests that arrive while a batch runs form the next batch.

Rules: never wait when idle (a lone request starts at once); at most `batch_max` to a batch; at most `queue_max`
waiting, then `TooBusy`. Items of different keys never share a batch; the oldest item's key goes next, so no key
starves.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from service.errors import TooBusy, Unavailable

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
R = TypeVar("R")


class MicroBatcher(Generic[K, T, R]):
    """`run(key, items)` is called on one thread of its own and answers one result per item, an exception among them
    included.
    """

    def __init__(
        self, name: str, run: Callable[[K, Sequence[T]], Sequence[R | BaseException]], *, batch_max: int, queue_max: int
    ) -> None:
        self._run = run
        self._batch_max = batch_max
        self._queue_max = queue_max
        self._waiting: deque[tuple[K, T, Future[R]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def submit(self, key: K, item: T) -> Future[R]:
        """Queue `item`. Raises `TooBusy` when `queue_max` items wait, `Unavailable` once closed."""
        future: Future[R] = Future()
        with self._changed:
            if self._closed:
                raise Unavailable("the server is shutting down")
            if len(self._waiting) >= self._queue_max:
                raise TooBusy(f"{self._queue_max} requests are waiting already", retry_after_s=1)
            self._waiting.append((key, item, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Answer what waits, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _take(self) -> tuple[K, list[T], list[Future[R]]] | None:
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            key = self._waiting[0][0]
            items: list[T] = []
            futures: list[Future[R]] = []
            passed: list[tuple[K, T, Future[R]]] = []
            while self._waiting and len(items) < self._batch_max:
                entry = self._waiting.popleft()
                if entry[0] != key:
                    passed.append(entry)
                elif entry[2].set_running_or_notify_cancel():
                    items.append(entry[1])
                    futures.append(entry[2])
            self._waiting.extendleft(reversed(passed))
            return key, items, futures

    def _loop(self) -> None:
        while (taken := self._take()) is not None:
            key, items, futures = taken
            if not items:
                continue
            try:
                results: Sequence[R | BaseException] = self._run(key, items)
            except Exception as error:  # the whole batch failed: every caller hears it
                results = [error] * len(items)
            for future, result in zip(futures, results, strict=True):
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)
