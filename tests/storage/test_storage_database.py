"""The database: the schema that migrations make, what a commit and a read promise, and what is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from shutil import copy
from typing import Any

import alembic.command
import alembic.config
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, RootTransaction, Row, create_engine, insert, inspect, select, text
from sqlalchemy.exc import IntegrityError

from service.errors import InvalidSettings, StorageUnavailable, TooBusy
from service.storage.database import MIGRATIONS, READERS_MAX, Database
from service.storage.tables import metadata, name_versions

PRAGMAS = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


sqlite_only = pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)
postgres_only = pytest.mark.parametrize("new_database", ["postgres"], indirect=True)


@pytest.fixture
def database(tmp_path, new_database):
    opened = Database.open(new_database(tmp_path))
    yield opened
    opened.close()


def names(connection: Connection) -> list[str]:
    return list(connection.execute(select(name_versions.c.name).order_by(name_versions.c.name)).scalars())


def described(connection: Connection) -> dict[str, object]:
    """All that the database knows about each table."""
    inspector = inspect(connection)
    return {
        table: {
            "columns": [
                (c["name"], str(c["type"]), c["nullable"], c["primary_key"]) for c in inspector.get_columns(table)
            ],
            "primary key": inspector.get_pk_constraint(table)["constrained_columns"],
            "foreign keys": inspector.get_foreign_keys(table),
            "unique": inspector.get_unique_constraints(table),
            "indexes": sorted(
                (str(i["name"]), i["column_names"], i["unique"], str(i.get("dialect_options", {}).get("sqlite_where")))
                for i in inspector.get_indexes(table)
            ),
            "checks": inspector.get_check_constraints(table),
            "keys used once": "AUTOINCREMENT"
            in connection.execute(text("SELECT sql FROM sqlite_master WHERE name = :t"), {"t": table}).scalar_one(),
        }
        for table in inspector.get_table_names()
        if table != "alembic_version"
    }


@sqlite_only
def test_migrations_make_what_the_tables_say_to_the_last_check(database):
    declared = create_engine("sqlite://")
    with database.read() as migrated, declared.connect() as created:
        metadata.create_all(created)
        assert set(described(migrated)) == set(metadata.tables)
        assert described(migrated) == described(created)
    declared.dispose()


def test_migrations_make_what_the_tables_say(database):
    with database.read() as migrated:
        context = MigrationContext.configure(migrated, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert set(inspect(migrated).get_table_names()) == {*metadata.tables, "alembic_version"}


def test_a_database_of_each_earlier_schema_is_upgraded_in_place(tmp_path, monkeypatch):
    """Made by the migrations up to that version alone, with a row in every table; the rows are there afterwards."""
    versions = sorted((MIGRATIONS / "versions").glob("v*.py"))
    for newest in range(1, len(versions)):
        scripts = tmp_path / f"migrations{newest}"
        (scripts / "versions").mkdir(parents=True)
        for path in [MIGRATIONS / "env.py", *versions[:newest]]:
            copy(path, scripts / path.relative_to(MIGRATIONS))
        with monkeypatch.context() as earlier:
            earlier.setattr("service.storage.database.MIGRATIONS", scripts)
            database = Database.open(tmp_path / f"{newest}.db")
        with database.write() as connection:
            connection.execute(text("PRAGMA defer_foreign_keys = ON"))
            before = {table: _filled(connection, table) for table in inspect(connection).get_table_names()}
        database.close()
        assert before["memories"]
        upgraded = Database.open(tmp_path / f"{newest}.db")
        with upgraded.read() as connection:
            for table, rows in before.items():
                if table != "alembic_version":
                    columns = ", ".join(rows[0]._fields)  # later schemas may have more
                    assert connection.execute(text(f"SELECT {columns} FROM {table}")).all() == rows
            assert set(inspect(connection).get_table_names()) == {*metadata.tables, "alembic_version"}
            assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
        upgraded.close()


def test_each_schema_can_be_taken_back_to_each_earlier_one(tmp_path, monkeypatch):
    """What later versions added goes, and the rest stays as it was."""
    versions = sorted((MIGRATIONS / "versions").glob("v*.py"))
    for kept in range(1, len(versions)):
        scripts = tmp_path / f"migrations{kept}"
        (scripts / "versions").mkdir(parents=True)
        for path in [MIGRATIONS / "env.py", *versions[:kept]]:
            copy(path, scripts / path.relative_to(MIGRATIONS))
        with monkeypatch.context() as earlier:
            earlier.setattr("service.storage.database.MIGRATIONS", scripts)
            former = Database.open(tmp_path / f"former{kept}.db")
        newest = Database.open(tmp_path / f"newest{kept}.db")
        with newest.write() as connection:
            connection.execute(text("PRAGMA defer_foreign_keys = ON"))
            (before,) = _filled(connection, "collections")
            downgrade(connection, f"{kept:04}")
        with newest.read() as taken_back, former.read() as expected:
            assert described(taken_back) == described(expected)
            (after,) = taken_back.execute(text("SELECT * FROM collections")).all()
            assert after == before[: len(after)]
        newest.close()
        former.close()


def test_all_schemas_can_be_taken_back_and_made_again(database):
    with database.write() as connection:
        downgrade(connection, "base")
        assert set(inspect(connection).get_table_names()) == {"alembic_version"}
    database._migrate()
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def downgrade(connection: Connection, revision: str) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    alembic.command.downgrade(config, revision)


ROW: dict[str, Any] = {"dtype": "f4", "dimension": 1, "vector": b"\0" * 4, "status": "queued"}
ROW_OF: dict[str, dict[str, Any]] = {"kernels": {"status": "active", "weight": b"\0" * 4}}
"""Values that a check asks for; else 1, and 1 is what other tables' rows are called."""


def _filled(connection: Connection, table: str) -> list[Row[Any]]:
    """The table's rows after one was put in, in every column."""
    if table != "alembic_version":
        columns = [column["name"] for column in inspect(connection).get_columns(table)]
        values = {name: {**ROW, **ROW_OF.get(table, {})}.get(name, 1) for name in columns}
        names = ", ".join(columns)
        connection.execute(
            text(f"INSERT INTO {table} ({names}) VALUES ({', '.join(map(':{}'.format, columns))})"), values
        )
    return list(connection.execute(text(f"SELECT * FROM {table}")).all())


@sqlite_only
def test_every_connection_is_durable_and_holds_to_foreign_keys(database):
    with ExitStack() as stack:
        for opened in [database.read(), database.read(), database.write()]:
            connection = stack.enter_context(opened)
            pragmas = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in PRAGMAS}
            assert pragmas == PRAGMAS


def test_write_is_all_or_nothing(database):
    with database.write() as connection:
        connection.execute(insert(name_versions).values(name="kept", version=1))
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(insert(name_versions), [{"name": "lost", "version": 1}, {"name": "kept", "version": 2}])
    with database.read() as connection:
        assert names(connection) == ["kept"]


def test_read_sees_one_state(database):
    with database.read() as reader:
        assert names(reader) == []
        with database.write() as connection:
            connection.execute(insert(name_versions).values(name="later", version=1))
        assert names(reader) == []
    with database.read() as reader:
        assert names(reader) == ["later"]


def test_reopening_keeps_everything(tmp_path, new_database):
    for expected in ([], ["name0"], ["name0", "name1"]):
        database = Database.open(new_database(tmp_path))
        with database.write() as connection:
            assert names(connection) == expected
            connection.execute(insert(name_versions).values(name=f"name{len(expected)}", version=1))
        database.close()
        if isinstance(new_database(tmp_path), Path):
            assert [path.name for path in tmp_path.iterdir()] == ["engram.db"]  # the log was folded in


def test_path_with_odd_characters(tmp_path):
    path = tmp_path / "50% ü?#&" / "engram.db"
    path.parent.mkdir()
    Database.open(path).close()
    assert path.exists()


def test_newer_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "engram.db"
    database = Database.open(path)
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    before = path.read_bytes()
    with pytest.raises(StorageUnavailable, match=r"newer version of Engram \(schema 9999\)"):
        Database.open(path)
    assert path.read_bytes() == before


def test_file_that_is_not_a_database_is_refused(tmp_path):
    path = tmp_path / "engram.db"
    path.write_bytes(b"not a database, and longer than the hundred bytes of a header" * 10)
    with pytest.raises(StorageUnavailable, match="not an SQLite database"):
        Database.open(path)


def test_damaged_database_is_reported(tmp_path):
    path = tmp_path / "engram.db"
    database = Database.open(path)
    with database.write() as connection:
        rows = [{"name": f"{i:0500}", "version": i} for i in range(100)]
        connection.execute(insert(name_versions), rows)
    database.close()
    size_bytes = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size_bytes - 20 * 4096)
        file.write(b"\xff" * 20 * 4096)
    database = Database.open(path)
    with pytest.raises(StorageUnavailable, match="damaged"), database.read() as connection:
        names(connection)
    database.close()


def test_database_without_permission_is_refused(tmp_path, unprivileged):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with unprivileged(), pytest.raises(StorageUnavailable, match="cannot be opened"):
        Database.open(closed / "engram.db")


def test_database_on_a_read_only_file_system_is_refused(mount):
    with pytest.raises(StorageUnavailable, match="cannot be used"):
        Database.open(mount("size=1m,ro") / "engram.db")


def test_more_readers_than_connections_are_told(database):
    with ExitStack() as stack:
        for _ in range(READERS_MAX):
            stack.enter_context(database.read())
        with pytest.raises(TooBusy, match="readers"), database.read():
            pass
    with database.read() as connection:
        assert names(connection) == []


def test_servers_that_start_together_make_one_schema(tmp_path, new_database):
    place = new_database(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(Database.open, [place] * 4))
    for each in opened:
        with each.read() as connection:
            assert names(connection) == []
        each.close()


@pytest.mark.parametrize(
    ("url", "error", "says"),
    [
        ("postgresql://postgres@127.0.0.1:1/postgres", StorageUnavailable, "refused"),
        ("postgresql://postgres@127.0.0.1:5432/there_is_none", StorageUnavailable, "there_is_none"),
        ("mysql://root@localhost/test", InvalidSettings, "begins with postgresql://"),
        ("nonsense", InvalidSettings, "cannot be read"),
    ],
)
def test_a_database_that_is_not_there_is_told(url, error, says):
    with pytest.raises(error, match=says):
        Database.open(url)


@postgres_only
def test_a_lost_connection_costs_a_read_nothing(database, tmp_path, new_database):
    with database.read() as connection:
        lost = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    terminated(new_database(tmp_path), lost)
    with database.read() as connection:
        assert names(connection) == []


@postgres_only
@pytest.mark.parametrize("stands", [True, False])
def test_a_commit_whose_answer_is_lost_is_known_for_what_it_is(database, tmp_path, new_database, monkeypatch, stands):
    """The connection is cut just after, or just before, the server commits."""
    commits, here = RootTransaction.commit, threading.get_ident()

    def cut(transaction):
        if threading.get_ident() != here:  # a client in this process, which other tests opened, commits as it likes
            return commits(transaction)
        pid = transaction.connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        if stands:
            commits(transaction)
        terminated(new_database(tmp_path), pid)
        if not stands:
            commits(transaction)
        raise StorageUnavailable("the answer was lost")

    monkeypatch.setattr(RootTransaction, "commit", cut)
    write = insert(name_versions).values(name="a", version=1)
    if stands:
        with database.write() as connection:
            connection.execute(write)
    else:
        with pytest.raises(StorageUnavailable), database.write() as connection:
            connection.execute(write)
    monkeypatch.undo()
    with database.read() as connection:
        assert names(connection) == (["a"] if stands else [])


def terminated(url, pid):
    """End a session of the server, and wait until it is gone."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        assert connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid}).scalar_one()
    engine.dispose()
