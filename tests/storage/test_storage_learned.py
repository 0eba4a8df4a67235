"""Kernels and their records: one active per space, the one before it to go back to, versions, bounds."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError, StatementError

from service.errors import LearnedElsewhere
from service.storage import learned
from service.storage.learned import KernelPut
from service.storage.repository import Repository
from service.storage.tables import kernels

W = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(scope="module")
def shared(opener: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    """One database for all examples: opening one takes longer than an example."""
    storage = opener(tmp_path_factory.mktemp("learned") / "data")
    yield storage.repository
    storage.close()


@pytest.fixture
def collection(repository):
    return repository.create_collection("c", {})


def statuses(repository, collection_id):
    return [(each.space, each.number, each.status) for each in repository.get_kernels(collection_id)]


def test_a_kernel_comes_back_whole(repository, collection):
    before = datetime.now(UTC)
    record = {"losses": [2.5, 1.25], "seconds": 3.5, "corruptions": ["mask .5", "ü"]}
    strided = np.asfortranarray(W.astype(np.float64))
    assert repository.put_kernel(collection.id, "image", "cue", strided, record, activate=True) == KernelPut(1, 1)
    (kept,) = repository.get_kernels(collection.id)
    assert (kept.space, kept.number, kept.objective, kept.status) == ("image", 1, "cue", "active")
    assert (kept.rows, kept.dimension, kept.record) == (2, 3, record)
    assert before <= kept.created_at <= datetime.now(UTC)
    assert kept.weight.dtype == np.float32
    assert kept.weight.flags.writeable
    assert np.array_equal(kept.weight, W)
    assert repository.get_collection("c").version == 1


def test_of_a_dropped_kernel_the_record_stays(repository, collection):
    followed = []
    put = repository.put_kernel(
        collection.id, "image", "separation", W, {"beaten by": "cosine"}, activate=False, then=followed.append
    )
    assert put == KernelPut(1, 0), "what changes no answer takes no version"
    assert followed == [put]
    (kept,) = repository.get_kernels(collection.id)
    assert (kept.status, kept.rows, kept.dimension, kept.weight) == ("dropped", 2, 3, None)
    assert kept.record == {"beaten by": "cosine"}
    assert repository.get_kernel_weight(collection.id, "image", 1) is None
    assert repository.retire_kernel(collection.id, "image").version == 0


def test_what_is_retired_is_what_was_seen(repository, collection):
    """Else a server that has not heard of another's new kernel would retire that one."""
    seen = repository.put_kernel(collection.id, "image", "cue", W, {}, activate=True)
    newer = repository.put_kernel(collection.id, "image", "cue", W, {}, activate=True)
    with pytest.raises(LearnedElsewhere):
        repository.retire_kernel(collection.id, "image", at=seen.revision)
    assert statuses(repository, collection.id) == [("image", 1, "retired"), ("image", 2, "active")]
    assert repository.retire_kernel(collection.id, "image", at=newer.revision).revision == newer.revision + 1


def test_gates_are_replaced_with_the_kernel_or_not_at_all(repository, collection):
    repository.put_gates(collection.id, {"image": {"log_lambda": 1}, "text": {}})
    repository.put_kernel(collection.id, "image", "cue", W, {}, activate=False)
    assert set(repository.get_gates(collection.id)) == {"image", "text"}
    repository.put_kernel(collection.id, "image", "cue", W, {}, activate=True, gates={"image": {"log_lambda": 2}})
    assert {name: gate.record for name, gate in repository.get_gates(collection.id).items()} == {
        "image": {"log_lambda": 2}
    }
    with pytest.raises(StatementError, match="JSON"):
        repository.put_kernel(collection.id, "image", "cue", W, {}, activate=True, gates={"image": {"x": object()}})
    assert statuses(repository, collection.id) == [("image", 1, "dropped"), ("image", 2, "active")]
    assert set(repository.get_gates(collection.id)) == {"image"}
    assert repository.get_collection("c").version == 1
    repository.put_kernel(collection.id, "image", "cue", W, {}, activate=True, gates={})
    assert repository.get_gates(collection.id) == {}


def test_the_database_itself_refuses_a_weight_that_does_not_fit(storage, repository, collection):
    repository.put_kernel(collection.id, "image", "cue", W, {}, activate=True)
    for wrong in ({"rows": 3}, {"weight": None}, {"status": "dropped"}, {"status": "new"}):
        with pytest.raises(IntegrityError), storage.database.write() as connection:
            connection.execute(update(kernels).values(**wrong))


@given(
    moves=st.lists(st.tuples(st.sampled_from(["activate", "drop", "retire"]), st.sampled_from(["a", "b"])), max_size=20)
)
@example(moves=[("activate", "a"), ("activate", "a"), *[("drop", "a")] * 6])  # both of use outlive newer records
def test_kernels_against_a_model(shared, moves):
    """Per space: the active one, the retired one, and how each number ended; old records go, numbers go on."""
    repository, name = shared, str(uuid.uuid4())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned, "RECORDS_KEPT", 3)
        collection, other = (repository.create_collection(name + each, {}) for each in ("", " beside"))
        repository.put_kernel(other.id, "a", "cue", W, {}, activate=True)
        version, followed, expected_follow = 0, [], []
        model: dict[str, dict[int, str]] = {"a": {}, "b": {}}
        counts = {"a": 0, "b": 0}
        for turn, (move, space) in enumerate(moves):
            ours = model[space]
            active = [number for number, status in ours.items() if status == "active"]
            if move != "drop" and active:
                ours.update({number: "dropped" for number, status in ours.items() if status == "retired"})
                ours[active[0]] = "retired"
            version += move == "activate" or (move == "retire" and bool(active))
            if move == "retire":
                retired = repository.retire_kernel(collection.id, space, then=followed.append)
                assert retired.version == version
                expected_follow.append(retired)
                continue
            put = repository.put_kernel(
                collection.id, space, "cue", W + turn, {"turn": turn}, move == "activate", then=followed.append
            )
            counts[space] += 1
            number = counts[space]
            ours[number] = "active" if move == "activate" else "dropped"
            model[space] = {n: s for n, s in ours.items() if s != "dropped" or n > number - 3}
            assert put == KernelPut(number, version)
            expected_follow.append(put)
        assert followed == expected_follow
        kept = repository.get_kernels(collection.id)
        assert [(k.space, k.number, k.status) for k in kept] == [
            (space, number, status) for space in "ab" for number, status in sorted(model[space].items())
        ]
        for k in kept:
            weight = W + k.record["turn"]
            assert (k.weight is not None) == (k.status == "active")
            assert k.weight is None or np.array_equal(k.weight, weight)
            stored = repository.get_kernel_weight(collection.id, k.space, k.number)
            assert (stored is None) == (k.status == "dropped")
            assert stored is None or np.array_equal(stored, weight)
        assert repository.get_collection(name).version == version
        assert statuses(repository, other.id) == [("a", 1, "active")]
