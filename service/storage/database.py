"""The SQL database: how it is brought to the newest schema, read and written. SQLite by default, PostgreSQL by URL.

Rules:
- A commit is on disk before it returns, and a `read` sees one state of the database throughout.
- All writes go through one `Writer`.
- Errors of a driver are translated in the module of its database (`sqlite.py`, `postgres.py`), and nowhere else.
- The schema is changed by `migrations/` alone, at open, in one transaction. A database newer than the code is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import alembic.command
import alembic.config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.errors import StorageUnavailable, TooBusy
from service.storage import postgres, sqlite

MIGRATIONS = Path(__file__).parents[2] / "migrations"
"""Beside `service/`, in a checkout and in an installed wheel alike; by path, because any program may have a package
`migrations`."""

READERS_MAX = 64
"""Connections open at once: above the 40 threads that a synchronous web application runs, and few enough to hold in
memory, and for a PostgreSQL server with its usual hundred."""

READER_WAIT_S = 1.0
"""A reader is done in milliseconds: who waits longer is better told so than kept."""


class Database:
    """An open SQL database with the current schema. Safe to use from several threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.is_postgres = engine.dialect.name == "postgresql"
        self._reads = engine.execution_options(**postgres.READ) if self.is_postgres else engine
        self._writes = engine if self.is_postgres else engine.execution_options(**sqlite.WRITE)
        self._stopping = threading.Event()

    @classmethod
    def open(cls, where: Path | str) -> Database:
        """Open the SQLite database at a path, creating it as needed, or the PostgreSQL database that a URL names;
        upgrade its schema as needed.

        Raises `StorageUnavailable` (read-only, damaged, not a database, not reached, newer than this code),
        `StorageFull` and, for a URL that is none, `InvalidSettings`.
        """
        if isinstance(where, Path):
            database = cls(sqlite.open_sqlite(where, READERS_MAX, READER_WAIT_S))
        else:
            database = cls(postgres.open_postgres(where, READERS_MAX, READER_WAIT_S))
        try:
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
        with _connected(self._reads) as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A connection whose writes are on disk together when the block ends, or not at all if it raises."""
        with _connected(self._writes) as connection:
            if self.is_postgres:
                with postgres.surely_committed(self._engine, connection, self._stopping):
                    yield connection
            else:
                with connection.begin():
                    yield connection

    def empty_log(self) -> bool:
        """SQLite: leave nothing of deleted rows in the log; False where somebody was in the way. PostgreSQL sees to its
        log itself."""
        return self.is_postgres or sqlite.empty_log(self._engine)

    def compact(self) -> None:
        """SQLite: write the file anew, without what deleted rows may have left in it. Raises `StorageFull`."""
        if not self.is_postgres:
            sqlite.compact(self._engine)

    def close(self) -> None:
        """Close all connections; SQLite then folds its log into the database file."""
        self._stopping.set()
        self._engine.dispose()

    def _migrate(self) -> None:
        config = alembic.config.Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))  # % interpolates there
        script = ScriptDirectory.from_config(config)
        with self.write() as connection:
            if self.is_postgres:
                postgres.lock_schema(connection)
            revision = MigrationContext.configure(connection).get_current_revision()
            if revision == script.get_current_head():
                return
            if revision not in {None, *(known.revision for known in script.walk_revisions())}:
                raise StorageUnavailable(
                    f"The database was written by a newer version of Engram (schema {revision}) than this one."
                )
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")


@contextmanager
def _connected(engine: Engine) -> Iterator[Connection]:
    try:
        connection = engine.connect()
    except PoolTimeout:
        raise TooBusy(f"{READERS_MAX} readers are using the database.", retry_after_s=1) from None
    with connection:
        yield connection
