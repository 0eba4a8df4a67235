"""Snapshots at set times: made once, by one server; the newest are kept, and nothing else is touched."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from service.app.engine import Engine
from service.app.schemas import CollectionConfig, StoreRequest
from service.app.snapshot_schemas import RestoreRequest, ScheduleRequest, SnapshotSchedule
from service.errors import CollectionNotFound, ScheduleNotFound
from service.settings import Settings
from service.storage.tables import snapshot_schedules
from workers.loop import running

EVERY_S = 3_600


@pytest.fixture
def settings(tmp_path: Path, new_database: Callable[[Path], Path | str]) -> Settings:
    where = new_database(tmp_path / "memories")
    return Settings(data=tmp_path / "memories", database_url=where if isinstance(where, str) else None)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    with Engine(settings) as opened, running(opened):
        opened.create_collection("c", CollectionConfig.model_validate({"spaces": {"v": {"dimension": 2}}}))
        opened.store("c", StoreRequest.model_validate({"memories": [{"id": "a", "vectors": {"v": [1, 0]}}]}))
        yield opened


def scheduled(engine: Engine, keep: int = 2, every_s: int = EVERY_S) -> SnapshotSchedule:
    return engine.put_snapshot_schedule("c", ScheduleRequest(every_s=every_s, keep=keep))


def set_due(engine: Engine, ago_s: float = 1) -> datetime:
    """As if the time had come so long ago; that time."""
    due = datetime.now(UTC) - timedelta(seconds=ago_s)
    change = update(snapshot_schedules).values(next_at=due)
    engine.repository._writer.submit(lambda connection: connection.execute(change))
    return due


def settled(engine: Engine, since: SnapshotSchedule | None = None) -> SnapshotSchedule:
    """The schedule once another one was made, or failed, and none is under way."""
    deadline = time.monotonic() + 60
    while True:
        engine.snapshot_on_schedule()
        now = engine.snapshot_schedule("c")
        ended = (now.made_at, now.failed_at) != ((None, None) if since is None else (since.made_at, since.failed_at))
        if ended and now.operation is None:
            return now
        assert time.monotonic() < deadline
        time.sleep(0.02)


def made(engine: Engine) -> list[str]:
    return [info.id for info in engine.snapshots("c").snapshots]


def by_hand(engine: Engine) -> str:
    operation = engine.create_snapshot("c")
    while engine.operation(operation.id).status != "done":
        time.sleep(0.01)
    return str((engine.operation(operation.id).result or {})["id"])


def jobs(engine: Engine) -> int:
    return sum(operation.kind == "snapshot" for operation in engine.operations().operations)


def test_the_newest_of_its_own_are_kept_and_others_never_touched(engine: Engine) -> None:
    others = [by_hand(engine)]
    with pytest.raises(ScheduleNotFound):
        engine.snapshot_schedule("c")
    scheduled(engine)
    first = settled(engine)
    assert first.snapshot is not None
    assert first.snapshot.startswith("scheduled-20")
    assert datetime.fromisoformat(first.next_at) > datetime.now(UTC) + timedelta(seconds=EVERY_S - 60)
    own = [first.snapshot]
    last = first
    for _ in range(3):
        set_due(engine)
        last = settled(engine, last)
        assert last.snapshot is not None
        own.append(last.snapshot)
    others.append(by_hand(engine))
    assert set(made(engine)) == {*others, *own[-2:]}
    engine.delete_snapshot("c", own[-1])  # by somebody: it counts no more
    set_due(engine)
    last = settled(engine, last)
    assert set(made(engine)) == {*others, own[-2], last.snapshot}
    engine.delete_snapshot_schedule("c")
    engine.delete_snapshot_schedule("c")
    scheduled(engine, keep=1)
    settled(engine)
    assert set(made(engine)) > {*others, own[-2], last.snapshot}, "what was made under another schedule stays"
    engine.delete_collection("c")
    with pytest.raises(CollectionNotFound):
        engine.snapshot_schedule("c")
    with pytest.raises(CollectionNotFound):
        scheduled(engine)


def test_what_was_missed_is_made_up_for_once(settings: Settings, engine: Engine) -> None:
    scheduled(engine)
    first = settled(engine)
    due = set_due(engine, ago_s=10.5 * EVERY_S)
    last = settled(engine, first)
    for _ in range(3):
        engine.snapshot_on_schedule()
    assert jobs(engine) == 2
    assert datetime.fromisoformat(last.next_at) == due + timedelta(seconds=11 * EVERY_S)
    changed = scheduled(engine, every_s=EVERY_S + 100)
    assert datetime.fromisoformat(changed.next_at) == due + timedelta(seconds=11 * EVERY_S + 100)
    assert scheduled(engine, every_s=EVERY_S + 100) == changed == engine.snapshot_schedule("c")


def test_one_that_fails_says_so_and_the_next_is_tried(engine: Engine) -> None:
    scheduled(engine, keep=1)
    first = settled(engine)
    folder = engine.folder.path / "snapshots" / "c"
    folder.rename(folder.with_name("away"))
    folder.write_bytes(b"")  # no folder: nothing is kept in it
    set_due(engine)
    failed = settled(engine, first)
    assert failed.error is not None
    assert failed.error.code == "storage_unavailable"
    assert (failed.snapshot, failed.made_at) == (first.snapshot, first.made_at)
    assert datetime.fromisoformat(failed.next_at) > datetime.now(UTC) + timedelta(seconds=EVERY_S - 60)
    assert engine.operations().operations[0].status == "failed"
    folder.unlink()
    folder.with_name("away").rename(folder)
    assert made(engine) == [first.snapshot]
    engine.retry(engine.operations().operations[0].id)  # it still counts as the schedule's own
    again = settled(engine, failed)
    assert (again.error, again.failed_at, made(engine)) == (None, None, [again.snapshot])


def test_a_restore_over_the_collection_keeps_its_schedule(engine: Engine) -> None:
    kept = by_hand(engine)
    scheduled(engine)
    before = settled(engine)
    operation = engine.restore("c", kept, RestoreRequest(replace=True))
    while engine.operation(operation.id).status != "done":
        time.sleep(0.01)
    assert engine.snapshot_schedule("c") == before
    set_due(engine)
    after = settled(engine, before)
    assert set(made(engine)) == {kept, before.snapshot, after.snapshot}
    operation = engine.restore("c", kept, RestoreRequest(into="d"))
    while engine.operation(operation.id).status != "done":
        time.sleep(0.01)
    with pytest.raises(ScheduleNotFound):
        engine.snapshot_schedule("d")


def test_a_schedule_waits_for_one_that_is_made_by_hand(settings: Settings) -> None:
    with Engine(settings) as engine:  # without workers: what is queued stays so
        engine.create_collection("c", CollectionConfig.model_validate({"spaces": {"v": {"dimension": 2}}}))
        operation = engine.create_snapshot("c")
        scheduled(engine)
        engine.snapshot_on_schedule()
        assert jobs(engine) == 1
        engine.cancel(operation.id)
        engine.snapshot_on_schedule()
        engine.snapshot_on_schedule()
        under_way = engine.snapshot_schedule("c").operation
        assert (jobs(engine), engine.operation(under_way or "").status) == (2, "queued")
        set_due(engine)  # the last one takes longer than the interval
        engine.snapshot_on_schedule()
        assert jobs(engine) == 2
        engine.cancel(under_way or "")
        engine.snapshot_on_schedule()
        assert jobs(engine) == 3
        cancelled = engine.snapshot_schedule("c").error
        assert cancelled is not None
        assert cancelled.code == "cancelled"


def test_of_several_servers_one_makes_it(postgres_schema: Callable[[], str], tmp_path: Path) -> None:
    url = postgres_schema()
    shared = {"originals": tmp_path / "originals", "snapshots": str(tmp_path / "snapshots"), "database_url": url}
    with ExitStack() as stack:
        engines = [
            stack.enter_context(Engine(Settings.model_validate({"data": tmp_path / name, **shared})))
            for name in ("one", "other", "third")
        ]
        for name in "cdef":
            engines[0].create_collection(name, CollectionConfig.model_validate({"spaces": {"v": {"dimension": 2}}}))
            engines[0].put_snapshot_schedule(name, ScheduleRequest(every_s=60))
        for _ in range(4):  # none may be queued twice, however often servers look at once
            looks = [threading.Thread(target=engine.snapshot_on_schedule) for engine in engines]
            for look in looks:
                look.start()
            for look in looks:
                look.join()
            assert jobs(engines[0]) == 4
            set_due(engines[0])
        for engine in engines:
            stack.enter_context(running(engine))
        deadline = time.monotonic() + 60
        while any(len(engines[1].snapshots(name).snapshots) < 2 for name in "cdef"):  # the former, and what is due now
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert jobs(engines[2]) == 8
