"""What a client does, without doing it: steps that a generator asks for, one at a time, and is answered.

`asking` writes each of the client's methods once, as such a generator. `run` carries it out in this thread for
`Client`, `run_async` in an event loop for `AsyncClient`; they differ in nothing else.

Rules:
- A step that fails is raised where the generator asked for it: what is to be asked again is decided there, once.
- Threads are daemons: whoever interrupts a program is not kept waiting for answers. What was sent is done all the same.
- An awaited call that is cancelled or fails leaves no task of its own behind.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from engram.transport import AsyncTransport, Body, Transport
from service.errors import EngramError

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """An operation of the table; answered by its reply."""

    operation: str
    path: Mapping[str, str]
    body: Body | None
    timeout_s: float


@dataclass(frozen=True)
class Content:
    """A memory's original; answered by its bytes."""

    collection: str
    memory_id: str
    timeout_s: float


@dataclass(frozen=True, eq=False)
class SendRows:
    """A part of an import; answered by what is said of its rows."""

    collection: str
    media_type: str
    rows: bytes
    options: Body
    timeout_s: float


@dataclass(frozen=True)
class Export:
    """Answered by a handle to `Take` from, and to `Close`."""

    collection: str
    options: Body
    timeout_s: float


@dataclass(frozen=True)
class Take:
    """Answered by the next chunk; None at the end."""

    chunks: Any


@dataclass(frozen=True)
class Close:
    chunks: Any


@dataclass(frozen=True)
class Fetch:
    """A snapshot's file, given piece by piece to `write`, which may be called in a thread of its own."""

    collection: str
    snapshot_id: str
    write: Callable[[bytes], object]


@dataclass(frozen=True)
class Send:
    """A snapshot's file, taken piece by piece; answered by what is kept."""

    collection: str
    snapshot_id: str
    pieces: Iterator[bytes]


@dataclass(frozen=True)
class Pause:
    seconds: float


@dataclass(frozen=True)
class Work:
    """What reads files or draws pictures, and so would hold up an event loop; answered by what it gives."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Start:
    """Steps to carry out beside the ones that go on; answered by a handle to `Join`."""

    steps: Steps[Any]


@dataclass(frozen=True)
class Join:
    """Wait for what was started; answered by what it gives."""

    started: Any


Step = Call | Content | SendRows | Export | Take | Close | Fetch | Send | Pause | Work | Start | Join
Steps = Generator[Step, Any, T]


def run(steps: Steps[T], transport: Transport) -> T:
    """Carry out in this thread what the steps ask for; gives what they give in the end, and raises what they raise."""
    try:
        step = next(steps)
        while True:
            try:
                answer = _perform(step, transport)
            except EngramError as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as end:
        given: T = end.value
        return given


def _perform(step: Step, transport: Transport) -> Any:
    match step:
        case Call():
            return transport.call(step.operation, step.path, step.body, timeout_s=step.timeout_s)
        case Content():
            return transport.content(step.collection, step.memory_id, timeout_s=step.timeout_s)
        case SendRows(collection, media_type, rows, options, timeout_s):
            return transport.import_rows(collection, media_type, rows, options, timeout_s=timeout_s)
        case Export():
            return transport.export(step.collection, step.options, timeout_s=step.timeout_s)
        case Take():
            return next(step.chunks, None)
        case Close():
            return step.chunks.close()
        case Fetch():
            return transport.download(step.collection, step.snapshot_id, step.write)
        case Send():
            return transport.upload(step.collection, step.snapshot_id, step.pieces)
        case Pause():
            return time.sleep(step.seconds)
        case Work():
            return step.function()
        case Start():
            return _in_thread(step.steps, transport)
        case Join():
            return step.started.result()


def _in_thread(steps: Steps[T], transport: Transport) -> Future[T]:
    outcome: Future[T] = Future()

    def carry_out() -> None:
        try:
            outcome.set_result(run(steps, transport))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=carry_out, name="client", daemon=True).start()
    return outcome


async def run_async(steps: Steps[T], transport: AsyncTransport) -> T:
    """As `run`, awaiting instead of blocking."""
    started: list[asyncio.Task[Any]] = []
    try:
        step = next(steps)
        while True:
            try:
                answer = await _perform_async(step, transport, started)
            except EngramError as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as end:
        given: T = end.value
        return given
    finally:
        for task in started:
            task.cancel()
        await asyncio.gather(*started, return_exceptions=True)


async def _perform_async(step: Step, transport: AsyncTransport, started: list[asyncio.Task[Any]]) -> Any:
    match step:
        case Call():
            return await transport.call(step.operation, step.path, step.body, timeout_s=step.timeout_s)
        case Content():
            return await transport.content(step.collection, step.memory_id, timeout_s=step.timeout_s)
        case SendRows(collection, media_type, rows, options, timeout_s):
            return await transport.import_rows(collection, media_type, rows, options, timeout_s=timeout_s)
        case Export():
            return transport.export(step.collection, step.options, timeout_s=step.timeout_s)
        case Take():
            return await anext(step.chunks, None)
        case Close():
            return await step.chunks.aclose()
        case Fetch():
            return await transport.download(step.collection, step.snapshot_id, step.write)
        case Send():
            return await transport.upload(step.collection, step.snapshot_id, step.pieces)
        case Pause():
            return await asyncio.sleep(step.seconds)
        case Work():
            return await asyncio.to_thread(step.function)
        case Start():
            started.append(asyncio.create_task(run_async(step.steps, transport)))
            return started[-1]
        case Join():
            return await step.started
