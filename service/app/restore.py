"""Restoring: a snapshot becomes a collection, beside the one there is, and takes its name in one step.

    read to its end ─▶ rows under a hidden name, originals to the blob folder ─▶ a bank of them ─▶ swap, as one

Rules:
- Nothing is restored before all of the file was read and is as it was written.
- Until the swap the former collection answers and is written to; what was written to it by then goes with it, as by
  deleting it. A recall holds the collection that it began with.
- The swap is one transaction (the names, and a note of it in the job) and, after its commit and before anybody is
  answered, one assignment. A crash before it leaves the former, and the job begins again; after it the new.
- A restore is a write. Its memories have versions that the name never had, and that are in the order of those in the
  snapshot where a calibration record or a re-encoding stands between: what had changed since has changed since.
- Fingerprints are compared as when a collection is loaded: a space of another encoder is marked, and says what to run.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import structlog
from pydantic import ValidationError

from service.app import collections
from service.app.collections import REENCODED_AT
from service.app.fields import faults
from service.app.live import LiveCollection
from service.app.resources import RESTORE_JOB, Resources
from service.app.schemas import CollectionConfig, Problem
from service.app.snapshot_content import Item, Original, read
from service.app.snapshot_schemas import RestoreRecord, RestoreRequest, SnapshotHead
from service.app.snapshots import BEAT_S, Paced, info, verify
from service.errors import CollectionNotEmpty, CollectionNotFound, EngramError, InvalidSnapshot
from service.storage.collection import HIDDEN
from service.storage.copies import GateRow, KernelRow, MemoryPart
from service.storage.jobs import Job
from service.storage.payload_indexes import PAYLOAD_INDEXES
from service.storage.snapshot_store import KeptFile

log = structlog.get_logger()

STAGING = f"{HIDDEN}restore-"  # before the job's id: the name of what is being restored
SWAPPED = "swapped"  # in a job's payload: its result, once it stands
CONFIG_KEYS = {"config", "fingerprints", REENCODED_AT, PAYLOAD_INDEXES}  # of a collection's row
ORIGINALS_AT_ONCE, ORIGINAL_BYTES_AT_ONCE = 64, 16 * 2**20  # a sync of the disk for each such lot


def enqueue_restore(resources: Resources, collection: str, id_: str, request: RestoreRequest) -> str:
    """Check a restore and commit its job; its id.

    Raises `SnapshotNotFound`, `InvalidSnapshot`, and `CollectionNotEmpty` where memories would be replaced.
    """
    info(resources.snapshots, resources.snapshots.find(collection, id_))
    into = request.into or collection
    try:
        there = resources.repository.get_collection(into)
    except CollectionNotFound:
        there = None
    if there is not None and there.count and not request.replace:
        raise CollectionNotEmpty(f"collection {into} holds memories: give another name, or replace: true")
    payload = {"collection": collection, "id": id_, "into": into, "replace": request.replace}
    return resources.enqueue(RESTORE_JOB, None if there is None else there.id, payload={"restore": payload})[0]


def target(job: Job) -> str | None:
    """The name that a restore's collection is going to have; None of another job."""
    asked = job.payload.get("restore")
    return None if asked is None else str(asked["into"])


def run_restore_job(resources: Resources, job: Job, beat: Callable[[float], None]) -> dict[str, Any]:
    """Raises `InvalidSnapshot`, `SnapshotDamaged`, `CollectionNotEmpty`; then nothing has changed."""
    if (done := job.payload.get(SWAPPED)) is not None:
        return dict(done)
    try:
        return _Restoring(resources, job, Paced(beat)).run(beat)
    except EngramError:
        remove_hidden(resources)
        raise


def remove_hidden(resources: Resources) -> None:
    """Remove what restores took the place of, and what those left that have ended."""
    found = resources.repository.hidden_collections()  # before the jobs: what one begins after them is not among these
    at_work = {STAGING + job_id for job_id in resources.repository.active_jobs(RESTORE_JOB)}
    for hidden in found:
        if hidden.name not in at_work:
            resources.repository.remove_hidden(hidden.id)


class _Restoring:
    """One job's work, step by step."""

    def __init__(self, resources: Resources, job: Job, beat: Paced) -> None:
        self._resources, self._repository = resources, resources.repository
        self._job, self._beat = job, beat
        asked = job.payload["restore"]
        self._into: str = asked["into"]
        self._replace: bool = asked["replace"]
        self._kept = resources.snapshots.find(asked["collection"], asked["id"])
        self._memories = self._originals = 0
        self._lot: list[bytes] = []
        self._began = time.monotonic()

    def run(self, beat: Callable[[float], None]) -> dict[str, Any]:
        store, bound = self._resources.snapshots, self._resources.settings.body_bytes_max
        verify(store, self._kept, bound, lambda share: self._beat(0.3 * share))
        said = info(self._resources.snapshots, self._kept)
        staged = self._stage()
        live = self._load(staged)
        problems = {
            name: Problem(code=fault.code, detail=fault.detail)
            for name, space in live.spaces.items()
            if (fault := space.fault) is not None
        }
        record = RestoreRecord(
            collection=self._into, snapshot=self._kept.id, memories=self._memories, originals=self._originals,
            originals_missing=said.originals_missing, problems=problems,
            seconds=round(time.monotonic() - self._began, 1),
        )  # fmt: skip
        beat(1.0)  # the last look at whether the job is still wanted
        done = self._repository.swap_staged(
            staged, self._into, self._replace, (self._job.id, SWAPPED), record.model_dump(mode="json"),
            lambda done: self._take_over(live, done["version"]),
        )  # fmt: skip
        remove_hidden(self._resources)
        self._resources.after_write(live)
        return done

    def _stage(self) -> int:
        """Bring the rows and the originals in; the number of the hidden collection."""
        file = KeptFile(self._resources.snapshots, self._kept)
        items = read(file, self._resources.settings.body_bytes_max)
        head = next(items)
        assert isinstance(head, SnapshotHead)
        config = _config(head)
        learned: list[KernelRow] = []
        gates: list[GateRow] = []
        following: Item | None = None
        for following in items:
            if isinstance(following, KernelRow):
                learned.append(following)
            elif isinstance(following, GateRow):
                gates.append(following)
            else:
                break
        else:
            following = None
        renumbered = _Versions(head, config, gates)
        base = self._repository.reserve_versions(self._into, renumbered.count, head.version, self._follow)
        renumbered.base = base
        row = renumbered.config(config)
        staged = self._repository.stage_collection(
            STAGING + self._job.id, row, head.generation, base + renumbered.count, head.created_at
        )
        self._repository.stage_learned(staged, learned, [renumbered.gate(gate) for gate in gates])
        while following is not None:
            self._bring(staged, following, renumbered)
            self._beat(0.3 + 0.5 * file.at / max(1, self._kept.size_bytes))
            following = next(items, None)
        self._put_lot()
        return staged

    def _bring(self, staged: int, item: Item, renumbered: _Versions) -> None:
        if isinstance(item, MemoryPart):
            moved = [replace(memory, version=renumbered.of(memory.version)) for memory in item.memories]
            self._repository.stage_memories(staged, MemoryPart(moved, item.vectors))
            self._memories += len(moved)
        elif isinstance(item, Original):
            self._lot.append(item.content)
            if len(self._lot) == ORIGINALS_AT_ONCE or sum(map(len, self._lot)) > ORIGINAL_BYTES_AT_ONCE:
                self._put_lot()

    def _put_lot(self) -> None:
        # After the memories that name them, so none is removed for want of a name.
        self._resources.blobs.put_many(self._lot)
        self._originals += len(self._lot)
        self._lot = []

    def _load(self, staged: int) -> LiveCollection:
        """The staged collection in memory, under the name that it is going to have."""
        row = next(each for each in self._repository.hidden_collections() if each.id == staged)
        with ThreadPoolExecutor(1, thread_name_prefix="restore") as loader:
            loading = loader.submit(collections.load, self._resources, replace(row, name=self._into))
            while not wait([loading], BEAT_S).done:  # a lease is shorter than the loading of a large bank
                self._beat(0.9)
        try:
            live = loading.result()
        except EngramError:
            raise
        except Exception as error:
            log.warning("a snapshot could not be loaded", snapshot=self._kept.id, exc_info=error)
            raise InvalidSnapshot("its patterns or what was learned of them do not fit its configuration") from None
        return live

    def _follow(self, version: int) -> None:
        if (former := self._resources.lives.get(self._into)) is not None:
            former.follow(None, [], version)

    def _take_over(self, live: LiveCollection, version: int) -> None:
        """Let it answer, from now on, under its name. Called by storage."""
        former = self._resources.lives.get(self._into)
        live.bank.write(None, [], version)
        self._resources.broken.pop(self._into, None)
        self._resources.add(live)
        if former is not None and former.id != live.id:  # else whoever follows the database was first to load it
            self._resources.remove(former)


class _Versions:
    """The versions of a snapshot, brought to the few numbers above `base` that keep their order where it matters:
    before and after each calibration record, and the last change of an encoder.
    """

    def __init__(self, head: SnapshotHead, config: dict[str, Any], gates: Sequence[GateRow]) -> None:
        told = [config[REENCODED_AT]] if REENCODED_AT in config else []
        told += [record["version"] for gate in gates for record in _records(gate.record)]
        if any(not isinstance(number, int) or not 0 <= number <= head.version for number in told):
            raise InvalidSnapshot("a calibration record, or a re-encoding, is of a version above its own")
        self._marks = sorted(set(told))
        self.count = len(self._marks) + 1
        self.base = 0

    def of(self, version: int) -> int:
        return self.base + 1 + bisect_left(self._marks, version)

    def gate(self, gate: GateRow) -> GateRow:
        moved = dict(gate.record)
        for name, record in moved.items():
            if isinstance(record, dict) and "version" in record:
                moved[name] = {**record, "version": self.of(record["version"])}
        if "version" in moved:
            moved["version"] = self.of(moved["version"])
        return replace(gate, record=moved)

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        moved = {REENCODED_AT: self.of(config[REENCODED_AT])} if REENCODED_AT in config else {}
        return {**config, **moved}


def _records(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The calibration records of a row: of a gate itself, and of a route within."""
    yield from (part for part in (record, *record.values()) if isinstance(part, dict) and "version" in part)


def _config(head: SnapshotHead) -> dict[str, Any]:
    """The collection's row, checked. Raises `InvalidSnapshot`."""
    if not head.config.keys() <= CONFIG_KEYS or not isinstance(head.config.get("fingerprints"), dict):
        raise InvalidSnapshot("its configuration is none that this version knows")
    keys = head.config.get(PAYLOAD_INDEXES, [])
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InvalidSnapshot("its payload indexes are no list of keys")
    try:
        config = CollectionConfig.model_validate(head.config.get("config"))
    except ValidationError as error:
        raise InvalidSnapshot(f"its configuration is none that this version knows: {faults(error)}") from None
    given = {name: space.dimension for name, space in config.spaces.items()}
    if given.keys() != head.spaces.keys() or any(given[n] not in (None, head.spaces[n]) for n in given):
        raise InvalidSnapshot("its spaces are not those of its configuration")
    return head.config
