"""Where snapshots are kept: a folder, or a bucket of an S3-compatible store.

    <collection>/<snapshot>.tar            .quarantine/<collection>/<snapshot>.tar

Rules:
- A snapshot is there whole or not at all: it is written to a file of its own first (`workspace`), synced, and given its
  name by a rename, or by one upload.
- It is read by ranges: no request lasts as long as a download.
- Names are those of collections and snapshots, which hold no slash and do not begin with a dot.
- Errors of the store's client are translated here and nowhere else.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import parse_qs, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from service.errors import InvalidSettings, SnapshotExists, SnapshotNotFound, StorageUnavailable
from service.storage.disk import make_folder, os_errors, sync_folder

ENDING = ".tar"
QUARANTINE = ".quarantine"
WORKSPACE = ".tmp"

RANGE_BYTES = 8 * 2**20
"""Read at once: large enough that a bucket's latency is small beside it, small enough to hold for several readers."""

S3_URL = "s3://bucket/prefix?endpoint=https://host:port&region=name"

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class Kept:
    """A snapshot in a store."""

    collection: str
    id: str
    size_bytes: int
    modified_at: datetime


class SnapshotStore(Protocol):
    """Methods raise `SnapshotNotFound` for a snapshot that is not there, and `StorageUnavailable`, `StorageFull`."""

    def list(self, collection: str | None = None) -> list[Kept]:
        """Of one collection or of all, in the order of their names."""

    def find(self, collection: str, id_: str) -> Kept: ...

    def read(self, kept: Kept, start: int, size: int) -> bytes:
        """`size` bytes from `start`, fewer at the end."""

    def put(self, collection: str, id_: str, file: Path) -> None:
        """Keep a file of the workspace, which it takes away. Raises `SnapshotExists`."""

    def delete(self, collection: str, id_: str) -> None: ...

    def quarantine(self, collection: str, id_: str) -> str:
        """Move a snapshot out of the way; where it is then."""


class FolderStore:
    def __init__(self, root: Path) -> None:
        self._root = root

    def list(self, collection: str | None = None) -> list[Kept]:
        with os_errors(f"The snapshots in {self._root} cannot be listed"):
            if collection is not None:
                folders = [self._root / _part(collection)]
            elif self._root.is_dir():
                folders = sorted(folder for folder in self._root.iterdir() if _PART.fullmatch(folder.name))
            else:
                folders = []
            files = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
            return [_kept_file(file) for file in files if file.suffix == ENDING and _PART.fullmatch(file.stem)]

    def find(self, collection: str, id_: str) -> Kept:
        with os_errors(f"The snapshot {id_} cannot be read"):
            try:
                return _kept_file(self._path(collection, id_))
            except FileNotFoundError:
                raise _missing(collection, id_) from None

    def read(self, kept: Kept, start: int, size: int) -> bytes:
        with os_errors(f"The snapshot {kept.id} cannot be read"):
            try:
                with open(self._path(kept.collection, kept.id), "rb") as file:
                    file.seek(start)
                    return file.read(size)
            except FileNotFoundError:
                raise _missing(kept.collection, kept.id) from None

    def put(self, collection: str, id_: str, file: Path) -> None:
        path = self._path(collection, id_)
        with os_errors(f"The snapshot {id_} cannot be kept"):
            make_folder(path.parent)
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
            if file.stat().st_dev != path.parent.stat().st_dev:  # the folder is on another disk than the workspace
                near = path.parent / f".{uuid.uuid4().hex}"
                with open(file, "rb") as source, open(near, "xb") as target:
                    shutil.copyfileobj(source, target, RANGE_BYTES)
                    target.flush()
                    os.fsync(target.fileno())
                file.unlink()
                file = near
            try:
                os.link(file, path)  # unlike a rename it takes no other's place
            except FileExistsError:
                raise SnapshotExists(f"collection {collection} has a snapshot {id_} already") from None
            finally:
                file.unlink()
            sync_folder(path.parent)

    def delete(self, collection: str, id_: str) -> None:
        with os_errors(f"The snapshot {id_} cannot be deleted"):
            try:
                self._path(collection, id_).unlink()
            except FileNotFoundError:
                raise _missing(collection, id_) from None
            sync_folder(self._path(collection, id_).parent)

    def quarantine(self, collection: str, id_: str) -> str:
        target = self._root / QUARANTINE / collection / f"{id_}{ENDING}"
        with os_errors(f"The snapshot {id_} cannot be moved"):
            make_folder(target.parent)
            self._path(collection, id_).rename(target)
            sync_folder(target.parent)
            sync_folder(self._path(collection, id_).parent)
        return str(target)

    def _path(self, collection: str, id_: str) -> Path:
        return self._root / _part(collection) / f"{_part(id_)}{ENDING}"


class BucketStore:
    """An S3-compatible bucket; credentials come from the usual AWS_* environment."""

    def __init__(self, url: str) -> None:
        """Raises `InvalidSettings` for a URL that is not `S3_URL`."""
        parts = urlsplit(url)
        query = parse_qs(parts.query, keep_blank_values=True)
        unknown = query.keys() - {"endpoint", "region"}
        if parts.scheme != "s3" or not parts.netloc or unknown or any(len(values) != 1 for values in query.values()):
            raise InvalidSettings(f"the snapshots' URL is {S3_URL}, not {url}")
        given = {name: values[0] for name, values in query.items()}
        endpoint = given.get("endpoint", "")
        try:
            self._store = S3Store(
                parts.netloc,
                prefix=parts.path.strip("/") or None,
                client_options={"allow_http": endpoint.startswith("http://")},
                **given,  # type: ignore[arg-type]
            )
        except (BaseError, ValueError) as error:
            raise InvalidSettings(f"the snapshots' store {url} cannot be used: {_first_line(error)}") from None
        self._url = url

    def list(self, collection: str | None = None) -> list[Kept]:
        with self._errors("listed"):
            prefix = None if collection is None else f"{_part(collection)}/"
            found = [meta for page in obstore.list(self._store, prefix) for meta in page]
        kept = []
        for meta in found:
            folder, slash, file = meta["path"].partition("/")
            id_ = file.removesuffix(ENDING)
            if slash and id_ != file and _PART.fullmatch(folder) and _PART.fullmatch(id_):
                kept.append(Kept(folder, id_, meta["size"], meta["last_modified"]))
        return sorted(kept, key=lambda each: (each.collection, each.id))

    def find(self, collection: str, id_: str) -> Kept:
        with self._errors("read", collection, id_):
            meta = obstore.head(self._store, _key(collection, id_))
        return Kept(collection, id_, meta["size"], meta["last_modified"])

    def read(self, kept: Kept, start: int, size: int) -> bytes:
        end = min(start + size, kept.size_bytes)
        if start >= end:
            return b""
        with self._errors("read", kept.collection, kept.id):
            return bytes(obstore.get_range(self._store, _key(kept.collection, kept.id), start=start, end=end))

    def put(self, collection: str, id_: str, file: Path) -> None:
        with self._errors("kept", collection, id_):
            try:
                obstore.head(self._store, _key(collection, id_))
            except FileNotFoundError:
                obstore.put(self._store, _key(collection, id_), file, chunk_size=RANGE_BYTES, max_concurrency=2)
                file.unlink()
                return
        raise SnapshotExists(f"collection {collection} has a snapshot {id_} already")

    def delete(self, collection: str, id_: str) -> None:
        self.find(collection, id_)  # a bucket says nothing where there was nothing
        with self._errors("deleted", collection, id_):
            obstore.delete(self._store, _key(collection, id_))

    def quarantine(self, collection: str, id_: str) -> str:
        target = f"{QUARANTINE}/{_key(collection, id_)}"
        with self._errors("moved", collection, id_):
            obstore.rename(self._store, _key(collection, id_), target)
        return target

    @contextmanager
    def _errors(self, done: str, collection: str = "", id_: str = "") -> Iterator[None]:
        what = f"The snapshot {id_}" if id_ else "The snapshots"
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            if "NoSuchBucket" in str(error):
                raise StorageUnavailable(f"{what} cannot be {done}: there is no bucket of {self._url}") from None
            if isinstance(error, FileNotFoundError):
                raise _missing(collection, id_) from None
            raise StorageUnavailable(f"{what} cannot be {done} in {self._url}: {_first_line(error)}") from error


class KeptFile:
    """A kept snapshot as a file that is read front to back, by ranges."""

    def __init__(self, store: SnapshotStore, kept: Kept) -> None:
        self._store, self._kept = store, kept
        self.at = 0  # how far it is read
        self._held = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes, fewer at the end. Raises as `SnapshotStore.read`."""
        wanted = size
        pieces = []
        while wanted:
            if not self._held:
                self._held = memoryview(self._store.read(self._kept, self.at, RANGE_BYTES))
                if not self._held:
                    break
            piece = self._held[:wanted]
            self._held = self._held[len(piece) :]
            self.at += len(piece)
            wanted -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)


def open_store(where: str | None, folder: Path) -> SnapshotStore:
    """The store that `where` names: a folder, an `s3://` URL, or (None) the default folder. Nothing is made yet.

    Raises `InvalidSettings`.
    """
    if where is None:
        return FolderStore(folder)
    if "://" in where:
        return BucketStore(where)
    return FolderStore(Path(where).absolute())


class Workspace:
    """The folder where snapshots are written before they are kept; emptied at open: nothing there was ever referred
    to."""

    def __init__(self, root: Path) -> None:
        self._root = root
        with os_errors(f"The folder {root} cannot be emptied"):
            for stale in self.stale(root):
                stale.unlink()

    @staticmethod
    def stale(root: Path) -> list[Path]:
        """What a process that is gone has left there."""
        with os_errors(f"The folder {root} cannot be read"):
            return sorted(root.iterdir()) if root.is_dir() else []

    @contextmanager
    def file(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A new file, which is gone at the end of the block unless it was kept. Raises `StorageFull`,
        `StorageUnavailable`, of what the block does with it, too."""
        path = self._root / uuid.uuid4().hex
        with os_errors("The snapshot cannot be written"):
            make_folder(self._root)
            try:
                with open(path, "xb+") as file:
                    yield path, file
            finally:
                path.unlink(missing_ok=True)


def _kept_file(path: Path) -> Kept:
    stat = path.stat()
    return Kept(path.parent.name, path.stem, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))


def _missing(collection: str, id_: str) -> SnapshotNotFound:
    return SnapshotNotFound(f"collection {collection} has no snapshot {id_}")


def _part(name: str) -> str:
    """A collection's or a snapshot's name, which is one part of a path. Raises `SnapshotNotFound` for any other."""
    if _PART.fullmatch(name) is None:
        raise SnapshotNotFound(f"{name!r} is not the name of a collection or a snapshot")
    return name


def _key(collection: str, id_: str) -> str:
    return f"{_part(collection)}/{_part(id_)}{ENDING}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
