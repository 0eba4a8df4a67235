"""What an import says, on its way from its thread to whoever reads it: over REST and over gRPC.

Rules:
- Who sends a long body may not read before its end. Progress that nobody takes is left out; up to `LINES_WAITING_MAX`
  of refused rows wait, and the import stops where they are more.
"""

from __future__ import annotations

import asyncio
import queue
from contextlib import suppress

import structlog

from service.app.transfer_schemas import Event, ImportFailed, ImportProgress
from service.errors import EngramError, TooBusy

log = structlog.get_logger()

LINES_WAITING_MAX = 10_000  # of refused rows, some 200 bytes each
UNREAD_S = 60.0  # how long an import waits where that many are not taken


class Lines:
    """Events on their way from an import's thread to its answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: queue.Queue[Event] = queue.Queue(LINES_WAITING_MAX)
        self._there = asyncio.Event()
        self._error: BaseException | None = None
        self._ended = False
        self.progress = ImportProgress(rows=0, stored=0, updated=0, refused=0, durable_row=0, version=None)

    def put(self, event: Event) -> None:
        """Raises `TooBusy` where nobody reads."""
        if isinstance(event, ImportProgress):
            self.progress = event
            if not self._waiting.empty():
                return
        try:
            self._waiting.put(event, timeout=UNREAD_S)
        except queue.Full:
            raise TooBusy(
                f"{LINES_WAITING_MAX} refused rows wait to be read: read the answer while the body is sent"
            ) from None
        self._tell()

    def fail(self, error: BaseException) -> None:
        """Like the end it waits for nobody: where the events are not taken there may be nobody."""
        if not isinstance(error, EngramError):
            log.error("an import failed", exc_info=error)
        self._error = error
        self._tell()

    def end(self) -> None:
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is there to be told
            self._loop.call_soon_threadsafe(self._there.set)

    async def next(self) -> Event | BaseException | None:
        """The next event, why there is none, or None at the end."""
        while True:
            self._there.clear()
            error, ended = self._error, self._ended  # looked at before the queue, in which nothing comes after them
            with suppress(queue.Empty):
                return self._waiting.get_nowait()
            if error is not None:
                self._error = None
                return error
            if ended:
                return None
            await self._there.wait()


def failed(error: BaseException, progress: ImportProgress) -> ImportFailed:
    """The last line of an import that did not come to its own."""
    known = error if isinstance(error, EngramError) else EngramError("the server's log has the details")
    why = {"status": known.status, "code": known.code, "detail": known.detail}
    return ImportFailed.model_validate(progress.model_dump(exclude={"event"}) | why)
