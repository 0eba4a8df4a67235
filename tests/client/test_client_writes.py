"""Writes and reads at a version, by every client."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from engram import Client
from service.errors import Conflict, InvalidRequest, MemoryNotFound, PreconditionFailed, VersionNotReached

SPACES = {"image": {"encoder": "pixels", "options": {"size": 8}}, "v": {"dimension": 2}}


def test_a_memory_changes_in_part_and_on_its_version(client_of_any_way: Client, new_name: Callable[[], str]) -> None:
    collection = client_of_any_way.create_collection(new_name(), SPACES)
    picture = np.random.default_rng(1).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    collection.store([{"id": "a/b", "vectors": {"v": [1, 0]}, "payload": {"k": 1, "deep": {"x": 1, "y": 2}}}])
    changed = collection.update("a/b", payload={"k": None, "deep": {"x": None}}, image=picture)
    assert (changed.id, changed.version, changed.warnings) == ("a/b", 2, ())
    memory = collection.get("a/b", min_version=2)
    assert (memory.payload, memory.spaces, memory.version) == ({"deep": {"y": 2}}, ("image", "v"), 2)
    collection.update("a/b", vectors={"v": None})
    assert collection.get("a/b").spaces == ("image",)
    collection.update("a/b", vectors={"v": [1, 0]})
    collection.update("a/b", image=None, payload={"only": 1}, replace_payload=True, text="t", if_version=4)
    memory = collection.get("a/b")
    assert (memory.payload, memory.spaces, memory.text) == ({"only": 1}, ("v",), "t")

    with pytest.raises(PreconditionFailed):
        collection.update("a/b", text=None, if_version=2)
    with pytest.raises(MemoryNotFound):
        collection.update("nobody", text=None)
    with pytest.raises(InvalidRequest, match="nothing is to be changed"):
        collection.update("a/b")
    results = collection.store(
        [{"id": id_, "vectors": {"v": [2, 1]}, "if_version": at} for id_, at in (("a/b", 0), ("a/b", 5), ("new", 0))]
    ).results
    assert [result.error.code if result.error else result.status for result in results] == [
        "precondition_failed", "updated", "stored",
    ]  # fmt: skip
    with pytest.raises(PreconditionFailed):
        collection.delete("a/b", if_version=5)
    with pytest.raises(InvalidRequest, match="one memory"):
        collection.delete(["a/b"], if_version=6)
    assert collection.delete("a/b", if_version=6) == ["a/b"]


def test_a_memory_expires(client_of_any_way: Client, new_name: Callable[[], str]) -> None:
    collection = client_of_any_way.create_collection(new_name(), {"v": {"dimension": 2}})
    soon = datetime.now(UTC) + timedelta(seconds=1.5)
    past = datetime.now(UTC) - timedelta(seconds=1)
    results = collection.store(
        {"id": str(n), "vectors": {"v": [n, 1]}, "expires_at": moment}
        for n, moment in enumerate([soon, past, "2100-01-01T00:00:00Z", None])
    ).results
    assert [result.status for result in results] == ["stored", "error", "stored", "stored"]
    assert collection.get("0").expires_at == soon.isoformat()
    collection.update("3", expires_at=soon.isoformat())
    collection.update("2", expires_at=None)
    assert collection.get("2").expires_at is None
    time.sleep(max(0.0, (soon - datetime.now(UTC)).total_seconds()) + 0.01)
    assert [memory.id for memory in collection.scroll()] == ["2"]
    assert (collection.count(), collection.info().count) == (1, 1)
    assert [match.id for match in collection.recall(vectors={"v": [0, 1]}).matches] == ["2"]
    assert [memory.id for memory in collection.get_many(["0", "2", "3"])] == ["2"]


def test_reads_at_a_version(client_of_any_way: Client, new_name: Callable[[], str]) -> None:
    collection = client_of_any_way.create_collection(new_name(), {"v": {"dimension": 2}})
    version = collection.store([{"id": "a", "vectors": {"v": [1, 1]}}]).version
    assert version is not None
    assert collection.count(min_version=version) == len(list(collection.scroll(min_version=version))) == 1
    assert collection.recall(vectors={"v": [1, 1]}, min_version=version).version >= version
    for read in (
        lambda: collection.get("a", min_version=version + 1),
        lambda: collection.get_many(["a"], min_version=version + 1),
        lambda: list(collection.scroll(min_version=version + 1)),
        lambda: collection.count(min_version=version + 1),
        lambda: collection.recall(vectors={"v": [1, 1]}, min_version=version + 1),
    ):
        with pytest.raises(VersionNotReached):
            read()


def test_operations_are_listed_and_those_that_ended_well_are_not_retried(
    client_of_any_way: Client, new_name: Callable[[], str]
) -> None:
    collection = client_of_any_way.create_collection(new_name(), {"v": {"dimension": 2}})
    operation = collection.train("gate")
    assert operation.id in [each.id for each in client_of_any_way.operations()]
    deadline = time.monotonic() + 60
    while client_of_any_way.operation(operation.id).status in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(Conflict, match="done"):
        client_of_any_way.retry(operation.id)
