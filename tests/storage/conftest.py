"""Storage under test: real folders, real SQLite and PostgreSQL, real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.storage.blobs import Blobs
from service.storage.database import Database
from service.storage.folder import DataFolder
from service.storage.repository import Repository
from service.storage.writer import Writer

ROOT = Path(__file__).parents[2]


@dataclass
class Storage:
    folder: DataFolder
    database: Database
    writer: Writer
    repository: Repository
    blobs: Blobs

    def close(self) -> None:
        self.writer.close()
        self.database.close()
        self.folder.close()


Opener = Callable[[Path], Storage]


@pytest.fixture(scope="session")
def opener(new_database: Callable[[Path], Path | str]) -> Opener:
    """Opens the storage in a folder, on either database; the same folder again is the same storage again."""

    def open_storage(path: Path) -> Storage:
        folder = DataFolder.open(path)
        database = Database.open(new_database(path))
        writer = Writer(database)
        return Storage(folder, database, writer, Repository(database, writer), Blobs(folder.blobs_path))

    return open_storage


@pytest.fixture
def storage(tmp_path: Path, opener: Opener) -> Iterator[Storage]:
    opened = opener(tmp_path / "data")
    yield opened
    opened.close()


@pytest.fixture
def repository(storage: Storage) -> Repository:
    return storage.repository


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python programs of ours; those still alive at the end are killed."""
    children: list[subprocess.Popen[str]] = []

    def start(program: str, *arguments: object) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()  # type: ignore[union-attr]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small file system of its own with the options given; the test is skipped where that is not permitted."""
    mounted: list[Path] = []

    def mount_tmpfs(options: str) -> Path:
        point = tmp_path / f"mount{len(mounted)}"
        point.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(point)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        mounted.append(point)
        return point

    yield mount_tmpfs
    for point in mounted:
        subprocess.run(["umount", str(point)], check=True)


@contextmanager
def _without_privileges() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def unprivileged() -> Callable[[], object]:
    """A context in which file permissions count even for root."""
    return _without_privileges
