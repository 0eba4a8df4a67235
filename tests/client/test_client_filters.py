"""Filters as a user meets them, over HTTP and in process: recall, scroll, count, delete, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engram import Client, Collection
from service.errors import CollectionNotFound, InvalidRequest

NewName = Callable[[], str]
N = 60
VECTORS = np.random.default_rng(0).normal(size=(N, 8)).astype(np.float32)
EVEN = {"must": [{"key": "parity", "match": "even"}]}


def payload(n: int) -> dict[str, Any]:
    return {
        "n": n, "parity": "odd" if n % 2 else "even", "tags": ["all", f"t{n % 3}"], "seller": {"city": f"C{n % 5}"},
        "at": f"2026-11-{1 + n % 30:02d}T12:00:00Z", "gone": None if n % 4 == 0 else n,
    }  # fmt: skip


@pytest.fixture
def collection(client: Client, new_name: NewName) -> Collection:
    made = client.create_collection(new_name(), {"v": {"dimension": 8}})
    made.store({"id": f"m{n}", "vectors": {"v": VECTORS[n]}, "payload": payload(n)} for n in range(N - 1))
    made.store([{"id": f"m{N - 1}", "vectors": {"v": VECTORS[N - 1]}}])  # without a payload
    return made


def of_payload(document: dict[str, Any], keeps: Callable[[int], bool]) -> tuple[dict[str, Any], list[int]]:
    """The last memory has no payload, and meets no condition."""
    return document, [n for n in range(N - 1) if keeps(n)]


CASES = [
    ({}, list(range(N))),
    ({"must_not": [{"key": "parity", "match": "even"}]}, list(range(1, N, 2))),
    ({"must": [{"key": "gone", "exists": False}]}, [N - 1]),
    ({"should": [{"key": "n", "match": 3}, {"ids": ["m7", "nobody"]}]}, [3, 7]),
    of_payload(EVEN, lambda n: n % 2 == 0),
    of_payload({"must": [{"key": "tags", "any": ["t1", "t2"]}]}, lambda n: n % 3 > 0),
    of_payload({"must": [{"key": "seller.city", "except": ["C0", "C1"]}]}, lambda n: n % 5 > 1),
    of_payload({"must": [{"key": "n", "range": {"gte": 10, "lt": 20.5}}]}, lambda n: 10 <= n <= 20),
    of_payload({"must": [{"key": "at", "range": {"gt": "2026-11-29"}}]}, lambda n: n % 30 > 27),
    of_payload({"must": [{"key": "gone", "null": True}]}, lambda n: n % 4 == 0),
    of_payload({"must": [{"key": "seller.city", "prefix": "C"}, {"must_not": [EVEN]}]}, lambda n: n % 2 == 1),
]


def test_recall_scroll_and_count_keep_the_same(collection: Collection) -> None:
    cue = VECTORS[7]
    for document, numbers in CASES:
        kept = [f"m{n}" for n in numbers]
        assert [memory.id for memory in collection.scroll(document, batch=7)] == kept
        assert collection.count(document) == len(kept)
        answer = collection.recall(vectors={"v": cue}, limit=100, filter=document)
        assert {match.id for match in answer.matches} == set(kept)
        few = collection.recall(vectors={"v": cue}, limit=3, filter=document, support=3)
        assert len(few.matches) == min(3, len(kept))
        assert {match.id for match in few.matches} <= set(kept)


def test_the_dynamics_sees_what_the_recall_may_return(collection: Collection) -> None:
    """The cue's own memory is filtered out: nothing of it comes back, in the weights neither."""
    whole = collection.recall(vectors={"v": VECTORS[7]})
    assert whole.matches[0].id == "m7"
    rest = collection.recall(vectors={"v": VECTORS[7]}, filter=EVEN, support="dense", limit=100)
    assert "m7" not in {match.id for match in rest.matches}
    assert sum(match.weight for match in rest.matches) == pytest.approx(1)
    assert rest.recall is not None
    assert rest.recall.support == N // 2
    without = collection.recall(vectors={"v": VECTORS[7]}, exclude=["m7", "nobody"])
    assert "m7" not in {match.id for match in without.matches}
    none = collection.recall(vectors={"v": VECTORS[7]}, filter={"must": [{"ids": []}]})
    assert (none.verdict, none.matches) == ("unknown", ())
    assert "no memory is left" in none.warnings[0]


def test_the_gate_refuses_a_cue_whose_own_memory_is_left_out(client: Client, new_name: NewName) -> None:
    made = client.create_collection(new_name(), {"v": {"dimension": 32}})
    vectors = np.random.default_rng(1).normal(size=(80, 32))
    made.store({"id": f"m{n}", "vectors": {"v": vectors[n]}, "payload": {"n": n}} for n in range(80))
    made.wait_until_calibrated(60)
    asked = {"vectors": {"v": vectors[7] + 0.05}}
    assert made.recall(**asked).verdict == "known"
    assert made.recall(**asked, filter={"must": [{"key": "n", "range": {"lte": 7}}]}).verdict == "known"
    assert made.recall(**asked, exclude=["m7"]).verdict == "unknown"
    left = made.recall(**asked, filter={"must": [{"key": "n", "range": {"gt": 7}}]})
    assert left.verdict == "unknown"
    assert left.matches, "listed for inspection"


def test_pages_of_matches_and_a_least_similarity(collection: Collection) -> None:
    search = {"vectors": {"v": VECTORS[7]}, "update_steps_max": 0, "filter": EVEN}
    whole = collection.recall(**search, limit=30).matches
    paged = [m.id for start in range(0, 30, 8) for m in collection.recall(**search, limit=8, offset=start).matches]
    assert paged == [match.id for match in whole]
    assert collection.recall(**search, offset=30).matches == ()
    least = whole[4].similarity
    near = collection.recall(**search, limit=30, score_threshold=least).matches
    assert [match.id for match in near] == [match.id for match in whole[:5]]
    assert len(collection.recall(**search, limit=30, offset=3, score_threshold=least).matches) == 2
    settled = collection.recall(vectors={"v": VECTORS[7]}, limit=30, score_threshold=least)
    assert min(match.similarity for match in settled.matches) >= least
    assert collection.recall(**search, score_threshold=2.0).matches == ()


def test_a_scroll_goes_on_while_memories_come_and_go(collection: Collection) -> None:
    seen = []
    for memory in collection.scroll(EVEN, batch=5):
        seen.append(memory.id)
        if memory.id == "m8":
            collection.delete(["m2", "m20", "m30"])
            collection.store([{"id": "m40", "vectors": {"v": VECTORS[0]}, "payload": payload(40)}])  # keeps its place
            collection.store([{"id": "new", "vectors": {"v": VECTORS[0]}, "payload": payload(0)}])
    assert seen == [f"m{n}" for n in range(0, N, 2) if n not in (20, 30)] + ["new"]
    memory = next(collection.scroll({"must": [{"ids": ["m40"]}]}))
    assert (memory.payload, memory.spaces) == (payload(40), ("v",))


def test_many_are_had_by_their_ids(collection: Collection) -> None:
    found = collection.get_many(["m9", "nobody", "m3", "m9", f"m{N - 1}"])
    assert [memory.id for memory in found] == ["m9", "m3", f"m{N - 1}"]
    assert [memory.payload for memory in found] == [payload(9), payload(3), None]
    assert found[0] == collection.get("m9")
    assert collection.get_many([]) == []
    assert len(collection.get_many(f"m{n}" for n in range(N))) == N


def test_delete_by_filter_is_tried_first_and_leaves_the_rest(collection: Collection) -> None:
    even = [f"m{n}" for n in range(0, N, 2)]
    version = collection.info().version
    assert collection.delete(filter=EVEN, dry_run=True) == even
    assert collection.delete(["m1", "nobody"], dry_run=True) == ["m1"]
    assert (collection.count(), collection.info().version) == (N, version)
    assert collection.delete(filter=EVEN) == even
    assert collection.info().version == version + 1
    assert collection.delete(filter=EVEN) == []
    assert collection.info().version == version + 1, "nothing was written"
    assert (collection.count(), collection.count({})) == (N // 2, N // 2)
    answer = collection.recall(vectors={"v": VECTORS[2]}, limit=100)
    assert {match.id for match in answer.matches} == {f"m{n}" for n in range(1, N, 2)}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"must": [{"key": "a", "match": None}]}, "filter.must.0.match: "),
    ({"should": [{"key": "a", "any": [1, [2]]}]}, "filter.should.0.any.1: "),
    ({"must_not": [{"must": [{"key": "a", "range": {"gte": "soon"}}]}]}, "filter.must_not.0.must.0.range.gte: "),
    ({"must": [{"key": "a[0]", "exists": True}]}, "filter.must.0.key: "),
    ({"must": [{"key": "a", "values_count": {"gt": 2}}]}, "filter.must.0.values_count: is not a field"),
    ({"must": [{"key": "a"}]}, "filter.must.0: a key goes with one of match"),
    ({"must": [{"key": "a", "range": {"gt": 1, "lt": "2026-01-01"}}]}, "filter.must.0.range: "),
    ({"must": [{"key": "a", "exists": "yes"}]}, "filter.must.0.exists: "),
    ({"any": []}, "filter.any: is not a field"),
]


def test_a_wrong_filter_is_refused_by_its_place(collection: Collection) -> None:
    deep: dict[str, Any] = {"key": "a", "match": 1}
    for _ in range(9):
        deep = {"must": [deep]}
    cases = [*REFUSED, (deep, "filter: is nested deeper than 8"), ({"must": [{"ids": []}] * 257}, "filter: has more")]
    for document, said in cases:
        for call in (
            lambda f: collection.recall(vectors={"v": VECTORS[0]}, filter=f),
            lambda f: list(collection.scroll(f)),
            collection.count,
            lambda f: collection.delete(filter=f),
        ):
            with pytest.raises(InvalidRequest) as refused:
                call(document)
            assert said in refused.value.detail
    assert collection.count() == N


def test_what_else_is_refused(collection: Collection, client: Client) -> None:
    for arguments in ({}, {"ids": ["m1"], "filter": EVEN}, {"filter": {}}):
        with pytest.raises(InvalidRequest):
            collection.delete(**arguments)
    with pytest.raises(InvalidRequest, match="4096 together"):
        collection.recall(vectors={"v": VECTORS[0]}, offset=4092)
    with pytest.raises(InvalidRequest, match="cursor: is not a next_cursor"):
        client._transport.call("scroll", {"collection": collection.name}, {"cursor": "../etc"})
    with pytest.raises(CollectionNotFound):
        next(client.collection("not-there").scroll())
    reply = collection.store([{"id": "nul", "vectors": {"v": VECTORS[0]}, "payload": {"a": "x\0y"}}])
    assert reply.errors[0].error is not None
    assert "U+0000" in reply.errors[0].error.detail
    assert not collection.store([{"id": "ok", "vectors": {"v": VECTORS[0]}, "payload": {"a": "\\u0000"}}]).errors
