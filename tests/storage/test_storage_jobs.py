"""Jobs: every arrow of their life, and none besides."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from service.errors import Conflict, OperationNotFound
from service.storage.jobs import ATTEMPTS_MAX, ItemAnswer, JobItem, JobItems, NewItem
from service.storage.memories import MemoryWrite

HASH = "a" * 64


@pytest.fixture
def collection(repository):
    return repository.create_collection("c", {})


def enqueue(repository, collection, count=3):
    items = [NewItem({"id": f"m{i}"}, blob_hash=HASH) for i in range(count)]
    return repository.enqueue("store", collection.id, {"n": 1}, items)


def claim(repository, lease_s=60.0):
    return repository.claim(["store"], "worker", lease_s)


def run_once(repository, collection):
    """A job in each status it can end in."""
    ended = {}
    for status in ("done", "failed", "cancelled", "dead"):
        ended[status] = enqueue(repository, collection)
        for _ in range(ATTEMPTS_MAX if status == "dead" else 1):
            assert claim(repository, lease_s=0).id == ended[status]
        {
            "done": lambda id_: repository.finish(id_, {"version": 3}),
            "failed": lambda id_: repository.fail(id_, {"code": "internal", "detail": "no"}),
            "cancelled": repository.cancel,
            "dead": lambda _: claim(repository),
        }[status](ended[status])
    return ended


def test_job_is_queued_with_its_items(repository, collection):
    id_ = enqueue(repository, collection)
    job = repository.get_job(id_)
    assert (job.id, job.kind, job.collection_id, job.payload) == (id_, "store", collection.id, {"n": 1})
    assert (job.status, job.progress, job.attempts, job.result, job.error) == ("queued", 0.0, 0, None, None)
    assert repository.pending_items(id_, limit=2) == [JobItem(0, {"id": "m0"}), JobItem(1, {"id": "m1"})]
    assert len(repository.pending_items(id_, limit=10)) == 3
    assert repository.item_answers(id_) == []
    free = repository.enqueue("tidy", None, {})
    assert repository.get_job(free).collection_id is None
    assert [job.id for job in repository.list_jobs(10)] == [free, id_]
    assert [job.id for job in repository.list_jobs(1)] == [free]


def test_unknown_job(repository):
    for ask in (repository.get_job, repository.cancel):
        with pytest.raises(OperationNotFound, match="'x'"):
            ask("x")
    assert not repository.heartbeat("x", "worker", 0.5)
    assert not repository.finish("x", {})
    assert not repository.fail("x", {})
    assert repository.pending_items("x", 1) == []


def test_oldest_of_the_kinds_asked_for_is_claimed_once(repository, collection):
    first, second = enqueue(repository, collection), enqueue(repository, collection)
    other = repository.enqueue("calibrate", collection.id, {})
    assert repository.claim([], "w") is None
    job = repository.claim(["store", "calibrate"], "w")
    assert (job.id, job.status, job.attempts) == (first, "running", 1)
    assert [repository.claim(["store"], "w").id, repository.claim(["store"], "w")] == [second, None]
    assert repository.claim(["calibrate"], "w").id == other


def test_eight_workers_never_claim_one_job_together(repository, collection):
    ids = [enqueue(repository, collection, count=0) for _ in range(40)]

    def work(worker):
        mine = []
        while job := repository.claim(["store"], f"worker{worker}"):
            mine.append(job.id)
        return mine

    with ThreadPoolExecutor(8) as pool:
        claimed = [id_ for mine in pool.map(work, range(8)) for id_ in mine]
    assert sorted(claimed) == sorted(ids)


def test_jobs_claimed_together_are_the_oldest_in_their_order(repository, collection):
    ids = [enqueue(repository, collection, count=0) for _ in range(5)]
    repository.enqueue("calibrate", collection.id, {})
    assert [job.id for job in repository.claim_together(["store"], "w", 3)] == ids[:3]
    claimed = repository.claim_together(["store"], "w", 9)
    assert [(job.id, job.status, job.attempts) for job in claimed] == [(id_, "running", 1) for id_ in ids[3:]]
    assert repository.claim_together(["store"], "w", 9) == []


def test_an_interrupted_job_takes_no_other_with_it(repository, collection):
    ids = [enqueue(repository, collection) for _ in range(3)]
    repository.claim_together(["store"], "w", 2)
    repository.release_leases()
    for attempt in range(2, ATTEMPTS_MAX + 1):  # it kills its worker each time
        assert repository.claim_together(["store"], "w", 9, beside=True) == []
        (alone,) = repository.claim_together(["store"], "w", 9)
        assert (alone.id, alone.attempts) == (ids[0], attempt)
        repository.release_leases()
    (second,) = repository.claim_together(["store"], "w", 9)
    assert (repository.get_job(ids[0]).status, second.id, second.attempts) == ("dead", ids[1], 2)
    assert [job.id for job in repository.claim_together(["store"], "w", 9, beside=True)] == ids[2:]


def test_many_jobs_are_answered_renewed_and_finished_at_once_and_one_that_is_gone_is_left_out(repository, collection):
    ids = [enqueue(repository, collection, count=1) for _ in range(3)]
    repository.claim_together(["store"], "w", 3)
    repository.cancel(ids[1])
    assert repository.heartbeats("w", dict.fromkeys(ids, 0.5)) == {ids[0], ids[2]}
    failed = [ItemAnswer(0, "failed", {})]
    with pytest.raises(Conflict):
        repository.answer_together(dict.fromkeys(ids, failed))
    assert repository.item_answers(ids[0]) == []
    writes = [MemoryWrite("m0"), MemoryWrite("m1")]
    with pytest.raises(Conflict):
        repository.put_memories(collection.id, writes, [JobItems(ids[0], [0]), JobItems(ids[1], [0])])
    assert repository.count(collection.id) == 0
    repository.put_memories(collection.id, writes[:1], [JobItems(ids[0], [0]), JobItems(ids[2], [], failed=failed)])
    assert [answer.status for id_ in ids for answer in repository.item_answers(id_)] == ["done", "failed"]
    assert repository.finish_together({id_: {} for id_ in ids}) == {ids[0], ids[2]}


def test_pending_items_behind_a_position(repository, collection):
    id_ = enqueue(repository, collection, count=5)
    claim(repository)
    repository.finish_items(id_, [ItemAnswer(2, "failed", {})])
    assert [item.position for item in repository.pending_items(id_, 2, after=0)] == [1, 3]


def test_heartbeat_renews_the_lease_for_its_owner_alone(repository, collection):
    id_ = enqueue(repository, collection)
    claim(repository, lease_s=0)
    assert repository.heartbeat(id_, "worker", 0.25)
    assert repository.get_job(id_).progress == 0.25
    assert claim(repository) is None  # renewed
    assert not repository.heartbeat(id_, "another", 0.5)
    assert repository.get_job(id_).progress == 0.25
    assert repository.heartbeat(id_, "worker", 0.5, lease_s=0)
    assert repository.claim(["store"], "another").id == id_
    assert not repository.heartbeat(id_, "worker", 0.75)
    repository.cancel(id_)
    assert not repository.heartbeat(id_, "another", 0.75)


def test_leases_of_a_former_process_end_at_once(repository, collection):
    id_ = enqueue(repository, collection)
    claim(repository)
    assert claim(repository) is None
    repository.release_leases()
    job = claim(repository)
    assert (job.id, job.attempts) == (id_, 2)


def test_job_that_only_kills_its_worker_is_declared_dead_and_the_next_one_runs(repository, collection):
    id_, after = enqueue(repository, collection), enqueue(repository, collection)
    for attempt in range(1, ATTEMPTS_MAX + 1):
        job = claim(repository, lease_s=0)
        assert (job.id, job.attempts) == (id_, attempt)
    assert claim(repository).id == after
    dead = repository.get_job(id_)
    assert (dead.status, dead.error["code"]) == ("dead", "dead")
    assert len(repository.pending_items(id_, 10)) == 3  # kept, to see what it was


def test_job_that_moves_forward_is_not_dead_however_often_it_is_interrupted(repository, collection):
    id_ = enqueue(repository, collection, count=3 * ATTEMPTS_MAX)
    for i in range(3 * ATTEMPTS_MAX):
        assert claim(repository, lease_s=0).id == id_
        repository.finish_items(id_, [ItemAnswer(i, "failed", {})])
    assert repository.pending_items(id_, 10) == []


def test_ends(repository, collection):
    ended = run_once(repository, collection)
    jobs = {status: repository.get_job(id_) for status, id_ in ended.items()}
    assert {status: job.status for status, job in jobs.items()} == {status: status for status in ended}
    assert (jobs["done"].result, jobs["done"].progress) == ({"version": 3}, 1.0)
    assert jobs["failed"].error == {"code": "internal", "detail": "no"}
    for status, id_ in ended.items():
        assert len(repository.pending_items(id_, 10)) == (3 if status in ("failed", "dead") else 0)
        assert not repository.finish(id_, {})
        assert not repository.fail(id_, {})
        assert not repository.heartbeat(id_, "worker", 0.1)
        with pytest.raises(Conflict, match="no longer runs"):
            repository.finish_items(id_, [])
        if status == "cancelled":
            assert repository.cancel(id_).status == "cancelled"
        else:
            with pytest.raises(Conflict, match=status):
                repository.cancel(id_)
        assert repository.get_job(id_) == jobs[status]
    repository.release_leases()
    assert claim(repository) is None


def test_queued_job_is_cancelled_but_not_finished(repository, collection):
    id_ = enqueue(repository, collection)
    assert not repository.finish(id_, {})
    with pytest.raises(Conflict):
        repository.finish_items(id_, [ItemAnswer(0, "done", {})])
    assert repository.cancel(id_).status == "cancelled"
    assert claim(repository) is None


def test_writes_answer_their_items_in_the_same_transaction(repository, collection):
    id_ = enqueue(repository, collection)
    claim(repository)
    repository.finish_items(id_, [ItemAnswer(1, "failed", {"error": {"code": "invalid_image"}})])
    writes = [MemoryWrite("m0"), MemoryWrite("m0")]
    repository.put_memories(collection.id, writes, [JobItems(id_, [0, 2], notes=[{}, {"warnings": ["cut"]}])])
    assert repository.item_answers(id_) == [
        ItemAnswer(0, "done", {"id": "m0", "status": "stored", "version": 1}),
        ItemAnswer(1, "failed", {"error": {"code": "invalid_image"}}),
        ItemAnswer(2, "done", {"id": "m0", "status": "updated", "version": 1, "warnings": ["cut"]}),
    ]
    assert repository.pending_items(id_, 10) == []


def test_nothing_is_stored_for_items_answered_before_or_a_job_cancelled(repository, collection):
    id_ = enqueue(repository, collection)
    claim(repository)
    repository.put_memories(collection.id, [MemoryWrite("m0")], [JobItems(id_, [0])])
    with pytest.raises(Conflict, match="answered before"):
        repository.put_memories(collection.id, [MemoryWrite("m1"), MemoryWrite("m0")], [JobItems(id_, [1, 0])])
    assert [item.position for item in repository.pending_items(id_, 10)] == [1, 2]
    repository.cancel(id_)
    with pytest.raises(Conflict, match="no longer runs"):
        repository.put_memories(collection.id, [MemoryWrite("m1")], [JobItems(id_, [1])])
    assert (repository.count(collection.id), repository.get_collection("c").version) == (1, 1)


def test_original_that_waits_for_its_job_is_in_use(repository, collection):
    id_ = enqueue(repository, collection)
    assert repository.blob_hashes_in_use([HASH, "b" * 64]) == {HASH}
    repository.cancel(id_)
    assert repository.blob_hashes_in_use([HASH]) == set()


def test_ended_jobs_are_removed_when_old_and_others_never(repository, collection):
    ended = run_once(repository, collection)
    queued, running = enqueue(repository, collection), enqueue(repository, collection)
    assert claim(repository).id == queued
    assert repository.remove_ended_jobs() == 0
    assert repository.remove_ended_jobs(older_than_s=0) == len(ended)
    assert [job.id for job in repository.list_jobs(10)] == [running, queued]
    assert repository.blob_hashes_in_use([HASH]) == {HASH}


def test_who_has_lost_a_job_ends_it_no_more(repository):
    """A server that was held up for longer than its lease, while another has taken the job over."""
    job = repository.enqueue("snapshot", None, {})
    repository.claim(["snapshot"], "slow", lease_s=0.0)
    repository.claim(["snapshot"], "other")
    assert not repository.fail(job, {"code": "internal", "detail": ""}, "slow")
    assert not repository.finish(job, {}, "slow")
    assert repository.get_job(job).status == "running"
    assert repository.finish(job, {}, "other")
