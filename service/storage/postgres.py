"""PostgreSQL: how it is reached, and what its failures mean.

Rules:
- A read is one snapshot (REPEATABLE READ, read only); a write is READ COMMITTED under the row locks that it takes.
- A commit whose answer was lost may stand or not. Which of the two is asked of the server by the transaction's number
  before anything is done again: nothing is stored twice, and nothing that stands is reported as failed.
- Several servers may use one database: their writes to a collection are in order by its row's lock, and how each
  follows the others is in `following`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError

from service.errors import EngramError, InvalidSettings, StorageFull, StorageUnavailable, TooBusy

DRIVER = "postgresql+psycopg"

CONNECT_TIMEOUT_S = 10
"""A server that takes longer to answer a first packet is as good as not there."""

LOCK_TIMEOUT_MS = 30_000
"""How long a statement waits for a row that another program holds; our own writes never contend."""

ASK_AGAIN_S = 0.5
"""Between two tries to reach a server that went away in the middle of a commit."""

LOCK_KEY = 0x656E6772  # "engr": of the advisory lock under which a schema changes; the second half is its number

READ = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
"""Execution options of a connection that only reads."""

FULL = {"53100": "the disk is full", "53400": "a configured limit is reached"}
UNUSABLE = {
    "25006": "it is read-only",
    "42501": "access is not permitted",
    "40001": "another program changed the same rows",
    "40P01": "another program held the same rows",
    "55P03": "another program has locked it",
    "57014": "a statement took too long",
    "XX001": "it is damaged",
    "XX002": "it is damaged",
}


def open_postgres(url: str, connections_max: int, wait_s: float) -> Engine:
    """An engine on the database that a `postgresql://` URL names. Raises `InvalidSettings`, `StorageUnavailable`."""
    parsed = _parsed(url)
    ours = f"-c lock_timeout={LOCK_TIMEOUT_MS} -c synchronous_commit=on -c timezone=UTC"
    given = parsed.query.get("options", "")  # the URL's own come last, and win
    engine = create_engine(
        parsed,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "options": f"{ours} {given if isinstance(given, str) else ' '.join(given)}",
            "application_name": "engram",
        },
        pool_size=connections_max,
        max_overflow=0,
        pool_timeout=wait_s,
        pool_pre_ping=True,  # a restarted server costs a ping, not a failed request
    )
    event.listen(engine, "handle_error", _translate)
    try:
        with engine.connect():
            pass
    except BaseException:
        engine.dispose()
        raise
    return engine


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InvalidSettings("the database's URL cannot be read: postgresql://user:password@host:5432/name") from None
    if parsed.drivername not in ("postgresql", "postgres", DRIVER):
        raise InvalidSettings(f"the database's URL begins with postgresql://, not {parsed.drivername}://")
    return parsed.set(drivername=DRIVER)


@contextmanager
def surely_committed(engine: Engine, connection: Connection, stopping: threading.Event) -> Iterator[None]:
    """A transaction that is rolled back where the block raises; else, at its end, it stands, or an error says that it
    does not.

    While the server cannot be asked what became of a commit this waits for it, until `stopping`; then it raises
    `StorageUnavailable`, and only then may the work stand all the same.
    """
    transaction = connection.begin()
    try:
        number = connection.execute(text("SELECT CAST(pg_current_xact_id() AS text)")).scalar_one()
        yield
    except BaseException:
        transaction.rollback()
        raise
    try:
        transaction.commit()
    except StorageUnavailable:
        if not _stands(engine, number, stopping):
            raise


def _stands(engine: Engine, number: str, stopping: threading.Event) -> bool:
    """Whether the transaction of that number was committed. Raises `StorageUnavailable` once `stopping` is set."""
    status = None
    while True:
        try:
            with engine.connect() as connection:
                status = connection.execute(
                    text("SELECT pg_xact_status(CAST(:number AS xid8))"), {"number": number}
                ).scalar()
        except EngramError:
            pass
        if status in ("committed", "aborted"):
            return bool(status == "committed")
        if stopping.wait(ASK_AGAIN_S):
            raise StorageUnavailable("The database went away in the middle of a commit, which may stand or not.")


def lock_schema(connection: Connection) -> None:
    """Until the transaction ends, nobody else brings this schema to another version. Raises `StorageUnavailable` where
    somebody does for longer than `LOCK_TIMEOUT_MS`.
    """
    schema = connection.execute(text("SELECT current_schema()::regnamespace::oid::int")).scalar_one()
    connection.execute(text("SELECT pg_advisory_xact_lock(:first, :second)"), {"first": LOCK_KEY, "second": schema})


def _translate(context: ExceptionContext) -> None:
    """Raise the error of ours that the driver's stands for. Errors of statements (a broken constraint) pass as they
    are."""
    if context.is_pre_ping:
        return  # the pool asks whether a connection still lives, and makes another where it does not
    error = context.original_exception
    state = getattr(error, "sqlstate", None) or ""
    if state in FULL:
        raise StorageFull(f"The database cannot grow: {FULL[state]}.") from error
    if state == "53300":
        raise TooBusy("The database has no connection left.", retry_after_s=1) from error
    if state in UNUSABLE:
        raise StorageUnavailable(f"The database cannot be used: {UNUSABLE[state]}.") from error
    if context.is_disconnect or state[:2] in ("08", "28", "3D", "57", "53") or _never_connected(context):
        said = (str(error).strip().splitlines() or ["it gave no reason"])[0]
        raise StorageUnavailable(f"The database does not answer: {said}") from error


def _never_connected(context: ExceptionContext) -> bool:
    """Whether the error was met while connecting: such an error has no statement, and mostly no code."""
    return context.connection is None and context.statement is None
