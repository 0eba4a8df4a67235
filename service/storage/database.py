"""The SQL database: how it is opened, brought to the newest schema, read, written, and what its failures mean.

Rules:
- A commit is on disk before it returns: SQLite runs with a write-ahead log and `synchronous=FULL`.
- A transaction begins when we say so: the driver's own habit of beginning at the first write (and not for reads) is
  turned off, so a `read` sees one state of the database throughout.
- All writes go through one `Writer`; a `write` takes the write lock at once, so none fails half way for want of it.
- Errors of the driver are translated by `_translate`, here and nowhere else.
- The schema is changed by `migrations/` alone, at open, in one transaction. A database newer than the code is refused.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import alembic.command
import alembic.config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, ExceptionContext, QueuePool, create_engine, event
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.core.filter import moment
from service.errors import StorageFull, StorageUnavailable, TooBusy

MIGRATIONS = Path(__file__).parents[2] / "migrations"
"""Beside `service/`, in a checkout and in an installed wheel alike; by path, because any program may have a package
`migrations`."""

LOCK_TIMEOUT_S = 30
"""How long to wait for another program that holds SQLite's write lock (a backup, a shell); our own writes never
contend."""

READERS_MAX = 64
"""Connections open at once: above the 40 threads that a synchronous web application runs, and few enough to hold in
memory."""

READER_WAIT_S = 1.0
"""A reader is done in milliseconds: who waits longer is better told so than kept."""

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


class Database:
    """An open SQL database with the current schema. Safe to use from several threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, path: Path) -> Database:
        """Open the SQLite database at `path`, creating it or upgrading its schema as needed.

        Raises `StorageUnavailable` (read-only, damaged, not a database, newer than this code) and `StorageFull`.
        """
        database = cls(_sqlite_engine(path))
        try:
            with database._engine.connect() as connection:
                mode = connection.connection.cursor().execute("PRAGMA journal_mode=WAL").fetchone()[0]
                if mode != "wal":
                    raise StorageUnavailable(f"The file system of {path} cannot hold a write-ahead log.")
            database._migrate()
        except BaseException:
            database.close()
            raise
        return database

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees the database as it is at its first query, until the block ends.

        Raises `TooBusy` if `READERS_MAX` readers are at work for `READER_WAIT_S`.
        """
        with self._connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A connection whose writes are on disk together when the block ends, or not at all if it raises."""
        with self._connect() as connection:
            connection = connection.execution_options(begin_statement="BEGIN IMMEDIATE")
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Close all connections; SQLite then folds its log into the database file."""
        self._engine.dispose()

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        try:
            connection = self._engine.connect()
        except PoolTimeout:
            raise TooBusy(f"{READERS_MAX} readers are using the database.", retry_after_s=1) from None
        with connection:
            yield connection

    def _migrate(self) -> None:
        config = alembic.config.Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))  # % interpolates there
        script = ScriptDirectory.from_config(config)
        with self.write() as connection:
            revision = MigrationContext.configure(connection).get_current_revision()
            if revision == script.get_current_head():
                return
            if revision not in {None, *(known.revision for known in script.walk_revisions())}:
                raise StorageUnavailable(
                    f"The database was written by a newer version of Engram (schema {revision}) than this one."
                )
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")


def _sqlite_engine(path: Path) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"timeout": LOCK_TIMEOUT_S, "check_same_thread": False},
        poolclass=QueuePool,
        pool_size=READERS_MAX,
        max_overflow=0,
        pool_timeout=READER_WAIT_S,
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver begins no transaction of its own; `begin` below does
        cursor = connection.cursor()
        for pragma in (
            "foreign_keys=ON",
            "synchronous=FULL",
            "journal_size_limit=67108864",
        ):  # the log shrinks to 64 MiB
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()
        connection.create_function("engram_moment", 1, _moment, deterministic=True)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin_statement", "BEGIN"))

    event.listen(engine, "handle_error", _translate)
    return engine


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
