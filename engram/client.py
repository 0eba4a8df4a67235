"""The client: collections, stored and recalled, over HTTP or in process.

Rules:
- A method is a signature and its documentation; what it does is in `asking`. `python -m engram.awaited` makes the same
  of it for `AsyncClient`.
- Both ways give the same replies and raise the same errors; only `Client(...)` differs.
- An image is a path, the file's bytes, a Pillow image of any mode, or a uint8 or boolean array of
  (height, width[, channels]).
- A mask is an image, white (or True) where the cue's image is missing.
- A batch reports per item: a picture that cannot be read does not stop the others from being stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from engram import snapshots
from engram.asking import BATCH, KEPT, PAGE, RETRIES, Asking, CollectionAsking, Options, given
from engram.replies import (
    ApiKey,
    CollectionInfo,
    EncoderInfo,
    Memory,
    NewKey,
    Operation,
    Problem,
    Recall,
    StoreReply,
    Updated,
)
from engram.reports import Diagnostics, Sizing
from engram.snapshots import Restored, Snapshot, SnapshotSchedule
from engram.steps import Steps, run
from engram.transfer import (
    Imported,
    Progress,
    Refusal,
    close_export,
    export,
    export_options,
    import_rows,
    open_export,
    take_export,
)
from engram.transport import Body, Transport, open_transport

if TYPE_CHECKING:
    from engram.pictures import ImageLike

T = TypeVar("T")
A = TypeVar("A", bound=Asking)


class _Caller(Generic[A]):
    def __init__(self, asking: A, transport: Transport) -> None:
        self._asking = asking
        self._transport = transport

    def with_options(
        self, *, timeout_s: float | None = None, retries: int | None = None, read_your_writes: bool | None = None
    ) -> Self:
        """The same over the same connection, with these changed (see `Client`). For one call:
        `photos.with_options(timeout_s=2).recall(...)`.
        """
        changed = copy(self)
        changed._asking = self._asking.but(timeout_s=timeout_s, retries=retries, read_your_writes=read_your_writes)
        return changed

    def _do(self, steps: Steps[T]) -> T:
        return run(steps, self._transport)


class Client(_Caller[Asking]):
    """`Client()` talks to a server, over gRPC by `grpc://host:port`; `Client(path="./memories")` runs the same engine
    in this process, on that folder.
    Raises `FolderInUse`, naming the owner's pid and address, when another process owns the folder.

    timeout_s: how long an answer is waited for (`TimedOut`); the engine in this process is not cut off.
    retries: how often a call is asked again that was refused for now (429, 502, 503) or whose connection was refused or
    broke; after a pause of growing length, drawn at random, and not before the server's Retry-After; for at most a
    minute in all. Only what is safe to repeat: reads, and stores and updates, each of which has a key under which it
    is done once. A server that never answered this client is not waited for.
    read_your_writes: reads ask for the last version of the collection that this client has seen.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        path: str | Path | None = None,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = RETRIES,
        read_your_writes: bool = True,
    ) -> None:
        asking = Asking(Options(timeout_s, retries, read_your_writes))
        self.in_process = path is not None
        super().__init__(asking, open_transport(url, path, api_key))

    def create_collection(self, name: str, spaces: Mapping[str, Any] | None = None, **config: Any) -> Collection:
        """Make a collection. `spaces` absent: the default ones; `config`: the API's `corruptions`, `recall`, `gate`,
        `duplicates`.
        """
        self._do(self._asking.create_collection(name, given(spaces=spaces, **config)))
        return self.collection(name)

    def collection(self, name: str) -> Collection:
        """A handle; nothing is asked of the engine until it is used."""
        return Collection(self._asking.collection(name), self._transport)

    def collections(self) -> list[CollectionInfo]:
        return self._do(self._asking.collections())

    def encoders(self) -> list[EncoderInfo]:
        """The encoders there are, and whether their weights are where the engine runs."""
        return self._do(self._asking.encoders())

    def delete_collection(self, name: str) -> None:
        self._do(self._asking.delete_collection(name))

    def restore(self, path: str | Path, into: str | None = None, *, replace: bool = False) -> Restored:
        """Make a collection of a snapshot's file; None: under the name of the one it was made of. It stays among that
        collection's snapshots. Raises as `Collection.upload_snapshot` and `Collection.restore`.
        """
        return self._do(snapshots.restore_file(self._asking, Path(path), into, replace))

    def operations(self) -> list[Operation]:
        """The last hundred, the newest first."""
        return self._do(self._asking.operations())

    def operation(self, operation_id: str) -> Operation:
        return self._do(self._asking.operation(operation_id))

    def retry(self, operation_id: str) -> Operation:
        """Queue an operation again that failed, died or was cancelled; what it has done stays done. Raises `Conflict`
        where it did not, or what it had to do is gone.
        """
        return self._do(self._asking.retry(operation_id))

    def cancel(self, operation_id: str) -> Operation:
        """End an operation that is queued or running; what it has done so far is kept. Raises `Conflict`."""
        return self._do(self._asking.cancel(operation_id))

    def create_key(
        self,
        name: str,
        scopes: Mapping[str, str],
        *,
        expires_at: datetime | None = None,
        rate_limit: str | None = None,
        concurrent_max: int | None = None,
    ) -> NewKey:
        """Make an API key; its `key` is in this reply and nowhere else. `scopes`: read, write or admin by collection,
        beginning of names (`photos-*`) or `*`. Raises `AdminKeyNeeded` where it would be the first one and is not
        admin on `*`.
        """
        limits = given(expires_at=expires_at, rate_limit=rate_limit, concurrent_max=concurrent_max)
        return self._do(self._asking.create_key(name, scopes, limits))

    def keys(self) -> list[ApiKey]:
        """The API keys that were made, revoked ones among them."""
        return self._do(self._asking.keys())

    def revoke_key(self, key_id: str) -> None:
        """Refuse a key from now on. Raises `KeyNotFound`, and `AdminKeyNeeded` where it is the last that may make
        keys.
        """
        self._do(self._asking.revoke_key(key_id))

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Collection(_Caller[CollectionAsking]):
    """One collection of a client; made by `Client.collection`."""

    def __init__(self, asking: CollectionAsking, transport: Transport) -> None:
        super().__init__(asking, transport)
        self.name = asking.name

    def store(
        self,
        memories: Iterable[Mapping[str, Any]],
        *,
        batch: int = BATCH,
        wait: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> StoreReply:
        """Store memories: `{"id"?, "image"?, "text"?, "vectors"?, "payload"?, "expires_at"?, "if_version"?}`; an id
        stored again is replaced. `expires_at` is a `datetime` with a zone, or its text; `if_version` the version that
        the memory must be at (0: there must be none), else its result is the error `precondition_failed`.

        Sent in requests of `batch` memories, a few of which are under way at once; `progress` is called with the number
        of memories of each request, in their order, once it is answered. With `wait` a memory is recallable when its
        result is there; one still being encoded after the client's `timeout_s` is "queued", and its operation is in
        the reply.
        """
        return self._do(self._asking.store(memories, batch, wait, progress))

    def recall(
        self,
        text: str | None = None,
        image: ImageLike | None = None,
        mask: ImageLike | None = None,
        vectors: Mapping[str, Any] | None = None,
        *,
        id: str | None = None,
        **options: Any,
    ) -> Recall:
        """Recall by any of a text, an image and vectors, or (`id`) more like a stored memory; `options` as in the API
        (`limit`, `group_by`, `beta`, `reconstruct`).
        """
        cue = {"text": text, "image": image, "mask": mask, "vectors": vectors, "id": id}
        return self._do(self._asking.recall(cue, options))

    def recall_batch(self, cues: Iterable[Mapping[str, Any]], **options: Any) -> list[Recall]:
        """Recall by several cues, each `{"text"?, "image"?, "mask"?, "vectors"?}` or `{"id"}`, in one request; answers
        in order.
        """
        return self._do(self._asking.recall_batch(cues, options))

    def train(
        self,
        what: str = "gate",
        *,
        cues: Iterable[Mapping[str, Any]] | None = None,
        negatives: Iterable[Mapping[str, Any]] | None = None,
        target_tpr: float | None = None,
        **options: Any,
    ) -> Operation:
        """Calibrate the gate again, or train a kernel (`what="kernel"`): an operation, and `Client.operation` says how
        far it is. `options`: a kernel's, as in the API (`space`, `objective`, `time_limit_s`).

        cues: known cues, `{"id": their memory's, "text"?, "image"?, "mask"?, "vectors"?}`; they set the thresholds of
        the modalities they fill. negatives: cues of what was never stored. None keeps what was supplied, an empty
        list forgets it.
        """
        return self._do(self._asking.train(what, cues, negatives, given(target_tpr=target_tpr, **options)))

    def reencode(
        self,
        space: str,
        encoder: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        drop_without_original: bool = False,
        wait: bool = True,
    ) -> Operation:
        """Encode a space again from the kept originals, by another encoder or (None) by the configured one as it is
        now. Until it ends, recalls and stores go by the former.

        With `wait` it has ended at return, and its failure raises: `OriginalsMissing` where originals cannot be read,
        unless `drop_without_original` lets their memories lose the space.
        """
        body = given(encoder=encoder, options=options and dict(options), drop_without_original=drop_without_original)
        return self._do(self._asking.reencode(space, body, wait))

    def update(
        self,
        memory_id: str,
        *,
        payload: Mapping[str, Any] | None = KEPT,
        replace_payload: bool = False,
        text: str | None = KEPT,
        image: ImageLike | None = KEPT,
        vectors: Mapping[str, Any] = KEPT,
        expires_at: datetime | str | None = KEPT,
        if_version: int | None = None,
    ) -> Updated:
        """Change a memory in part: what is not named stays, and None removes. Only the spaces that a changed part fills
        are encoded again.

        `payload` is merged into what there is, a key's None removing the key (RFC 7396); with `replace_payload` it is
        all of it. A None among `vectors` takes the memory out of that space. `if_version`: only if the memory is at
        this version, else `PreconditionFailed`. Raises `MemoryNotFound`.
        """
        changes = {"payload": payload, "text": text, "image": image, "vectors": vectors, "expires_at": expires_at}
        options = given(payload_mode="replace" if replace_payload else None, if_version=if_version)
        return self._do(self._asking.update(memory_id, changes, options))

    def get(self, memory_id: str, *, min_version: int | None = None) -> Memory:
        """Raises `MemoryNotFound`. `min_version`: of what was written up to it at least; `VersionNotReached` where the
        collection has not come to it.
        """
        return self._do(self._asking.get(memory_id, min_version))

    def get_many(self, ids: Iterable[str], *, min_version: int | None = None) -> list[Memory]:
        """Those of `ids` that exist, in the order asked for. `min_version` as in `get`."""
        return self._do(self._asking.get_many(ids, min_version))

    def scroll(
        self, filter: Mapping[str, Any] | None = None, *, batch: int = PAGE, min_version: int | None = None
    ) -> Iterator[Memory]:
        """Every memory, or those that a filter keeps, in the order in which they were first stored.

        Asked for `batch` at a time, while the iterator is read. `min_version` as in `get`.
        """
        request: Body | None = given(filter=filter, limit=batch, min_version=min_version)
        while request is not None:
            memories, request = self._do(self._asking.page(request))
            yield from memories

    def content(self, memory_id: str) -> bytes:
        """The stored original, byte for byte."""
        return self._do(self._asking.content(memory_id))

    def import_rows(
        self,
        source: str | Path | Iterable[Mapping[str, Any]],
        *,
        from_row: int = 1,
        progress: Callable[[Progress], None] | None = None,
        refused: Callable[[Refusal], None] | None = None,
    ) -> Imported:
        """Store a file of rows (NDJSON, Parquet, Arrow, Feather, by its ending), or memories
        `{"id"?, "text"?, "payload"?, "vectors"?, "content"?: an original's bytes, "expires_at"?}`, any number of them.

        Sent in parts of some megabytes, each durable once it is answered, and asked again as reads are: rows that are
        sent twice are stored once. `from_row`: pass over the rows of a file before this one. Vectors of a space that an
        encoder fills are taken where the file says that the same encoder made them. Raises as the API does.
        """
        return self._do(import_rows(self._asking, source, from_row, progress, refused))

    def export(
        self,
        path: str | Path,
        *,
        format: str | None = None,
        vectors: bool = True,
        content: bool = False,
        filter: Mapping[str, Any] | None = None,
    ) -> int:
        """Write every memory, or those that a filter keeps, to a file of NDJSON, Parquet or Arrow, by its ending or by
        `format`, as they are at one moment; its size. `content`: with the originals. Raises `NotWritable`.

        Imported into an empty collection it is the same memories.
        """
        return self._do(export(self._asking, Path(path), format, export_options(vectors, content, filter)))

    def iter_export(
        self,
        format: str = "ndjson",
        *,
        vectors: bool = True,
        content: bool = False,
        filter: Mapping[str, Any] | None = None,
    ) -> Iterator[bytes]:
        """What `export` writes, chunk by chunk."""
        options = given(format=format, **export_options(vectors, content, filter))
        chunks = self._do(open_export(self._asking, options))
        try:
            while (chunk := self._do(take_export(chunks))) is not None:
                yield chunk
        finally:
            self._do(close_export(chunks))

    def delete(
        self,
        ids: str | Sequence[str] | None = None,
        *,
        filter: Mapping[str, Any] | None = None,
        dry_run: bool = False,
        if_version: int | None = None,
    ) -> list[str]:
        """Forget memories, by their ids or all that a filter keeps; the ids that were there, the first 10,000 of them.

        `dry_run`: say which it would be, and forget nothing. `if_version`: of one id, only if its memory is at this
        version, else `PreconditionFailed`.
        """
        deleted: list[str] = self._do(self._asking.delete(ids, filter, dry_run, if_version))
        return deleted

    def count(self, filter: Mapping[str, Any] | None = None, *, min_version: int | None = None) -> int:
        """How many memories there are, or a filter keeps. `min_version` as in `get`."""
        return self._do(self._asking.count(filter, min_version))

    def snapshot(self) -> Snapshot:
        """Make a snapshot of the collection as it is, and wait for it. Raises `Conflict` while another one is made."""
        return self._do(snapshots.create(self._asking))

    def start_snapshot(self) -> Operation:
        """As `snapshot`, without waiting: see `Client.operation` for how far it is."""
        return self._do(snapshots.begin(self._asking))

    def snapshots(self) -> list[Snapshot]:
        """Those that are kept, the oldest first, whether the collection is still there or not; but damaged ones."""
        return self._do(snapshots.listed(self._asking))

    def damaged_snapshots(self) -> dict[str, Problem]:
        """Those that cannot be read, by their names, with why."""
        return self._do(snapshots.damaged(self._asking))

    def snapshot_info(self, snapshot_id: str) -> Snapshot:
        """Raises `SnapshotNotFound`."""
        return self._do(snapshots.info(self._asking, snapshot_id))

    def download_snapshot(
        self, snapshot_id: str, path: str | Path, *, progress: Callable[[int], None] | None = None
    ) -> Path:
        """Write one to a file, or into a folder under its own name; `progress` is given the bytes so far.

        Raises `SnapshotNotFound`, `SnapshotDamaged` where what came is not what was kept, `NotWritable`.
        """
        return self._do(snapshots.download(self._asking, snapshot_id, Path(path), progress))

    def upload_snapshot(
        self, path: str | Path, snapshot_id: str | None = None, *, progress: Callable[[int], None] | None = None
    ) -> Snapshot:
        """Bring a snapshot's file to where the collection's are kept; None: under the name that its file suggests.

        Raises `InvalidSnapshot`, `SnapshotDamaged`, `SnapshotExists`.
        """
        return self._do(snapshots.upload(self._asking, Path(path), snapshot_id, progress))

    def delete_snapshot(self, snapshot_id: str) -> None:
        """Raises `SnapshotNotFound`."""
        self._do(snapshots.delete(self._asking, snapshot_id))

    def restore(self, snapshot_id: str, into: str | None = None, *, replace: bool = False) -> Restored:
        """Make a collection of a snapshot, here or under another name, and wait for it.

        `replace`: it may take the place of a collection that holds memories (`CollectionNotEmpty`). Until it ends, that
        one answers. Raises `InvalidSnapshot`, `SnapshotDamaged`; then nothing has changed.
        """
        return self._do(snapshots.restore(self._asking, snapshot_id, into, replace))

    def start_restore(self, snapshot_id: str, into: str | None = None, *, replace: bool = False) -> Operation:
        """As `restore`, without waiting."""
        return self._do(snapshots.begin_restore(self._asking, snapshot_id, into, replace))

    def schedule_snapshots(self, every_s: int, keep: int = 7) -> SnapshotSchedule:
        """Have a snapshot made every so many seconds (60 at least), the first one at once; of these the newest `keep`
        are kept, and no other snapshot is ever removed.
        """
        return self._do(snapshots.put_schedule(self._asking, every_s, keep))

    def snapshot_schedule(self) -> SnapshotSchedule:
        """When the last was made, or why not, and when the next is due. Raises `ScheduleNotFound`."""
        return self._do(snapshots.schedule(self._asking))

    def unschedule_snapshots(self) -> None:
        """None are made at set times any more; what was made stays."""
        self._do(snapshots.delete_schedule(self._asking))

    def info(self) -> CollectionInfo:
        return self._do(self._asking.info())

    def payload_indexes(self) -> list[dict[str, Any]]:
        """The indexed keys of payloads, with how many memories have each and the bytes it takes in memory."""
        indexes: list[dict[str, Any]] = self._do(self._asking.payload_indexes())
        return indexes

    def create_payload_index(self, key: str) -> dict[str, Any]:
        """Index a payload's key, written as in filters, unless it is."""
        index: dict[str, Any] = self._do(self._asking.create_payload_index(key))
        return index

    def delete_payload_index(self, key: str) -> None:
        self._do(self._asking.delete_payload_index(key))

    def kernels(self) -> list[dict[str, Any]]:
        """The kernels that were trained, with their training records."""
        kernels: list[dict[str, Any]] = self._do(self._asking.kernels())
        return kernels

    def retire_kernel(self, kernel_id: str) -> None:
        """Go on without a kernel that is in use."""
        self._do(self._asking.retire_kernel(kernel_id))

    def diagnostics(self) -> Diagnostics:
        """Margins, fixed points, rank, capacity, near-duplicates, β and memory: how well its memories are told apart.

        Takes seconds for a large collection.
        """
        return self._do(self._asking.diagnostics())

    def sizing(
        self,
        memories: int,
        *,
        spaces: Mapping[str, int] | None = None,
        payload_bytes: float | None = None,
        text_bytes: float | None = None,
        image_bytes: float | None = None,
    ) -> Sizing:
        """What so many memories would need, before they are stored. What is not given (`spaces`: values by name; mean
        sizes) is as the collection has it.
        """
        body = given(spaces=spaces, payload_bytes=payload_bytes, text_bytes=text_bytes, image_bytes=image_bytes)
        return self._do(self._asking.sizing({"memories": memories, **body}))

    def wait_until_calibrated(self, timeout_s: float = 300.0) -> CollectionInfo:
        """Wait until the automatic calibration covers what is stored.

        Raises `Unavailable` after `timeout_s`, and at once why a space's encoder cannot be used: none before.
        """
        return self._do(self._asking.wait_until_calibrated(timeout_s))
