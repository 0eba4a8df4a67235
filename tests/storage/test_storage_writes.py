"""Writes that rest on what is stored: on a version, on a receipt, on what has not expired; and changes of a part."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from sqlalchemy import update

from service.errors import (
    CollectionNotFound,
    Conflict,
    EncodersChanged,
    IdempotencyKeyReused,
    InvalidRequest,
    MemoryNotFound,
    OperationNotFound,
    PreconditionFailed,
)
from service.storage import writes as writes_module
from service.storage.jobs import ItemAnswer, JobItems, NewItem, NewJob
from service.storage.memories import MemoryWrite, Written, microseconds_now
from service.storage.receipts import KEPT_S, AlreadyDone, Asked, Receipt
from service.storage.tables import receipts
from service.storage.updates import MemoryChange


def vector(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


@pytest.fixture
def repository(storage):
    return storage.repository


@pytest.fixture
def collection(repository):
    return repository.create_collection("c", {}).id


def expired(repository, collection, *ids):
    """Store memories that have expired at return."""
    repository.put_memories(collection, [MemoryWrite(id_, expires_at=microseconds_now() + 1000) for id_ in ids])
    time.sleep(0.002)


# --- on a version -----------------------------------------------------------------------------------------------------


def test_a_write_wants_its_memory_at_a_version(repository, collection):
    def put(*writes):
        written = repository.put_memories(collection, [MemoryWrite(id_, if_version=at) for id_, at in writes])
        return written.version, [s if isinstance(s, str) else s.code for s in written.statuses]

    refused = PreconditionFailed.code
    assert put(("a", 0), ("b", 1)) == (1, ["stored", refused])
    assert put(("a", 0), ("b", 3)) == (1, [refused, refused]), "nothing is written, so no version is taken"
    assert put(("a", 1), ("a", 1), ("a", 2), ("b", 0)) == (2, ["updated", refused, "updated", "stored"])
    with pytest.raises(PreconditionFailed, match="at version 2"):
        repository.delete_memories(collection, ["a"], if_version=1)
    with pytest.raises(PreconditionFailed, match="no memory x"):
        repository.delete_memories(collection, ["x"], if_version=1)
    assert repository.delete_memories(collection, ["a"], if_version=2).ids == ["a"]
    assert put(("a", 2)) == (3, [refused])
    assert put(("a", 0)) == (4, ["stored"])


def test_what_is_refused_of_a_job_is_answered_and_the_last_write_stays(repository, collection):
    job = repository.enqueue("store", collection, {}, [NewItem({}), NewItem({}), NewItem({})])
    repository.claim(["store"], "me")
    writes = [MemoryWrite("a", text="one"), MemoryWrite("a", text="two", if_version=7), MemoryWrite("b", if_version=0)]
    repository.put_memories(collection, writes, [JobItems(job, [0, 1, 2], [{"n": 0}, {"n": 1}, {"n": 2}])])
    first, second, third = repository.item_answers(job)
    assert first == ItemAnswer(0, "done", {"id": "a", "status": "stored", "version": 1, "n": 0})
    assert (second.status, second.result["error"]["code"], second.result["n"]) == ("failed", "precondition_failed", 1)
    assert third.status == "done"
    assert repository.get_memory(collection, "a").text == "one"


# --- changes of a part ------------------------------------------------------------------------------------------------


def test_a_change_leaves_the_rest(repository, collection):
    whole = MemoryWrite("a", "text", {"k": 1}, None, None, {"x": vector(1), "y": vector(2, 3)}, 2**60)
    repository.put_memories(collection, [whole])
    before = repository.get_memory(collection, "a")

    changed = repository.change_memory(collection, "a", MemoryChange(payload=lambda payload: {**payload, "n": 2}))
    assert (changed.version, changed.payload, changed.expires_at) == (2, {"k": 1, "n": 2}, 2**60)
    assert {name: block.tolist() for name, block in changed.vectors.items()} == {"x": [1], "y": [2, 3]}

    change = MemoryChange({"text": None, "expires_at": None}, vectors={"x": None, "z": vector(9)}, if_version=2)
    changed = repository.change_memory(collection, "a", change)
    assert {name: block.tolist() for name, block in changed.vectors.items()} == {"y": [2, 3], "z": [9]}
    after = repository.get_memory(collection, "a")
    assert (after.text, after.payload, after.expires_at, after.spaces) == (None, {"k": 1, "n": 2}, None, ("y", "z"))
    assert (after.created_at, after.version) == (before.created_at, 3)
    assert {n: v.tolist() for n, v in repository.get_vectors(collection, "a").items()} == {"y": [2, 3], "z": [9]}


def test_a_change_that_cannot_be_leaves_all(repository, collection):
    repository.put_memories(collection, [MemoryWrite("a", payload={}, vectors={"x": vector(1)})])
    with pytest.raises(InvalidRequest, match="nothing would be left"):
        repository.change_memory(collection, "a", MemoryChange({"text": "t"}, vectors={"x": None}))
    with pytest.raises(PreconditionFailed):
        repository.change_memory(collection, "a", MemoryChange({"text": "t"}, if_version=2))
    with pytest.raises(MemoryNotFound):
        repository.change_memory(collection, "b", MemoryChange({"text": "t"}))
    with pytest.raises(EncodersChanged):
        repository.change_memory(collection, "a", MemoryChange({"text": "t"}), generation=1)
    assert (repository.get_collection("c").version, repository.get_memory(collection, "a").text) == (1, None)


def test_changes_at_one_moment_all_stay(repository, collection):
    repository.put_memories(collection, [MemoryWrite("a", payload={}, vectors={"x": vector(0)})])

    def change(n):
        for i in range(5):
            repository.change_memory(collection, "a", MemoryChange(payload=lambda p, i=i: {**p, f"{n}.{i}": n}))

    threads = [threading.Thread(target=change, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(repository.get_memory(collection, "a").payload) == 20


# --- expiry -----------------------------------------------------------------------------------------------------------


def test_what_has_expired_is_not_there_and_is_deleted(repository, collection, monkeypatch):
    monkeypatch.setattr(writes_module, "EXPIRED_AT_ONCE", 2)
    later = microseconds_now() + 10**9
    repository.put_memories(collection, [MemoryWrite("stays"), MemoryWrite("later", expires_at=later)])
    expired(repository, collection, "1", "2", "3")
    with pytest.raises(MemoryNotFound):
        repository.get_memory(collection, "1")
    with pytest.raises(MemoryNotFound):
        repository.change_memory(collection, "1", MemoryChange({"text": "t"}))
    assert [m.id for m in repository.get_memories(collection, ["1", "stays", "later"]).memories] == ["stays", "later"]
    assert [m.id for m in repository.scroll(collection, None, 0, 10).memories] == ["stays", "later"]
    assert repository.count_where(collection, None) == (2, 2)
    assert repository.delete_memories(collection, ["1"]).ids == []
    with repository.iter_patterns(collection, []) as stream:  # a bank has them, with their moments
        expires = {i: m for chunk in stream.chunks for i, m in zip(chunk.ids, chunk.expires, strict=True)}
    assert (expires["stays"], expires["later"], expires["1"] < microseconds_now()) == (None, later, True)

    told = []
    assert repository.delete_expired(collection, told.append) == 3
    assert [(each.version, len(each.ids)) for each in told] == [(3, 2), (4, 1)], "in bounded transactions"
    assert repository.count(collection) == 2
    assert repository.delete_expired(collection) == 0


def test_an_expired_memory_is_stored_as_a_new_one(repository, collection):
    expired(repository, collection, "a", "b")
    written = repository.put_memories(
        collection, [MemoryWrite("a", if_version=1), MemoryWrite("a", if_version=0), MemoryWrite("b", text="new")]
    )
    assert [getattr(status, "code", status) for status in written.statuses] == [
        "precondition_failed", "stored", "stored",
    ]  # fmt: skip
    assert repository.get_memory(collection, "b").text == "new"
    assert repository.count(collection) == 2
    assert repository.delete_expired(collection) == 0


# --- receipts ---------------------------------------------------------------------------------------------------------


def receipt(key="k", digest="d" * 64):
    return Receipt(Asked(key, digest), lambda written: {"version": written.version})


def test_a_request_under_its_key_is_done_once(repository, collection):
    def put(kept, *writes, **more):
        return repository.put_memories(collection, [MemoryWrite(id_) for id_ in writes], receipt=kept, **more)

    assert put(receipt(), "a") == Written(1, ["stored"])
    with pytest.raises(AlreadyDone) as done:
        put(receipt(), "a")
    assert done.value.reply == {"version": 1}
    with pytest.raises(AlreadyDone):
        repository.check_new(collection, receipt().asked)
    with pytest.raises(IdempotencyKeyReused):
        put(receipt(digest="e" * 64), "b")
    with pytest.raises(AlreadyDone):
        repository.change_memory(collection, "a", MemoryChange({"text": "t"}), receipt=receipt())
    put(receipt("other"), "b")
    repository.check_new(repository.create_collection("d", {}).id, receipt().asked)  # a key is a collection's
    assert (repository.get_collection("c").version, repository.count(collection)) == (2, 2)


def test_a_job_and_its_receipt_are_there_together(repository, collection):
    job = NewJob("store", {"items": 1}, [NewItem({"n": 1})])
    assert repository.put_memories(collection, [], job=job, receipt=receipt()) == Written(0, [])
    assert repository.pending_items(job.id, 10)[0].body == {"n": 1}
    again = NewJob("store", {"items": 1}, [NewItem({"n": 1})])
    with pytest.raises(AlreadyDone):
        repository.put_memories(collection, [], job=again, receipt=receipt())
    with pytest.raises(OperationNotFound):
        repository.get_job(again.id)


def test_what_was_refused_whole_has_no_receipt(repository, collection):
    refused = repository.put_memories(collection, [MemoryWrite("a", if_version=3)], receipt=receipt())
    assert isinstance(refused.statuses[0], PreconditionFailed)
    repository.check_new(collection, receipt().asked)
    with pytest.raises(CollectionNotFound):
        repository.put_memories(collection + 1, [MemoryWrite("a")], receipt=receipt())
    repository.put_memories(collection, [MemoryWrite("a")], receipt=receipt(digest="e" * 64))


def test_of_equal_requests_at_one_moment_one_is_done(repository, collection):
    outcomes: list[object] = []

    def put():
        try:
            outcomes.append(repository.put_memories(collection, [MemoryWrite("a")], receipt=receipt()).version)
        except AlreadyDone as done:
            outcomes.append(done.reply["version"])

    threads = [threading.Thread(target=put) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [1] * 8
    assert repository.get_collection("c").version == 1


def test_a_receipt_is_kept_for_a_day(storage, repository, collection):
    repository.put_memories(collection, [MemoryWrite("a")], receipt=receipt())
    assert repository.remove_receipts() == 0
    with storage.database.write() as connection:
        connection.execute(update(receipts).values(created_at=datetime.now(UTC) - timedelta(seconds=KEPT_S + 1)))
    assert repository.put_memories(collection, [MemoryWrite("a")], receipt=receipt(digest="e" * 64)).version == 2
    with storage.database.write() as connection:
        connection.execute(update(receipts).values(created_at=datetime.now(UTC) - timedelta(seconds=KEPT_S + 1)))
    assert repository.remove_receipts() == 1


# --- jobs that are retried --------------------------------------------------------------------------------------------


def test_a_job_that_ended_without_being_done_is_queued_again(repository, collection):
    items = [NewItem({}), NewItem({})]
    job = repository.enqueue("store", collection, {"items": 2}, items)
    with pytest.raises(Conflict, match="queued"):
        repository.retry(job)
    repository.claim(["store"], "me")
    repository.finish_items(job, [ItemAnswer(0, "done", {})])
    repository.fail(job, {"code": "internal", "detail": "broken"})
    again = repository.retry(job)
    assert (again.status, again.error, again.attempts) == ("queued", None, 0)
    assert repository.claim(["store"], "me").id == job
    assert [item.position for item in repository.pending_items(job, 10)] == [1], "it goes on where it was"
    repository.cancel(job)
    with pytest.raises(Conflict, match="gone"):
        repository.retry(job)
    bare = repository.enqueue("calibrate", collection, {})
    repository.cancel(bare)
    assert repository.retry(bare).status == "queued"
    repository.claim(["calibrate"], "me")
    repository.finish(bare, {})
    with pytest.raises(Conflict, match="done"):
        repository.retry(bare)
    with pytest.raises(OperationNotFound):
        repository.retry("no such one")
