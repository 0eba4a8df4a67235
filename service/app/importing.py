"""Import: rows of a stream, checked, stored batch by batch, and answered by number.

Strategy: three things go on at once. A thread reads the next batches from the stream; this one checks a batch and
commits what needs no encoding; what does goes through the pipeline of `store` as a job of its own, a few of which are
under way together, so that its model is never waited for and never far behind.

Rules:
- Vectors of a space that an encoder fills are taken where the header names the fingerprint of the space's encoder; else
  they are left out, and made again from the row's text and content.
- A row that is durable, and all before it, are on disk. Rows that are sent again replace what they stored before, by
  their ids; rows without any get one of the caller's prefix and their number.
- Rows of one id are stored in their order, whichever way each goes.
- Nobody is told of near-duplicates (the diagnostics find them), but a collection that refuses them does so here too.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Full, Queue
from typing import Any, TypeVar

import numpy as np
import structlog

from service.app.checks import check_moment
from service.app.cues import check_vector, memory_wants
from service.app.encoding import Parts
from service.app.ids import new_id
from service.app.live import LiveCollection
from service.app.resources import Resources
from service.app.row_columns import read_parquet, read_stream
from service.app.row_lines import read_lines
from service.app.rows import Batch, Block, Dimensions, Fields, Readable, Rows
from service.app.schemas import Problem, StoredItem
from service.app.store import Accepted, Item, checked, commit, commit_admitted, enqueue, keep_originals, reply
from service.app.transfer_schemas import (
    REFUSALS_LISTED_MAX,
    Event,
    Format,
    Header,
    ImportDone,
    ImportFailed,
    ImportOptions,
    ImportProgress,
    ImportStarted,
    Refusal,
)
from service.core.similarity import MAGNITUDE_MAX
from service.errors import Duplicate, EncodersChanged, EngramError, InvalidRequest, Unavailable, error_classes
from service.storage.memories import MemoryWrite

log = structlog.get_logger()

T = TypeVar("T")

AHEAD = 2  # batches read while one is stored
JOBS_UNDER_WAY = 3  # batches that are encoded: one in the model, one behind it, one on its way
PROGRESS_S = 0.5  # between two lines of progress

Outcome = str | EngramError
"""stored, updated, or why not."""


@dataclass(eq=False)
class _Stretch:
    """Rows whose outcomes are known, or will be once their job has ended: of `queued`, in the job's order."""

    rows: range
    outcomes: dict[int, tuple[str | None, Outcome]] = field(default_factory=dict)
    version: int | None = None
    queued: dict[int, Item] = field(default_factory=dict)
    job: Accepted | None = None

    def ended(self, timeout_s: float | None = None) -> bool:
        """Whether its job has ended, within this time."""
        return self.job is None or self.job.done is None or bool(wait([self.job.done], timeout_s).done)


@dataclass(eq=False)
class _Totals:
    durable_row: int
    rows: int = 0
    stored: int = 0
    updated: int = 0
    refused: int = 0
    version: int | None = None
    refusals: list[Refusal] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        return {
            "rows": self.rows, "stored": self.stored, "updated": self.updated, "refused": self.refused,
            "durable_row": self.durable_row, "version": self.version,
        }  # fmt: skip


def run_import(
    resources: Resources, live: LiveCollection, form: Format, body: Readable, options: ImportOptions
) -> Iterator[Event]:
    """What happens to the rows, line by line; the last is `ImportDone` or `ImportFailed`.

    Raises before the first line where the body's beginning cannot be read: `MalformedBody`, `InvalidRequest`,
    `BodyTooLarge`. To be closed where it is left early: what is durable stays, and what is under way goes on.
    """
    with _read(resources, live, form, body, options.from_row) as rows, _ahead(rows.batches, AHEAD) as batches:
        yield from _Import(resources, live, form, rows.header, options).run(batches)


@contextmanager
def _read(resources: Resources, live: LiveCollection, form: Format, body: Readable, from_row: int) -> Iterator[Rows]:
    """The rows of a body from `from_row` on."""
    settings = resources.settings

    def dimensions(header: Header) -> Dimensions:
        given = spaces_given(live, header)
        return {name: space.dimension if name in given else None for name, space in live.spaces.items()}

    if form == "ndjson":
        yield read_lines(body, dimensions, from_row, settings.body_bytes_max)
    elif form == "arrow":
        yield read_stream(body, dimensions, from_row, settings.body_bytes_max)
    else:
        with read_parquet(body, dimensions, from_row, settings.import_spool_bytes_max, settings.data) as rows:
            yield rows


class _Import:
    def __init__(
        self, resources: Resources, live: LiveCollection, form: Format, header: Header, options: ImportOptions
    ) -> None:
        self._resources = resources
        self._collection_id = live.id
        self._name = live.name
        self._form: Format = form
        self._header = header
        self._options = options
        self._under_way: deque[_Stretch] = deque()
        self._totals = _Totals(durable_row=options.offset + options.from_row - 1)

    def run(self, batches: Iterator[Batch]) -> Iterator[Event]:
        started = told = time.monotonic()
        live = self._live()
        given = spaces_given(live, self._header)
        encoded = [name for name in live.spaces if name not in given]
        yield ImportStarted(collection=self._name, format=self._form, encoded=encoded)
        totals = self._totals
        try:
            for batch in batches:
                self._store(batch)
                while self._under_way and (self._crowded() or self._under_way[0].job is None):
                    yield from self._settle()
                if time.monotonic() - told >= PROGRESS_S:
                    told = time.monotonic()
                    yield ImportProgress.model_validate(totals.values())
            while self._under_way:
                yield from self._settle()
        except Exception as error:
            if not isinstance(error, EngramError):
                log.exception("an import failed", collection=self._name)
                error = EngramError("the server met an error of its own; its log has the details")
            why = {"status": error.status, "code": error.code, "detail": error.detail}
            yield ImportFailed.model_validate(totals.values() | why)
            return
        ended = {"seconds": round(time.monotonic() - started, 3), "refusals": totals.refusals}
        yield ImportDone.model_validate(totals.values() | ended)

    def _live(self) -> LiveCollection:
        """The collection as it is now: its encoders may change on the way. Raises `CollectionNotFound`."""
        return self._resources.live_by_id(self._collection_id)

    def _crowded(self) -> bool:
        return sum(stretch.job is not None for stretch in self._under_way) > JOBS_UNDER_WAY

    def _settle(self) -> Iterator[Event]:
        """Wait for the first stretch under way, and count what became of it."""
        stretch = self._under_way.popleft()
        totals = self._totals
        if stretch.job is not None:
            while not stretch.ended(PROGRESS_S):
                yield ImportProgress.model_validate(totals.values())
            self._hear(stretch, stretch.job)
        for row in stretch.rows:
            id_, outcome = stretch.outcomes[row]
            totals.rows += 1
            if isinstance(outcome, EngramError):
                totals.refused += 1
                refusal = Refusal(row=row, id=id_, code=outcome.code, detail=outcome.detail)
                if len(totals.refusals) < REFUSALS_LISTED_MAX:
                    totals.refusals.append(refusal)
                yield refusal
            elif outcome == "stored":
                totals.stored += 1
            else:
                totals.updated += 1
        totals.durable_row = stretch.rows.stop - 1
        totals.version = max((v for v in (totals.version, stretch.version) if v is not None), default=None)

    def _hear(self, stretch: _Stretch, job: Accepted) -> None:
        """What became of a stretch's job, which has ended."""
        answer = reply(self._resources, job)
        if answer.operation_id is not None:
            raise Unavailable("the server is shutting down; what is under way goes on once it is back")
        for row, result in zip(stretch.queued, answer.results, strict=True):
            outcome: Outcome = result.status if result.error is None else as_error(result.error)
            stretch.outcomes[row] = (result.id, outcome)
        stretch.version = max((v for v in (stretch.version, answer.version) if v is not None), default=None)

    # --- storing ------------------------------------------------------------------------------------------------------

    def _store(self, batch: Batch) -> None:
        """Store what needs no encoding and send the rest on its way, stretch by stretch."""
        numbers = range(batch.first + self._options.offset, batch.first + self._options.offset + len(batch.rows))
        ids = [self._id(number, fields) for number, fields in zip(numbers, batch.rows, strict=True)]
        faults = _vector_faults(self._live(), batch.vectors)
        for start, stop in _stretches(ids):
            while True:
                stretch, live = _Stretch(numbers[start:stop]), self._live()
                try:
                    self._put(live, stretch, batch, start, ids, faults)
                    break
                except EncodersChanged:  # nothing of it was stored
                    self._resources.successor(live)
            self._under_way.append(stretch)

    def _put(
        self, live: LiveCollection, stretch: _Stretch, batch: Batch, start: int, ids: Sequence[str | EngramError],
        faults: Mapping[int, EngramError],
    ) -> None:  # fmt: skip
        given = spaces_given(live, self._header)
        ready: dict[int, Item] = {}
        for place, row in enumerate(stretch.rows, start):
            id_, fields = ids[place], batch.rows[place]
            try:
                if isinstance(id_, EngramError):
                    raise id_
                if isinstance(fields, EngramError):
                    raise fields
                vectors = {s: b.values[place] for s, b in batch.vectors.items() if s in given and b.has[place]}
                if place in faults:
                    raise faults[place]
                check_moment(fields.expires_at)
                item = checked(self._resources, live, id_, fields.text, fields.payload, vectors, fields.content)
                item.expires_at = fields.expires_at
                wanted = memory_wants(live, Parts(None, item.text, vectors), item.image is not None)
                live.require(wanted)
            except EngramError as error:
                stretch.outcomes[row] = (id_ if isinstance(id_, str) else None, error)
                continue
            (stretch.queued if wanted else ready)[row] = item
        if ready:
            self._wait_for({item.id for item in ready.values()})
            stretch.version, outcomes = self._commit(live, list(ready.values()))
            for (row, item), outcome in zip(ready.items(), outcomes, strict=True):
                stretch.outcomes[row] = (item.id, outcome)
        if stretch.queued:
            waiting = list(enumerate(stretch.queued.values()))
            job_id, done = enqueue(self._resources, live, waiting)
            results = [StoredItem(id=item.id, status="queued") for _, item in waiting]
            stretch.job = Accepted(None, results, job_id, done)
            for item in stretch.queued.values():  # they are in the job: what is here would be held twice
                item.image, item.vectors = None, {}

    def _commit(self, live: LiveCollection, items: Sequence[Item]) -> tuple[int | None, list[Outcome]]:
        live.imported_s = time.monotonic()
        hashes = keep_originals(self._resources, items)
        for hash_ in hashes:
            if hash_ is not None:
                self._resources.decoded.take(hash_)  # nobody else will come for it
        writes = [
            MemoryWrite(item.id, item.text, item.payload, hash_, item.media_type, item.vectors, item.expires_at)
            for item, hash_ in zip(items, hashes, strict=True)
        ]
        if live.config.duplicates == "warn":
            written = commit(self._resources, live, writes)
            return written.version, list(written.statuses)
        version, outcomes = commit_admitted(self._resources, live, writes)
        return version, [each if isinstance(each, Duplicate) else each[0] for each in outcomes]

    def _wait_for(self, ids: set[str]) -> None:
        """Until no job under way is to store one of these: the later row must be the later one there."""
        for stretch in self._under_way:
            if any(item.id in ids for item in stretch.queued.values()):
                stretch.ended()

    def _id(self, number: int, fields: Fields | EngramError) -> str | EngramError:
        """A row's own id, or one that it has again when it is sent again."""
        if isinstance(fields, EngramError):
            return fields
        if fields.id is not None:
            return fields.id
        if self._options.prefix is not None:
            return f"{self._options.prefix}{number}"
        if self._options.from_row > 1 or self._options.offset:
            return InvalidRequest(
                "a row without an id cannot be gone on with, since nothing says whether it is stored already: give "
                "rows ids, or the import a prefix for them"
            )
        return new_id()


def spaces_given(live: LiveCollection, header: Header) -> set[str]:
    """The spaces whose vectors are taken as they come: callers' own, and those of the very encoder that there is."""
    return {
        name
        for name, space in live.spaces.items()
        if space.encoder is None
        or (name in header.spaces and header.spaces[name].fingerprint == space.encoder.fingerprint)
    }


def _stretches(ids: Sequence[object]) -> Iterator[tuple[int, int]]:
    """Places from and to, so that no id is twice in a stretch."""
    start = 0
    seen: set[object] = set()
    for place, id_ in enumerate(ids):
        if id_ in seen:
            yield start, place
            start, seen = place, set()
        seen.add(id_)
    if start < len(ids):
        yield start, len(ids)


def _vector_faults(live: LiveCollection, vectors: Mapping[str, Block]) -> dict[int, EngramError]:
    """By place, why a vector is none. All are looked at together, and those that are suspicious one by one."""
    faults: dict[int, EngramError] = {}
    for name, block in vectors.items():
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.einsum("ij,ij->i", block.values, block.values)
            odd = ~np.isfinite(squares) | (squares == 0)
            if live.similarity != "cosine":
                odd |= np.abs(block.values).max(axis=1) > MAGNITUDE_MAX
            for place in np.flatnonzero(odd & block.has):
                try:
                    check_vector(block.values[place], name, live)
                except EngramError as error:
                    faults.setdefault(int(place), error)
    return faults


def as_error(problem: Problem) -> EngramError:
    return error_classes().get(problem.code, EngramError)(problem.detail)


class _Ended:
    """No more comes."""


@contextmanager
def _ahead(source: Iterator[T], count: int) -> Iterator[Iterator[T]]:
    """The same items, of which a thread fetches up to `count` before they are asked for."""
    fetched: Queue[T | _Ended | BaseException] = Queue(count)
    stopped = threading.Event()

    def put(item: T | _Ended | BaseException) -> None:
        while not stopped.is_set():
            try:
                fetched.put(item, timeout=0.1)
                return
            except Full:
                continue

    def fetch() -> None:
        try:
            for item in source:
                put(item)
                if stopped.is_set():
                    return
            put(_Ended())
        except BaseException as error:
            put(error)

    def items() -> Iterator[T]:
        while not isinstance(item := fetched.get(), _Ended):
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=fetch, name="import-reader", daemon=True)
    thread.start()
    try:
        yield items()
    finally:
        stopped.set()
        thread.join()  # before what it reads from is closed
