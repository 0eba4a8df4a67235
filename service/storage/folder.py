"""The data folder and its single owner.

Layout: `engram.db` (SQLite; with `-wal` and `-shm` beside it while open), `blobs/` (originals), `owner.lock`.

Rules:
- One process owns a folder: it holds an exclusive `flock` on `owner.lock` for as long as it lives. The kernel drops the
  lock with the process, however it dies, so a stale file never blocks anyone and nothing has to be cleaned up.
- The file's content says who the owner is and where it serves. It is believed only while the lock is held.
- The lock belongs to this process alone: it is closed on exec and in forked children, which would otherwise keep it
  alive.
- The file is never deleted: a lock on an unlinked file excludes nobody.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from service.errors import FolderInUse
from service.storage.disk import make_folder, os_errors

LOCK_NAME = "owner.lock"

LOCK_WAIT_S = 0.5
"""How long `open` tries before it calls the folder in use: `read_owner` of another process holds a shared lock for
microseconds, and the lock of a process that was just killed goes only when the kernel has torn it down."""

LOCK_POLL_S = 0.02

RECORD_BYTES = 4096
"""The owner's record is padded to this, so that one write replaces it whole; far above any URL we serve at."""


@dataclass(frozen=True)
class Owner:
    """Who holds a data folder. `url` is None while (or because) it does not serve, `grpc_url` where it serves no gRPC;
    `pid` is None in the instant before it is written."""

    pid: int | None
    url: str | None
    grpc_url: str | None = None


class DataFolder:
    """A data folder that this process owns, from `open` to `close`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock
        _open_folders.add(self)

    @classmethod
    def open(cls, path: Path | str, url: str | None = None) -> DataFolder:
        """Create the folder if need be and own it.

        Raises `FolderInUse` naming the owner's pid and URL, `StorageUnavailable` if the folder cannot be made or
        written, `StorageFull` if there is no space for it.
        """
        path = Path(path).absolute()
        with os_errors(f"The data folder {path} cannot be used"):
            make_folder(path)
            lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        folder = cls(path, lock)
        try:
            if not _acquire(lock, fcntl.LOCK_EX, wait_s=LOCK_WAIT_S):
                owner = _read_record(lock)
                who = f"process {owner.pid}" if owner.pid else "another process"
                where = f" and serves at {owner.url}" if owner.url else ""
                raise FolderInUse(f"The data folder {path} is in use: {who} owns it{where}.")
            folder.announce(url)
        except BaseException:
            folder._forget()
            raise
        return folder

    @property
    def database_path(self) -> Path:
        return database_path(self.path)

    @property
    def blobs_path(self) -> Path:
        return self.path / "blobs"

    def announce(self, url: str | None, grpc_url: str | None = None) -> None:
        """Write into the lock file that this process owns the folder and serves at `url`."""
        record = json.dumps({"pid": os.getpid(), "url": url, "grpc_url": grpc_url}).encode().ljust(RECORD_BYTES)
        if self._lock is None:
            raise ValueError("the data folder is closed")
        with os_errors(f"The owner of {self.path} cannot be written"):
            os.pwrite(self._lock, record, 0)

    def close(self) -> None:
        """Give the folder up. Closing twice is harmless."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)  # before the lock goes, so that no later holder is mistaken for us
            self._forget()

    def _forget(self) -> None:
        """Close this process's descriptor, leaving the file's content alone."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def database_path(folder: Path) -> Path:
    return folder / "engram.db"


_open_folders: weakref.WeakSet[DataFolder] = weakref.WeakSet()


def _forget_all() -> None:
    for folder in list(_open_folders):
        folder._forget()


# A forked child shares the open file, and with it the lock: it must let go at once, without unlocking it for the
# parent.
os.register_at_fork(after_in_child=_forget_all)


def read_owner(path: Path | str) -> Owner | None:
    """The process that owns the data folder now, or None if nobody does (or there is no such folder)."""
    with os_errors(f"The owner of {path} cannot be read"):
        try:
            lock = os.open(Path(path) / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return None if _acquire(lock, fcntl.LOCK_SH, wait_s=0) else _read_record(lock)
        finally:
            os.close(lock)


def _acquire(lock: int, kind: int, wait_s: float) -> bool:
    """Take the lock; False if another process still has it after `wait_s`."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOCK_POLL_S)


def _read_record(lock: int) -> Owner:
    content = os.pread(lock, RECORD_BYTES, 0)
    if not content.strip():  # the owner has the lock and is about to write, or has just cleared it
        return Owner(pid=None, url=None)
    record = json.loads(content)
    return Owner(pid=record["pid"], url=record["url"], grpc_url=record.get("grpc_url"))
