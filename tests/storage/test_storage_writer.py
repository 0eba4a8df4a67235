"""Group commit: answered means committed, and a write that fails fails alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy import insert, select

from service.errors import CollectionNotFound, StorageFull, TooBusy, Unavailable
from service.storage.database import Database
from service.storage.tables import name_versions
from service.storage.writer import GROUP_MAX, Writer


@pytest.fixture
def database(tmp_path, new_database):
    opened = Database.open(new_database(tmp_path))
    yield opened
    opened.close()


@pytest.fixture
def writer(database):
    opened = Writer(database, queue_max=2 * GROUP_MAX)
    yield opened
    opened.close()


@contextmanager
def occupied(writer, pool):
    """Keep the writer busy, so that what is submitted inside waits and is then run as a group."""
    begun, release = threading.Event(), threading.Event()
    first = pool.submit(writer.submit, lambda _: begun.set() or release.wait())
    begun.wait()
    try:
        yield
    finally:
        release.set()
        first.result()


def wait_until_queued(writer, count):
    while len(writer._queue) < count:
        time.sleep(0.001)


def named(name):
    def run(connection):
        connection.execute(insert(name_versions).values(name=name, version=1))
        return 1

    return run


def stored(database):
    with database.read() as connection:
        return set(connection.execute(select(name_versions.c.name)).scalars())


def test_result_is_returned_and_its_work_is_visible_to_others(database, writer):
    assert writer.submit(named("a")) == 1
    assert stored(database) == {"a"}


def test_eight_threads_of_which_one_fails(database, writer):
    def work(thread):
        for i in range(20):
            if thread == 7:
                with pytest.raises(CollectionNotFound, match=f"no {i}"):
                    writer.submit(lambda connection, i=i: failing(connection, i))
            else:
                writer.submit(named(f"{thread}-{i}"))
                assert f"{thread}-{i}" in stored(database)

    def failing(connection, i):
        named(f"7-{i}")(connection)
        raise CollectionNotFound(f"no {i}")

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, thread) for thread in range(8)]:
            done.result()
    assert stored(database) == {f"{thread}-{i}" for thread in range(7) for i in range(20)}


def test_one_group_has_one_commit_and_undoes_only_what_failed(database, writer):
    seen = []

    def group_member(i):
        def run(connection):
            seen.append((i, connection))
            named(f"name{i}")(connection)
            if i == 3:
                named("name3")(connection)  # breaks the primary key

        return run

    with ThreadPoolExecutor(GROUP_MAX + 1) as pool:
        with occupied(writer, pool):
            waiting = []
            for i in range(GROUP_MAX):
                waiting.append(pool.submit(writer.submit, group_member(i)))
                wait_until_queued(writer, i + 1)
        errors = [future.exception() for future in waiting]
    assert [i for i, _ in seen] == list(range(GROUP_MAX))  # in the order they came, each once
    assert len({id(connection) for _, connection in seen}) == 1
    assert [i for i, error in enumerate(errors) if error] == [3]
    assert stored(database) == {f"name{i}" for i in range(GROUP_MAX) if i != 3}


@pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)
def test_write_that_finds_the_disk_full_does_not_take_its_group_along(database, writer):
    def limit(connection):
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        assert connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 20}").scalar_one() == pages + 20

    writer.submit(named("before"))
    writer.submit(limit)
    with ThreadPoolExecutor(4) as pool:
        with occupied(writer, pool):
            waiting = []
            for name in ("first", "x" * 1_000_000, "last"):
                waiting.append(pool.submit(writer.submit, named(name)))
                wait_until_queued(writer, len(waiting))
        first, huge, last = waiting
        assert (first.result(), last.result()) == (1, 1)
        with pytest.raises(StorageFull, match="disk is full"):
            huge.result()
    assert stored(database) == {"before", "first", "last"}


def test_full_queue_is_refused(database):
    writer = Writer(database, queue_max=2)
    with ThreadPoolExecutor(3) as pool:
        with occupied(writer, pool):
            waiting = [pool.submit(writer.submit, named(name)) for name in ("a", "b")]
            wait_until_queued(writer, 2)
            with pytest.raises(TooBusy) as refused:
                writer.submit(named("c"))
            assert refused.value.retry_after_s
        assert [future.result() for future in waiting] == [1, 1]
    writer.close()
    assert stored(database) == {"a", "b"}


def test_close_finishes_what_was_accepted_and_refuses_the_rest(database, writer):
    with ThreadPoolExecutor(7) as pool:
        with occupied(writer, pool):
            waiting = [pool.submit(writer.submit, named(f"name{i}")) for i in range(5)]
            wait_until_queued(writer, 5)
            closing = pool.submit(writer.close)
            while not writer._closed:
                time.sleep(0.001)
            with pytest.raises(Unavailable, match="shutting down"):
                writer.submit(named("late"))
        closing.result()
        assert [future.result() for future in waiting] == [1] * 5
    assert stored(database) == {f"name{i}" for i in range(5)}
    writer.close()


def test_write_inside_a_write_is_refused_instead_of_waiting_forever(writer):
    with pytest.raises(RuntimeError, match="cannot wait"):
        writer.submit(lambda _: writer.submit(named("inner")))


def test_a_group_locks_its_collections_in_one_order(writer):
    """Else two servers whose groups name the same collections hold what the other waits for: a deadlock each second."""
    ran = []
    with ThreadPoolExecutor(GROUP_MAX) as pool:
        with occupied(writer, pool):
            writes = []
            for number, on in enumerate([3, 1, None, 3, 1, 2]):
                run = lambda _, number=number, on=on: ran.append((on or 0, number))  # noqa: E731
                writes.append(pool.submit(writer.submit, run, on=on))
                wait_until_queued(writer, number + 1)
        for write in writes:
            write.result()
    assert ran == [(0, 2), (1, 1), (1, 4), (2, 5), (3, 0), (3, 3)]
