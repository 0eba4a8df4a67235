"""What the snapshots' methods of a client ask for, step by step.

Rules:
- A file is written beside its place, checked, synced and renamed: what has a snapshot's name here is a whole one.
- A snapshot and a restore are operations; they have ended at return, and what they failed by is raised.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import orjson

from engram.asking import POLL_S, Asking, CollectionAsking, given
from engram.replies import Operation, Parts, Problem, Reply
from engram.steps import Fetch, Pause, Send, Steps, Work
from service.errors import NotFound, NotWritable, SnapshotDamaged
from service.storage.snapshot_file import BLOCK, HEAD_BYTES_MAX, TAIL_BYTES, head_size, read_tail

PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Snapshot(Reply):
    """`sha256` is of all of the file but its last 2,048 bytes; `spaces`: each space's encoder, as a fingerprint."""

    id: str
    collection: str
    size_bytes: int
    sha256: str
    made_of: str
    version: int
    made_at: str
    memories: int
    originals: int
    originals_missing: int
    spaces: dict[str, str | None]


@dataclass(frozen=True)
class Restored(Reply):
    """What a restore did. `problems`: by space, why its encoder cannot be used there, and what to run."""

    collection: str
    snapshot: str
    memories: int
    originals: int
    originals_missing: int
    problems: dict[str, dict[str, str]]
    seconds: float
    version: int


@dataclass(frozen=True)
class SnapshotSchedule(Reply):
    """One is made every `every_s` seconds, next at `next_at`; the newest `keep` of these are kept. `snapshot`: the last
    of them; `operation`: of the one under way; `error`: of the last that was tried, if it failed.
    """

    PARTS: ClassVar[Parts] = {"error": Problem}

    every_s: int
    keep: int
    next_at: str
    operation: str | None
    snapshot: str | None
    made_at: str | None
    failed_at: str | None
    error: Problem | None


def put_schedule(asking: CollectionAsking, every_s: int, keep: int) -> Steps[SnapshotSchedule]:
    return SnapshotSchedule.of((yield from asking.here("put_snapshot_schedule", given(every_s=every_s, keep=keep))))


def schedule(asking: CollectionAsking) -> Steps[SnapshotSchedule]:
    return SnapshotSchedule.of((yield from asking.here("get_snapshot_schedule")))


def delete_schedule(asking: CollectionAsking) -> Steps[None]:
    yield from asking.here("delete_snapshot_schedule")


def create(asking: CollectionAsking) -> Steps[Snapshot]:
    operation = yield from begin(asking)
    done = yield from ended(asking, operation)
    return Snapshot.of(done.result or {})


def begin(asking: CollectionAsking) -> Steps[Operation]:
    """As `create`, without waiting."""
    return Operation.of((yield from asking.here("create_snapshot")))


def listed(asking: CollectionAsking) -> Steps[list[Snapshot]]:
    reply = yield from asking.here("list_snapshots")
    return [Snapshot.of(body) for body in reply["snapshots"]]


def damaged(asking: CollectionAsking) -> Steps[dict[str, Problem]]:
    reply = yield from asking.here("list_snapshots")
    return {id_: Problem.of(why) for id_, why in reply["damaged"].items()}


def info(asking: CollectionAsking, snapshot_id: str) -> Steps[Snapshot]:
    return Snapshot.of((yield from asking.here("get_snapshot", snapshot=snapshot_id)))


def delete(asking: CollectionAsking, snapshot_id: str) -> Steps[None]:
    yield from asking.here("delete_snapshot", snapshot=snapshot_id)


def restore(asking: CollectionAsking, snapshot_id: str, into: str | None, replace: bool) -> Steps[Restored]:
    operation = yield from begin_restore(asking, snapshot_id, into, replace)
    done = yield from ended(asking, operation)
    return Restored.of(done.result or {})


def begin_restore(asking: CollectionAsking, snapshot_id: str, into: str | None, replace: bool) -> Steps[Operation]:
    """As `restore`, without waiting."""
    request = given(into=into, replace=replace)
    return Operation.of((yield from asking.here("restore_snapshot", request, snapshot=snapshot_id)))


def restore_file(asking: Asking, path: Path, into: str | None, replace: bool) -> Steps[Restored]:
    name = into or (yield Work(partial(collection_of, path)))
    target = asking.collection(name)
    kept = yield from upload(target, path, None, None)
    return (yield from restore(target, kept.id, None, replace))


def download(
    asking: CollectionAsking, snapshot_id: str, path: Path, progress: Callable[[int], None] | None
) -> Steps[Path]:
    target = path / f"{asking.name}-{snapshot_id}.tar" if path.is_dir() else path
    near = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    size = 0

    def write(piece: bytes) -> None:
        nonlocal size
        file.write(piece)
        size += len(piece)
        if progress is not None:
            progress(size)

    def finish() -> None:
        file.flush()
        os.fsync(file.fileno())
        _check_whole(file)
        near.rename(target)

    try:
        with open(near, "xb+") as file:
            yield Fetch(asking.name, snapshot_id, write)
            yield Work(finish)
    except OSError as error:
        raise NotWritable(f"{target}: {error.strerror or error}") from None
    finally:
        near.unlink(missing_ok=True)
    return target


def upload(
    asking: CollectionAsking, path: Path, snapshot_id: str | None, progress: Callable[[int], None] | None
) -> Steps[Snapshot]:
    try:
        with open(path, "rb") as file:
            id_ = snapshot_id or _suggested(path, asking.name)
            return Snapshot.of((yield Send(asking.name, id_, _pieces(file, progress))))
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror or error}") from None


def ended(asking: Asking, operation: Operation) -> Steps[Operation]:
    """An operation that has ended. Raises why it failed."""
    while operation.status in ("queued", "running"):
        yield Pause(POLL_S)
        operation = yield from asking.operation(operation.id)
    operation.check()
    return operation


def collection_of(path: Path) -> str:
    """The collection that a snapshot's file was made of. Raises `InvalidSnapshot`, `NotFound`."""
    try:
        with open(path, "rb") as file:
            size = head_size(file.read(BLOCK))
            head: Mapping[str, Any] = orjson.loads(file.read(min(size, HEAD_BYTES_MAX)))
            return str(head["collection"])
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise SnapshotDamaged(f"{path} does not say what it was made of") from None


def _pieces(file: BinaryIO, progress: Callable[[int], None] | None) -> Iterator[bytes]:
    size = 0
    while piece := file.read(PIECE_BYTES):
        yield piece
        size += len(piece)
        if progress is not None:
            progress(size)


def _check_whole(file: BinaryIO) -> None:
    """Raises `SnapshotDamaged` unless the file is as long as it was and has the sum that it says."""
    size = file.seek(0, 2) - TAIL_BYTES
    if size < 0:
        raise SnapshotDamaged("what came is cut short")
    file.seek(size)
    said = read_tail(file.read(TAIL_BYTES)).sha256
    file.seek(0)
    found = hashlib.sha256()
    while size:
        piece = file.read(min(size, PIECE_BYTES))
        found.update(piece)
        size -= len(piece)
    if found.hexdigest() != said:
        raise SnapshotDamaged("what came is not what was kept: its sha-256 differs")


def _suggested(path: Path, collection: str) -> str:
    """A name for a file's snapshot: its own, without what `download` put before it."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem.removeprefix(f"{collection}-"))[:128].lstrip("_.-")
    return name or uuid.uuid4().hex
