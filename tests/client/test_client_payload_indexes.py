"""Payload indexes: made, kept, dropped; and that what is asked is answered as without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram import Client, Collection
from service.app.payload_indexes import INDEXES_MAX
from service.errors import CollectionNotFound, InvalidRequest

NewName = Callable[[], str]
N = 50
VECTORS = np.random.default_rng(0).normal(size=(N, 8)).astype(np.float32)
FILTERS: list[dict[str, Any]] = [
    {"must": [{"key": "n", "range": {"gte": 40}}]},
    {"must": [{"key": "shop.city", "match": "c1"}], "must_not": [{"key": "n", "match": 4}]},
    {"should": [{"key": "n", "match": 3}, {"ids": ["m7", "nobody"]}]},
    {"must_not": [{"key": "shop.city", "exists": True}]},
    {"must": [{"key": "other", "match": 3}]},
    {"must": [{"key": "n", "match": "nothing"}]},
]


def memories(start: int, stop: int) -> list[dict[str, Any]]:
    payloads = [{"n": n, "shop": [{"city": f"c{n % 3}"}], "other": n % 7} if n % 10 else None for n in range(N)]
    return [{"id": f"m{n}", "vectors": {"v": VECTORS[n]}, "payload": payloads[n]} for n in range(start, stop)]


@pytest.fixture
def collection(client: Client, new_name: NewName) -> Collection:
    made = client.create_collection(new_name(), {"v": {"dimension": 8}})
    made.store(memories(0, 30))
    return made


def asked(collection: Collection) -> list[Any]:
    return [
        (
            [memory.id for memory in collection.scroll(document, batch=7)],
            collection.count(document),
            collection.delete(filter=document, dry_run=True),
            {match.id for match in collection.recall(vectors={"v": VECTORS[0]}, limit=100, filter=document).matches},
        )
        for document in FILTERS
    ]


def test_all_is_answered_as_without_an_index(collection: Collection) -> None:
    version = collection.info().version
    collection.create_payload_index("n")
    collection.store(memories(30, 40))
    collection.create_payload_index("shop.city")
    collection.store(memories(35, N))
    with_indexes = asked(collection)
    assert [(index["key"], index["memories"]) for index in collection.payload_indexes()] == [
        ("n", 45), ("shop.city", 45)
    ]  # fmt: skip
    assert all(index["bytes"] > 0 for index in collection.payload_indexes())
    assert collection.info().version == version + 4, "an index is a write"
    collection.delete_payload_index("n")
    collection.delete_payload_index('"shop"."city"')
    assert collection.payload_indexes() == []
    assert asked(collection) == with_indexes
    assert [kept for _, kept, _, _ in with_indexes] == [9, 14, 2, 5, 6, 0]


def test_what_few_are_kept_are_deleted(collection: Collection) -> None:
    collection.create_payload_index("n")
    few = {"must": [{"key": "n", "range": {"gte": 25}}]}
    assert collection.delete(filter=few) == [f"m{n}" for n in range(25, 30)]
    assert (collection.count(few), collection.count()) == (0, 25)
    collection.store([{"id": "m1", "vectors": {"v": VECTORS[0]}, "payload": {"n": 99}}])
    assert [memory.id for memory in collection.scroll(few)] == ["m1"]


def test_an_index_is_made_once_whatever_way_its_key_is_written(collection: Collection) -> None:
    first = collection.create_payload_index("shop.city")
    version = collection.info().version
    for key in ("shop.city", '"shop".city[]'):
        assert collection.create_payload_index(key) == first
    collection.create_payload_index('"a.b"./c? é')
    assert [index["key"] for index in collection.payload_indexes()] == ["shop.city", '"a.b"./c? é']
    collection.delete_payload_index("nobody")
    assert collection.info().version == version + 1


def test_what_is_no_index(collection: Collection, client: Client) -> None:
    for key in ("a..b", "a[0]", 'a"', "x" * 513, ".".join(["a"] * 40)):
        with pytest.raises(InvalidRequest):
            collection.create_payload_index(key)
        with pytest.raises(InvalidRequest):
            collection.delete_payload_index(key)
    for n in range(INDEXES_MAX):
        collection.create_payload_index(f"k{n}")
    with pytest.raises(InvalidRequest, match="at most 32"):
        collection.create_payload_index("more")
    collection.create_payload_index("k1")
    with pytest.raises(CollectionNotFound):
        client.collection("not-there").create_payload_index("a")


def test_indexes_outlive_a_restart_and_their_columns_are_there_before_a_filter(tmp_path: Path) -> None:
    with Client(path=tmp_path) as client:
        collection = client.create_collection("kept", {"v": {"dimension": 8}})
        collection.store(memories(0, 20))
        collection.create_payload_index("n")
        collection.create_payload_index("shop.city")
        collection.delete_payload_index("n")
    with Client(path=tmp_path) as client:
        collection = client.collection("kept")
        bank = client._transport._engine.resources.lives["kept"].bank  # type: ignore[attr-defined]
        filtering = bank.view().parts[-1].segment.filtering
        assert filtering.paths == [("shop", "city")]
        assert bank.sizes()["columns"] > 0
        collection.store(memories(20, N))
        assert filtering._blocks["shop", "city"][0].rows == N
        assert [index["memories"] for index in collection.payload_indexes()] == [45]
        bank.seal()


def test_the_command_lists_adds_and_drops(tmp_path: Path, run_engram: Callable[..., Any]) -> None:
    with Client(path=tmp_path) as client:
        client.create_collection("mine", {"v": {"dimension": 8}}).store(memories(0, 20))
    where = ("--collection", "mine", "--data", tmp_path)
    assert "No key is indexed" in run_engram("indexes", *where).stdout
    shown = run_engram("indexes", "--add", "n", "--add", "shop.city", *where).stdout
    assert "shop.city" in shown
    assert "18" in shown
    [left] = json.loads(run_engram("indexes", "--drop", "n", "--json", *where).stdout)
    assert (left["key"], left["memories"]) == ("shop.city", 18)
    grouped = run_engram("recall", "--like", "m1", "--group-by", "shop.city", *where)
    assert grouped.returncode == 0, grouped.stderr
    assert {"c0", "c1", "c2"} <= set(grouped.stdout.split())
    assert run_engram("recall", *where).returncode == 2
