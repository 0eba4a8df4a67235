"""SQLite: one file, one process. How it is opened, and what its failures mean.

Rules:
- A commit is on disk before it returns: a write-ahead log and `synchronous=FULL`.
- A transaction begins when we say so: the driver's own habit of beginning at the first write (and not for reads) is
  turned off, so a read sees one state of the database throughout.
- A write takes the write lock at once (`BEGIN IMMEDIATE`), so none fails half way for want of it.
- What is deleted is overwritten with zeros, whatever SQLite was compiled to do, and leaves the log with a checkpoint
  that empties it (`empty_log`).
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, ExceptionContext, QueuePool, create_engine, event
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.core.filter import moment
from service.errors import StorageFull, StorageUnavailable

LOCK_TIMEOUT_S = 30
"""How long to wait for another program that holds SQLite's write lock (a backup, a shell); our own writes never
contend."""

EMPTY_WAIT_MS = 250
"""How long a checkpoint may hold up writes while it waits for readers: they are done in milliseconds, or (an export)
last longer than anybody should wait."""

WRITE = {"begin_statement": "BEGIN IMMEDIATE"}
"""Execution options of a connection that is going to write."""

UNUSABLE = {
    sqlite3.SQLITE_READONLY: "it is read-only",
    sqlite3.SQLITE_PERM: "access is not permitted",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened",
    sqlite3.SQLITE_IOERR: "the disk failed",
    sqlite3.SQLITE_CORRUPT: "it is damaged",
    sqlite3.SQLITE_NOTADB: "it is not an SQLite database",
    sqlite3.SQLITE_BUSY: "another program has locked it",
    sqlite3.SQLITE_LOCKED: "another program has locked it",
}


def open_sqlite(path: Path, connections_max: int, wait_s: float) -> Engine:
    """An engine on the file at `path`, created if need be, in write-ahead mode.

    Raises `StorageUnavailable` (read-only, damaged, not a database) and `StorageFull`.
    """
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"timeout": LOCK_TIMEOUT_S, "check_same_thread": False},
        poolclass=QueuePool,
        pool_size=connections_max,
        max_overflow=0,
        pool_timeout=wait_s,
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver begins no transaction of its own; `begin` below does
        cursor = connection.cursor()
        for pragma in (
            "foreign_keys=ON",
            "synchronous=FULL",
            "secure_delete=ON",
            "journal_size_limit=67108864",  # the log shrinks to 64 MiB
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()
        connection.create_function("engram_moment", 1, _moment, deterministic=True)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin_statement", "BEGIN"))

    event.listen(engine, "handle_error", _translate)
    try:
        with engine.connect() as connection:
            mode = connection.connection.cursor().execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode != "wal":
                raise StorageUnavailable(f"The file system of {path} cannot hold a write-ahead log.")
    except BaseException:
        engine.dispose()
        raise
    return engine


def empty_log(engine: Engine) -> bool:
    """Bring the write-ahead log into the database file, and cut it to nothing: until then it holds what the rows were.
    False where a reader or a writer is in the way for `EMPTY_WAIT_MS`; writers wait so long.
    """
    try:
        connection = engine.raw_connection()
    except PoolTimeout:  # readers hold all there are
        return False
    try:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={EMPTY_WAIT_MS}")
        try:
            busy, *_ = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.OperationalError:  # the next one will do it
            return False
        finally:
            cursor.execute(f"PRAGMA busy_timeout={LOCK_TIMEOUT_S * 1000}")
            cursor.close()
        return not busy
    finally:
        connection.close()


def compact(engine: Engine) -> None:
    """Write the database anew. Where rows grew and moved, the unused part of a page may still hold a copy of what one
    was (two of 9,000 writes of rows of 100 bytes to 20 kB, once all were deleted or replaced): this leaves none.
    Takes as much free space as the database has, and nothing else is written meanwhile.

    Raises `StorageFull`, `StorageUnavailable`.
    """
    connection = engine.raw_connection()
    try:
        connection.cursor().execute("VACUUM")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
            raise StorageFull("The database cannot be written anew: the disk is full.") from error
        raise StorageUnavailable(f"The database cannot be written anew: {error}.") from error
    finally:
        connection.close()
    empty_log(engine)


def _moment(value: object) -> int | None:
    """For filters on dates (see filtering.py): SQL may ask before it has looked at a value's type."""
    return moment(value) if isinstance(value, str) else None


def _translate(context: ExceptionContext) -> None:
    """Raise the error of ours that the driver's stands for. Errors of statements (a broken constraint) pass as they
    are."""
    code = getattr(context.original_exception, "sqlite_errorcode", sqlite3.SQLITE_OK)
    code &= 0xFF  # the upper bits say where it was met
    if code == sqlite3.SQLITE_FULL:
        raise StorageFull("The database cannot grow: the disk is full.") from context.original_exception
    if code in UNUSABLE:
        raise StorageUnavailable(f"The database cannot be used: {UNUSABLE[code]}.") from context.original_exception
