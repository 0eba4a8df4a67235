"""Two engines on one PostgreSQL database: what one commits, the other answers by."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.app.engine import Engine
from service.app.memory_schemas import DeleteRequest
from service.app.notices import Notices
from service.app.reencode_schemas import ReencodeRequest
from service.app.schemas import CollectionConfig, Operation, RecallRequest, StoreRequest, TrainRequest
from service.app.snapshot_schemas import RestoreRequest
from service.errors import CollectionExists, CollectionNotFound, OriginalsElsewhere, TooBusy
from service.settings import Settings
from workers.loop import running

D = 8
RNG = np.random.default_rng(5)
ROWS = RNG.standard_normal((120, D)).astype(np.float32)
WAIT_S = 60.0  # a loaded machine calibrates slowly
REDIS = os.environ.get("TEST_REDIS", "redis://127.0.0.1:6379")

Open = Callable[..., Engine]


@pytest.fixture
def opened(postgres_schema: Callable[[], str], tmp_path: Path) -> Iterator[Open]:
    """Opens engines on one database, each on its own folder, with one folder of originals."""
    url = postgres_schema()
    with ExitStack() as stack:

        def open_engine(name: str, *, jobs: bool = True, originals: Path | None = tmp_path / "originals") -> Engine:
            settings = Settings(
                data=tmp_path / name,
                database_url=url,
                originals=originals,
                jobs=jobs,
                snapshots=str(tmp_path / "snapshots"),
            )
            engine = stack.enter_context(Engine(settings))
            stack.enter_context(running(engine))
            return engine

        yield open_engine


def create(engine: Engine, name: str = "c", **config: Any) -> None:
    engine.create_collection(name, CollectionConfig.model_validate(config or {"spaces": {"v": {"dimension": D}}}))


def store(engine: Engine, rows: dict[str, int], name: str = "c") -> int:
    memories = [{"id": id_, "vectors": {"v": ROWS[at].tolist()}, "payload": {"at": at}} for id_, at in rows.items()]
    reply = engine.store(name, StoreRequest.model_validate({"memories": memories}))
    assert reply.version is not None
    return reply.version


def found(engine: Engine, at: int, name: str = "c", **options: Any) -> tuple[int, list[str]]:
    cue = {"cue": {"vectors": {"v": ROWS[at].tolist()}}, "gate": False, "limit": 3}
    reply = engine.recall(name, RecallRequest.model_validate(cue | options))
    return reply["version"], [match["id"] for match in reply["results"][0]["matches"]]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def at_version(engine: Engine, version: int, name: str = "c") -> None:
    until(lambda: engine.collection(name).version >= version)


def test_what_one_stores_replaces_and_deletes_the_other_recalls(opened: Open) -> None:
    one, other = opened("one"), opened("other")
    create(one)
    at_version(other, store(one, {"a": 0, "b": 1}))
    assert found(other, 0)[1][0] == "a"
    at_version(one, store(other, {"a": 2, "c": 3}))
    assert found(one, 2)[1][0] == "a"
    assert found(one, 2)[0] == 2
    deleted = other.delete("c", DeleteRequest(ids=["a", "b"]))
    at_version(one, deleted.version)
    assert found(one, 0)[1] == ["c"]
    other.delete_collection("c")
    until(lambda: not one.collections().collections)
    with pytest.raises(CollectionNotFound):
        one.collection("c")


def test_a_collection_is_known_to_the_other_at_once(opened: Open) -> None:
    one, other = opened("one"), opened("other")
    create(one)
    assert other.collection("c").count == 0
    with pytest.raises(CollectionExists):
        create(other)


def test_writes_of_both_at_once_make_the_same_banks(opened: Open) -> None:
    """Each id is written by one server alone, so that what must be there at the end is known."""
    engines = [opened("one"), opened("other")]
    create(engines[0])
    expected: dict[str, int] = {}

    def write(engine: Engine, number: int) -> None:
        rng = np.random.default_rng(number)
        for _ in range(40):
            rows = {f"{number}-{rng.integers(30)}": int(rng.integers(len(ROWS))) for _ in range(4)}
            store(engine, rows)
            expected.update(rows)
            gone = [f"{number}-{rng.integers(30)}"]
            engine.delete_memories("c", gone)
            expected.pop(gone[0], None)

    threads = [threading.Thread(target=write, args=(engine, n)) for n, engine in enumerate(engines)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    version = max(engine.collection("c").version for engine in engines)
    for engine in engines:
        at_version(engine, version)
        view = engine.resources.live("c").bank.view()
        assert sorted(view.all_ids()) == sorted(expected)
        for id_, at in expected.items():
            others = [other for other in expected if other != id_]
            cue = {"cue": {"vectors": {"v": ROWS[at].tolist()}}, "gate": False, "exclude": others}
            reply = engine.recall("c", RecallRequest.model_validate(cue))
            (match,) = reply["results"][0]["matches"]
            assert (match["id"], match["payload"]) == (id_, {"at": at})
            assert match["similarity"] == pytest.approx(1.0, abs=1e-5)


def test_a_server_that_was_away_longer_than_deletions_are_kept_catches_up(opened: Open) -> None:
    one = opened("one")
    other = opened("other")
    create(one)
    at_version(other, store(one, {"a": 0, "b": 1}))
    other._follower.stop()
    one.delete_memories("c", ["a"])
    version = store(one, {"d": 4})
    one.repository.forget_deletions(older_than_s=-1)
    other.resources.live("c").catch_up()
    assert found(other, 0)[0] == version
    assert sorted(found(other, 0)[1]) == ["b", "d"]


def test_what_one_calibrates_the_other_judges_by(opened: Open) -> None:
    one, other = opened("one"), opened("other", jobs=False)
    create(one)
    store(other, {str(i): i for i in range(len(ROWS))})

    def verdicts(engine: Engine) -> list[Any]:
        cues = [{"vectors": {"v": vector.tolist()}} for vector in (ROWS[7], -ROWS[:50].sum(0))]
        reply = engine.recall("c", RecallRequest.model_validate({"cues": cues}))
        return [(result["verdict"], result["gate"]) for result in reply["results"]]

    until(lambda: one.collection("c").calibration.state == "current")
    until(lambda: other.collection("c").calibration.state == "current")
    assert verdicts(one) == verdicts(other)
    assert verdicts(other)[0][0] == "known"
    kernel = TrainRequest.model_validate({"what": "kernel", "time_limit_s": 1})
    operation = other.train("c", kernel)
    until(lambda: other.operation(operation.id).status not in ("queued", "running"))
    assert other.operation(operation.id).status == "done", other.operation(operation.id)
    kept = [each.id for each in one.collection("c").kernels]
    until(lambda: [each.id for each in other.collection("c").kernels] == kept)
    assert verdicts(one) == verdicts(other)


def test_a_job_is_done_on_what_was_stored_before_it_was_queued(opened: Open) -> None:
    """Else a server that has not looked yet calibrates an empty bank, and nobody asks for a calibration again."""
    one, other = opened("one"), opened("other", jobs=False)
    create(one)
    one._follower.stop()
    store(other, {str(i): i for i in range(len(ROWS))})
    until(lambda: other.collection("c").calibration.state == "current")
    assert other.collection("c").calibration.rows_then == len(ROWS)


def test_a_write_that_stands_is_not_said_to_have_failed(opened: Open) -> None:
    """Its caller would do it again. What the bank lacks by then comes a second later."""
    one, other = opened("one", jobs=False), opened("other", jobs=False)
    create(one)
    live = one.resources.live("c")
    read_log = live.read_log

    def busy() -> None:
        raise TooBusy("readers are using the database")

    with one._follower._syncing:
        live.read_log = busy
        store(other, {"a": 0})
        assert store(one, {"b": 1}) == 2
        assert live.bank.version == 0
        live.read_log = read_log
    at_version(one, 2)
    assert found(one, 1)[1][0] == "b"


def test_a_job_that_another_server_does_is_waited_for(opened: Open) -> None:
    one, other = opened("one"), opened("other", jobs=False)
    create(one, spaces={"t": {"encoder": "sentence", "source": "text"}})
    reply = other.store("c", StoreRequest.model_validate({"memories": [{"id": "s", "text": "a cat"}]}))
    assert [result.status for result in reply.results] == ["stored"]
    recalled = other.recall("c", RecallRequest.model_validate({"cue": {"text": "a cat"}}))
    assert recalled["results"][0]["matches"][0]["id"] == "s"


def test_an_encoder_that_one_changes_is_the_others_too(opened: Open) -> None:
    one, other = opened("one"), opened("other")
    create(one, spaces={"t": {"encoder": "sentence", "source": "text"}})
    one.store("c", StoreRequest.model_validate({"memories": [{"id": "s", "text": "a cat on a mat"}]}))
    before = other.collection("c").spaces["t"].fingerprint
    operation = one.reencode(
        "c", "t", ReencodeRequest.model_validate({"encoder": "pixel_text", "options": {"encoder": "pixels"}})
    )
    until(lambda: one.operation(operation.id).status not in ("queued", "running"))
    assert one.operation(operation.id).status == "done", one.operation(operation.id)
    reply = other.store("c", StoreRequest.model_validate({"memories": [{"id": "r", "text": "a dog"}]}))
    assert [result.status for result in reply.results] == ["stored"]
    until(lambda: other.collection("c").spaces["t"].fingerprint != before)
    at_version(one, reply.version or 0)
    for engine in (one, other):
        recalled = engine.recall("c", RecallRequest.model_validate({"cue": {"text": "a dog"}, "gate": False}))
        assert recalled["results"][0]["matches"][0]["id"] == "r"


def ended(engine: Engine, operation: Operation) -> dict[str, Any]:
    until(lambda: engine.operation(operation.id).status not in ("queued", "running"))
    found = engine.operation(operation.id)
    assert found.status == "done", found
    return found.result or {}


def test_what_one_restores_the_other_answers_by(opened: Open) -> None:
    """Over a collection, which is gone there then, and into a new name."""
    one, other = opened("one"), opened("other", jobs=False)
    create(one)
    at_version(other, store(one, {str(i): i for i in range(60)}))
    until(lambda: one.collection("c").calibration.state == "current")
    until(lambda: other.collection("c").calibration.state == "current")
    cues: dict[str, Any] = {"cues": [{"vectors": {"v": each.tolist()}} for each in (ROWS[7], -ROWS[:50].sum(0))]}
    cues["exclude"] = ["after"]  # as before it was stored

    def verdicts(engine: Engine, name: str) -> list[Any]:
        results = engine.recall(name, RecallRequest.model_validate(cues))["results"]
        return [(result["verdict"], result["gate"], result["matches"][0]["id"]) for result in results]

    before = verdicts(other, "c")
    assert before[0][0] == "known"
    kept = ended(one, one.create_snapshot("c"))["id"]
    one.delete_memories("c", ["7"])
    at_version(other, store(other, {"new": 70}))
    former = other.resources.live("c")
    done = ended(one, one.restore("c", kept, RestoreRequest(replace=True)))
    written = store(other, {"after": 71})  # at once: to what was restored, whether it is seen here already or not
    assert written > done["version"]
    at_version(one, written)
    for engine in (one, other):
        assert found(engine, 71)[1][0] == "after"
        assert engine.collection("c").version >= written
        assert engine.collection("c").count == 61
        assert found(engine, 70)[1][0] != "new"
        assert verdicts(engine, "c") == before
    until(lambda: other.resources.find(former.id) is None)
    assert other.resources.live("c").id == one.resources.live("c").id != former.id
    done = ended(one, one.restore("c", kept, RestoreRequest(into="d")))
    assert other.collection("d").version == done["version"], "a name that is not known here is looked for at once"
    assert verdicts(other, "d") == before == verdicts(one, "d")
    deleted = other.delete_memories("c", ["7"])
    at_version(one, deleted.version)
    assert found(one, 7)[1][0] != "7"


def test_what_one_restores_is_seen_within_the_poll(opened: Open) -> None:
    one, other = opened("one"), opened("other", jobs=False)
    create(one)
    at_version(other, store(one, {"a": 0, "b": 1}))
    kept = ended(one, one.create_snapshot("c"))["id"]
    at_version(other, store(one, {"c": 2}))
    done = ended(one, one.restore("c", kept, RestoreRequest(replace=True)))
    until(lambda: found(other, 2) == (done["version"], found(one, 2)[1]))
    assert "c" not in found(other, 2)[1]
    assert [live.name for live in other.resources.all_lives()] == ["c"]


def test_a_server_with_originals_of_its_own_is_refused(opened: Open, tmp_path: Path) -> None:
    opened("one")
    with pytest.raises(OriginalsElsewhere, match="ENGRAM_ORIGINALS"):
        opened("other", originals=None)


def test_notices_are_heard_by_the_others_at_once() -> None:
    heard = {"one": threading.Event(), "other": threading.Event()}
    work = threading.Event()

    def hear(of_job: bool) -> None:
        heard["other"].set()
        if of_job:
            work.set()

    channel = f"test:{uuid.uuid4()}"
    one = Notices(REDIS, channel, lambda of_job: heard["one"].set())
    other = Notices(REDIS, channel, hear)
    try:
        for event in heard.values():  # each looks once when it begins to listen
            assert event.wait(WAIT_S)
            event.clear()
        work.clear()
        one.tell(False)
        assert heard["other"].wait(WAIT_S)
        assert not work.is_set()
        one.tell(True)
        assert work.wait(WAIT_S)
        assert not heard["one"].is_set(), "nobody hears its own"
    finally:
        one.close()
        other.close()
