"""Notices between servers, through Redis: that something was committed, or a job queued.

A notice says no more than where to look. What is to be seen is in the database, and whoever hears nothing looks each
second: a notice that is lost, and Redis being down, cost a second at most.

Rules:
- `tell` never waits and never fails. Notices that pile up are one.
- A server does not hear its own.
- Both threads try again each `RETRY_S` while Redis cannot be reached; that is logged once, and once when it is back.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable

import structlog
from redis import Redis
from redis.exceptions import RedisError

log = structlog.get_logger()

JOB, COMMIT = b":job", b":commit"
RETRY_S = 1.0
TIMEOUT_S = 2.0  # of one answer: a Redis that takes longer is as good as not there
LISTEN_S = 0.5  # between two looks at whether to stop


class Notices:
    """`channel`: those who share a database share it. `heard(of a job)` is called on a thread of its own."""

    def __init__(self, url: str, channel: str, heard: Callable[[bool], None]) -> None:
        self._channel, self._heard = channel, heard
        self._redis = Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        self._name = uuid.uuid4().hex.encode()
        self._told = threading.Event()
        self._of_job = False
        self._stopping = threading.Event()
        self._reached = True
        self._threads = [
            threading.Thread(target=self._again, args=(work,), name=f"notices-{work.__name__}", daemon=True)
            for work in (self._send, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def tell(self, of_job: bool) -> None:
        """Let the others look at what is committed, and (of a job) for work."""
        self._of_job |= of_job
        self._told.set()

    def close(self) -> None:
        self._stopping.set()
        self._told.set()
        for thread in self._threads:
            thread.join()
        self._redis.close()

    def _again(self, work: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            try:
                work()
            except RedisError as error:
                if self._reached:
                    log.warning("Redis cannot be reached; other servers look each second", detail=str(error))
                self._reached = False
                self._stopping.wait(RETRY_S)

    def _send(self) -> None:
        while not self._stopping.is_set():
            self._told.wait()
            self._told.clear()
            of_job, self._of_job = self._of_job, False
            if not self._stopping.is_set():
                self._redis.publish(self._channel, self._name + (JOB if of_job else COMMIT))

    def _listen(self) -> None:
        with self._redis.pubsub(ignore_subscribe_messages=True) as listening:  # type: ignore[no-untyped-call]
            listening.subscribe(self._channel)
            self._heard(True)  # what was told while nobody listened
            if not self._reached:
                log.info("Redis is reached again")
            self._reached = True
            while not self._stopping.is_set():
                message = listening.get_message(timeout=LISTEN_S)
                if message is not None and not message["data"].startswith(self._name):
                    self._heard(message["data"].endswith(JOB))
