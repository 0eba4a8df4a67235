"""Originals, kept as files named by the sha-256 of their content.

Layout: `<root>/ab/abcdef…` (256 folders, all made at open so that storing never makes one), `<root>/tmp/` for files
being written, of which those older than the grace are removed at open (nothing there was ever referred to),
`<root>/quarantine/` for those that `fsck` found damaged, and `<root>/identity`, by which servers that share a database
know that they share the originals.

Rules:
- A blob is written beside its place, synced, renamed, and its folder synced, before `put` returns: whoever commits a
  reference to a hash commits it to bytes that are on disk.
- A blob never changes, so one that exists is not written again; its time is set to now instead, which restarts its
  grace.
- A blob is removed only when nothing names it and it is older than the grace (its reference may be about to be
  committed).
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from service.errors import ContentNotFound
from service.storage.disk import CAN_SYNC_FILESYSTEM, make_folder, os_errors, sync_filesystem, sync_folder, write_file

GRACE_S = 3600.0
"""Time between writing an original and committing what names it: requests are bounded far below this (30 s by
default)."""

IDENTITY = "identity"
TEMPORARY = "tmp"
QUARANTINE = "quarantine"

SYNC_TOGETHER_FROM = 8
"""Blobs from which one sync of the file system beats one per file and folder (500 of 3 kB on ext4: 0.03 s against 0.17
s); below it, other programs' unwritten data would be waited for without need."""

_HASH = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """A content-addressed store of byte strings under `root`. Safe to use from several threads, and from several
    processes."""

    def __init__(self, root: Path, *, tidy: bool = True) -> None:
        """`tidy`: remove stale files. Raises `StorageUnavailable` if `root` cannot be made or written, `StorageFull` if
        there is no space."""
        self._root = root
        self._folders = [root / f"{first:02x}" for first in range(256)]
        self._temporary = root / TEMPORARY
        # Held where existence is decided upon, so that a blob found by `put_many` is not removed before it is marked as
        # wanted.
        self._deciding = threading.Lock()
        self._keeping = 0
        with os_errors(f"The blob store {root} cannot be used"):
            make_folder(self._temporary)
            for stale in self.stale() if tidy else ():
                stale.unlink(missing_ok=True)
            for folder in self._folders:
                folder.mkdir(exist_ok=True)
            sync_folder(root)

    def put(self, content: bytes) -> str:
        """Keep `content`, on disk at return, and give its sha-256 in hex. Raises `StorageFull`,
        `StorageUnavailable`."""
        return self.put_many([content])[0]

    def put_many(self, contents: Sequence[bytes]) -> list[str]:
        """Keep all of `contents`, on disk at return, and give their hashes in order. Raises `StorageFull`,
        `StorageUnavailable`.

        After an error some may be kept; they are removed as unreferenced later.
        """
        hashes = [hashlib.sha256(content).hexdigest() for content in contents]
        distinct = dict(zip(hashes, contents, strict=True))
        with os_errors("The originals cannot be stored"):
            missing = [hash_ for hash_ in distinct if not self._touch(hash_)]
            together = CAN_SYNC_FILESYSTEM and len(missing) >= SYNC_TOGETHER_FROM
            written: dict[str, Path] = {}
            try:
                for hash_ in missing:
                    written[hash_] = self._temporary / uuid.uuid4().hex
                    write_file(written[hash_], distinct[hash_], sync=not together)
                if together:
                    sync_filesystem(self._root)
                for hash_, path in written.items():
                    path.rename(self._path(hash_))
            except OSError:
                for path in written.values():
                    path.unlink(missing_ok=True)
                raise
            # Also for blobs that existed: the thread that renamed one into place may not have synced its folder yet.
            if together:
                sync_filesystem(self._root)
            else:
                for folder in {self._path(hash_).parent for hash_ in distinct}:
                    sync_folder(folder)
        return hashes

    def get(self, hash_: str) -> bytes:
        """The content with this sha-256. Raises `ContentNotFound`, `StorageUnavailable`."""
        with os_errors(f"The original {hash_} cannot be read"):
            try:
                return self._path(hash_).read_bytes()
            except FileNotFoundError:
                raise ContentNotFound(f"There is no original {hash_}.") from None

    def size_bytes(self, hash_: str) -> int:
        """0 where there is none."""
        try:
            return self._path(hash_).stat().st_size
        except OSError:
            return 0

    def stale(self) -> list[Path]:
        """Files that were being written longer ago than the grace: by a process that is gone."""
        cutoff = time.time() - GRACE_S
        with os_errors(f"The blob store {self._root} cannot be read"):
            return [file for file in sorted(self._temporary.iterdir()) if file.stat().st_mtime <= cutoff]

    def by_folder(self) -> Iterator[tuple[str, list[str]]]:
        """The first two digits of each folder, and the hashes that it has files of."""
        for folder in self._folders:
            with os_errors(f"The folder {folder} cannot be read"):
                yield folder.name, sorted(name for name in os.listdir(folder) if _HASH.fullmatch(name))

    def is_whole(self, hash_: str) -> bool:
        """Whether the file's content is what it is named by. Raises `StorageUnavailable` where it cannot be read."""
        return hashlib.sha256(self.get(hash_)).hexdigest() == hash_

    def quarantine(self, hash_: str) -> Path:
        """Move a damaged original aside, so that the same content, when it is stored again, is written again; where it
        is then."""
        target = self._root / QUARANTINE / hash_
        with os_errors(f"The original {hash_} cannot be moved"):
            make_folder(target.parent)
            self._path(hash_).rename(target)
            sync_folder(target.parent)
            sync_folder(self._path(hash_).parent)
        return target

    def exists(self, hash_: str) -> bool:
        return self._path(hash_).exists()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Nothing is removed while the block runs: for who reads, one after the other, blobs that were named when it
        began."""
        with self._deciding:
            self._keeping += 1
        try:
            yield
        finally:
            with self._deciding:
                self._keeping -= 1

    def remove_unreferenced(
        self, in_use: Callable[[Sequence[str]], Iterable[str]], older_than_s: float = GRACE_S
    ) -> int:
        """Remove the blobs older than `older_than_s` that `in_use` (given some hashes) does not return; their number is
        returned.

        `in_use` is asked after a blob was found old, so a reference committed meanwhile is seen; one not yet committed
        belongs to a blob that `put` has just made young.
        """
        removed = 0
        cutoff = time.time() - older_than_s
        with os_errors("Unreferenced originals cannot be removed"):
            for folder in self._folders:
                with os.scandir(folder) as entries:
                    old = [entry.name for entry in entries if entry.stat().st_mtime <= cutoff]
                for hash_ in set(old).difference(in_use(old) if old else ()):
                    with self._deciding:
                        if not self._keeping:
                            removed += self._remove(self._path(hash_), cutoff)
        return removed

    def _remove(self, path: Path, cutoff: float) -> bool:
        """Remove a blob that is older than the cutoff. It is moved aside first: another process may make it young
        between a look and a removal, and then it is moved back.
        """
        aside = self._temporary / f"{path.name}-{uuid.uuid4().hex}"
        try:
            if path.stat().st_mtime > cutoff:
                return False
            path.rename(aside)
        except FileNotFoundError:  # another process was first
            return False
        if aside.stat().st_mtime > cutoff:
            aside.rename(path)
            return False
        aside.unlink()
        return True

    def identity(self) -> str | None:
        """What `identify` was given first, by whatever process."""
        with os_errors("The store of originals cannot be read"):
            try:
                return (self._root / IDENTITY).read_text(encoding="ascii")
            except FileNotFoundError:
                return None

    def identify(self, identity: str) -> None:
        """Write down whose originals these are."""
        with os_errors("The store of originals cannot be written"):
            beside = self._temporary / uuid.uuid4().hex
            write_file(beside, identity.encode("ascii"), sync=True)
            beside.rename(self._root / IDENTITY)
            sync_folder(self._root)

    def _touch(self, hash_: str) -> bool:
        """Whether the blob exists; if so, its grace starts anew."""
        with self._deciding:
            try:
                os.utime(self._path(hash_))
            except FileNotFoundError:
                return False
            return True

    def _path(self, hash_: str) -> Path:
        return self._root / hash_[:2] / hash_
