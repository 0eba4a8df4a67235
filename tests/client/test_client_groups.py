"""Groups of matches, and more like a stored memory: over HTTP and in process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from engram import Client, Collection
from engram.replies import Match
from service.errors import InvalidRequest, MemoryNotFound, NothingObserved

NewName = Callable[[], str]
N, D = 40, 8
VECTORS = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
VALUES: list[Any] = [
    "a",
    "b",
    "c",
    1,
    1.0,
    2,
    True,
    False,
    None,
    {"x": 1},
    [],
    ["a", "b"],
    ["b", "b", 1],
    [["a"], None],
]


def values_of(payload: Any) -> list[Any]:
    """A plain reading: the scalars at the key "k.g", each once."""
    value = payload["k"]["g"] if payload and "k" in payload else []
    found: list[Any] = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str | bool | int | float) and not any(same(each, other) for other in found):
            found.append(each)
    return found


def same(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def brute(matches: tuple[Match, ...], limit: int, offset: int, size: int) -> list[tuple[str, Any]]:
    """Groups of a whole list of matches, by their best."""
    groups: list[tuple[Any, list[str]]] = []
    for match in matches:
        for value in values_of(match.payload):
            members = next((members for name, members in groups if same(name, value)), None)
            if members is None:
                groups.append((value, members := []))
            members.append(match.id)
    return [(name, value) for value, members in groups[offset : offset + limit] for name in members[:size]]


@given(data=st.data())
def test_groups_are_those_of_the_whole_list(local_client: Client, data: st.DataObject) -> None:
    values = data.draw(
        st.lists(st.none() | st.sampled_from(VALUES).map(lambda v: {"k": {"g": v}}), min_size=1, max_size=N)
    )
    collection = local_client.create_collection(f"g{len(local_client.collections())}", {"v": {"dimension": D}})
    collection.store({"id": f"m{n}", "vectors": {"v": VECTORS[n]}, "payload": v} for n, v in enumerate(values))
    limit, offset, size = (data.draw(st.integers(*span)) for span in ((1, 6), (0, 2), (1, 4)))
    cue = {"vectors": {"v": VECTORS[0] + VECTORS[1]}}
    by_similarity = {"update_steps_max": 0, "support": data.draw(st.integers(1, 6))}
    settled = {"support": "dense", "beta": data.draw(st.sampled_from([0.5, 5.0]))}
    options: dict[str, Any] = data.draw(st.sampled_from([by_similarity, settled]))
    whole = collection.recall(**cue, **options, limit=N).matches
    if data.draw(st.booleans()):
        options = options | {"score_threshold": whole[min(len(whole) - 1, 7)].similarity}
        whole = collection.recall(**cue, **options, limit=N).matches
    asked = {"group_by": "k.g", "group_size": size, "limit": limit, "offset": offset}
    answer = collection.recall(**cue, **options, **asked)
    expected = brute(whole, limit, offset, size)
    assert [match.id for match in answer.matches] == [name for name, _ in expected]
    assert all(same(m.group, value) for m, (_, value) in zip(answer.matches, expected, strict=True))
    similarity = {match.id: match.similarity for match in whole}
    assert all(math.isclose(m.similarity, similarity[m.id], abs_tol=1e-5) for m in answer.matches)
    local_client.delete_collection(collection.name)


def test_a_graph_is_searched_until_every_group_is_there(local_client: Client, new_name: NewName) -> None:
    count = 3000
    vectors = np.random.default_rng(1).normal(size=(count, D)).astype(np.float32)
    vectors[:2900] += 4  # the rare groups are far from the cue, and far down the list
    collection = local_client.create_collection(new_name(), {"v": {"dimension": D}})
    bank = local_client._transport._engine.resources.lives[collection.name].bank  # type: ignore[attr-defined]
    bank._scan_values_max = 100 * D
    group = [n % 2 if n < 2900 else n for n in range(count)]
    collection.store(
        ({"id": f"m{n}", "vectors": {"v": vectors[n]}, "payload": {"g": group[n]}} for n in range(count)), batch=1000
    )
    while bank.seal_due():
        bank.seal()
    assert bank.view().parts[0].segment.graphs
    for limit in (2, 50, 102, 500):
        answer = collection.recall(vectors={"v": np.full(D, 4)}, group_by="g", limit=limit)
        assert len({match.group for match in answer.matches}) == len(answer.matches) == min(limit, 102)
        assert [m.weight for m in answer.matches[2:]] == [0.0] * (len(answer.matches) - 2)
    twice = collection.recall(vectors={"v": np.full(D, 4)}, group_by="g", group_size=3, limit=102)
    assert len(twice.matches) == 3 + 3 + 100


@pytest.fixture
def collection(client: Client, new_name: NewName) -> Collection:
    made = client.create_collection(new_name(), {"v": {"dimension": D}, "w": {"dimension": 2}})
    made.store(
        {"id": f"m{n}", "vectors": {"v": VECTORS[n], "w": [1, n]}, "payload": {"shop": {"city": f"c{n % 3}"}, "n": n}}
        for n in range(N - 1)
    )
    made.store([{"id": "bare", "vectors": {"v": VECTORS[N - 1]}}])
    return made


def test_matches_say_their_group(collection: Collection) -> None:
    asked = {"vectors": {"v": VECTORS[4]}, "group_by": "shop.city", "limit": 9, "with_payload": False}
    answer = collection.recall(**asked)
    assert (answer.matches[0].id, answer.matches[0].group) == ("m4", "c1")
    assert {match.group for match in answer.matches} == {"c0", "c1", "c2"}
    assert len(answer.matches) == 3
    assert {match.payload for match in answer.matches} == {None}
    kept = collection.recall(**asked, filter={"must": [{"key": "n", "range": {"lt": 2}}]}, group_size=5)
    assert {(match.id, match.group) for match in kept.matches} == {("m0", "c0"), ("m1", "c1")}
    assert collection.recall(**{**asked, "group_by": "nobody"}).matches == ()
    plain = collection.recall(vectors={"v": VECTORS[4]})
    assert {match.group for match in plain.matches} == {None}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"group_by": "a..b"}, "group_by: "),
        ({"group_size": 2}, "group_size goes with group_by"),
        ({"group_by": "a", "group_size": 101}, "group_size: "),
        ({"group_by": "a", "group_size": 100, "limit": 11}, "at most 1000"),
    ],
)
def test_wrong_groups_are_refused(collection: Collection, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        collection.recall(vectors={"v": VECTORS[0]}, **wrong)
    assert said in refused.value.detail


def test_more_like_a_stored_memory(collection: Collection) -> None:
    asked: dict[str, Any] = {"limit": 100, "support": "dense"}
    stored = {"v": VECTORS[7], "w": [1, 7]}
    answer = collection.recall(id="m7", **asked)
    by_hand = collection.recall(vectors=stored, exclude=["m7"], **asked)
    assert [match.id for match in answer.matches] == [match.id for match in by_hand.matches]
    assert "m7" not in {match.id for match in answer.matches}
    assert sum(match.weight for match in answer.matches) == pytest.approx(1)
    with_itself = collection.recall(id="m7", exclude_self=False, **asked)
    assert with_itself.matches[0].id == "m7"
    assert with_itself.matches[0].similarity == pytest.approx(1)
    one_space = collection.recall(id="m7", spaces={"w": 1})
    assert one_space.matches[0].similarity == pytest.approx(1, abs=0.01), "their directions in w are nearly the same"
    first, missing, other, plain = collection.recall_batch(
        [{"id": "m7"}, {"id": "nobody"}, {"id": "m8"}, {"vectors": stored}], **asked
    )
    assert [match.id for match in first.matches] == [match.id for match in answer.matches]
    assert missing.error is not None
    assert missing.error.code == "memory_not_found"
    assert "m8" not in {match.id for match in other.matches}
    assert plain.matches[0].id == "m7"
    grouped = collection.recall(id="m7", group_by="shop.city", limit=5)
    assert len(grouped.matches) == 3


def test_what_is_no_memory_to_be_like(collection: Collection) -> None:
    with pytest.raises(MemoryNotFound):
        collection.recall(id="nobody")
    with pytest.raises(NothingObserved, match="no pattern in a space that is searched"):
        collection.recall(id="bare", spaces={"w": 1})
    with pytest.raises(InvalidRequest, match="an id is a cue by itself"):
        collection.recall(id="m7", vectors={"v": VECTORS[0]})
    with pytest.raises(InvalidRequest, match="is not a field"):
        collection.train(negatives=[{"id": "m7"}])


def test_the_verdict_on_a_stored_memory_is_of_its_nearest_other(client: Client, new_name: NewName) -> None:
    made = client.create_collection(new_name(), {"v": {"dimension": 32}})
    vectors = np.random.default_rng(1).normal(size=(80, 32))
    vectors[1] = vectors[0] + 0.01  # as good as the same
    made.store({"id": f"m{n}", "vectors": {"v": vectors[n]}} for n in range(80))
    made.wait_until_calibrated(60)
    twin, alone = made.recall_batch([{"id": "m0"}, {"id": "m7"}])
    assert (twin.verdict, twin.matches[0].id) == ("known", "m1")
    assert alone.verdict == "unknown"
    assert alone.matches, "what is most like it is listed all the same"
    assert made.recall(id="m7", exclude_self=False).verdict == "known"
