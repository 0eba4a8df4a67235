"""What the operating system is asked so that a file is on disk when we say so, and what its refusals mean.

Rules:
- A file is durable once its bytes are synced and so is the folder that names it; both happen before anything refers to
  it.
- Every `OSError` met under a data folder is translated by `os_errors`, here and nowhere else.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import StorageFull, StorageUnavailable

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The disk, the user's quota, or the process's limit on file sizes is used up."""

_libc = ctypes.CDLL(None, use_errno=True)
CAN_SYNC_FILESYSTEM = hasattr(_libc, "syncfs")
"""Linux has `syncfs` (and since 5.8 it reports failed write-backs); elsewhere files are synced one by one."""


@contextmanager
def os_errors(doing: str) -> Iterator[None]:
    """Turn an `OSError` into `StorageFull` (no space, quota, file size limit) or `StorageUnavailable` (anything
    else)."""
    try:
        yield
    except OSError as error:
        kind = StorageFull if error.errno in NO_SPACE else StorageUnavailable
        raise kind(f"{doing}: {error.strerror or error}") from error


def write_file(path: Path, content: bytes, *, sync: bool) -> None:
    """Create `path` with `content`; with `sync` the bytes are on disk at return (the name is not: `sync_folder`)."""
    with open(path, "xb", buffering=0) as file:
        view = memoryview(content)
        while view:  # a raw write may take less than it was given
            view = view[file.write(view) :]
        if sync:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_filesystem(folder: Path) -> None:
    """Put everything written so far to the file system of `folder` on disk, in one call. Needs
    `CAN_SYNC_FILESYSTEM`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _libc.syncfs(descriptor) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(folder))
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create `folder` and its missing parents, durably. One that exists is left as it is."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
        sync_folder(made.parent)
