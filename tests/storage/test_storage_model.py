"""Storage against a model of it in a dict, restart being one of the moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from service.errors import (
    CollectionExists,
    CollectionNotFound,
    Conflict,
    EncodersChanged,
    InvalidRequest,
    MemoryNotFound,
    PreconditionFailed,
)
from service.storage.database import Database
from service.storage.drafts import Draft, Swapped
from service.storage.memories import Drafted, MemoryWrite
from service.storage.repository import Repository
from service.storage.tables import collections, name_versions
from service.storage.updates import MemoryChange
from service.storage.writer import Writer

NAMES = st.sampled_from(["a", "b"])
IDS = st.sampled_from(["1", "2/ü", "3", "4"])
SPACES = [("x", 2), ("y", 1)]


class StorageMachine(RuleBasedStateMachine):
    place: Path | str  # one database for all examples: making one takes longer than an example

    def __init__(self):
        super().__init__()
        self.collections: dict[str, dict[str, dict[str, list[float]]]] = {}  # name → id → space → vector, in order
        self.versions: dict[str, int] = {}
        self.writes = 0
        self.open()

    def open(self):
        self.database = Database.open(self.place)
        self.writer = Writer(self.database)
        self.repository = Repository(self.database, self.writer)

    def close(self):
        self.writer.close()
        self.database.close()

    def teardown(self):
        with self.database.write() as connection:
            for table in (collections, name_versions):
                connection.execute(table.delete())
        self.close()

    @rule()
    def restart(self):
        self.close()
        self.open()

    @rule(name=NAMES)
    def create(self, name):
        try:
            created = self.repository.create_collection(name, {"name": name})
        except CollectionExists:
            assert name in self.collections
        else:
            assert name not in self.collections
            self.collections[name] = {}
            assert created.version == self.versions.setdefault(name, 0)

    @rule(name=NAMES)
    def drop(self, name):
        try:
            self.repository.delete_collection(name)
        except CollectionNotFound:
            assert name not in self.collections
        else:
            del self.collections[name]
            self.versions[name] += 1

    @rule(name=NAMES, batch=st.lists(st.tuples(IDS, st.sets(st.sampled_from(["x", "y"]))), min_size=1, max_size=5))
    def put(self, name, batch):
        if name not in self.collections:
            return
        writes, statuses, memories = [], [], self.collections[name]
        for id_, spaces in batch:
            self.writes += 1
            vectors = {space: np.full(size, self.writes, np.float32) for space, size in SPACES if space in spaces}
            writes.append(MemoryWrite(id_, vectors=vectors))
            statuses.append("updated" if id_ in memories else "stored")
            memories[id_] = {space: vector.tolist() for space, vector in vectors.items()}
        written = self.repository.put_memories(self.repository.get_collection(name).id, writes)
        self.versions[name] += 1
        assert (written.version, written.statuses) == (self.versions[name], statuses)

    @rule(name=NAMES, ids=st.lists(IDS, max_size=3))
    def delete(self, name, ids):
        if name not in self.collections:
            return
        existing = [id_ for id_ in dict.fromkeys(ids) if self.collections[name].pop(id_, None) is not None]
        self.versions[name] += bool(existing)
        deleted = self.repository.delete_memories(self.repository.get_collection(name).id, ids)
        assert (deleted.version, deleted.ids) == (self.versions[name], existing)

    @rule(name=NAMES, id_=IDS, given=st.sets(st.sampled_from(["x", "y"])), gone=st.sets(st.sampled_from(["x", "y"])),
          behind=st.none() | st.integers(0, 1))  # fmt: skip
    def change(self, name, id_, given, gone, behind):
        """Some spaces get another vector, some go, the rest stays; perhaps on a version that it has, or has not."""
        if name not in self.collections:
            return
        memory, collection = self.collections[name].get(id_), self.repository.get_collection(name)
        at = None
        if behind is not None:
            at = behind or 10**6 if memory is None else self.repository.get_memory(collection.id, id_).version + behind
        self.writes += 1
        vectors = dict.fromkeys(gone)
        vectors |= {space: np.full(size, self.writes, np.float32) for space, size in SPACES if space in given}
        try:
            changed = self.repository.change_memory(collection.id, id_, MemoryChange(vectors=vectors, if_version=at))
        except MemoryNotFound:
            assert memory is None
        except PreconditionFailed:
            assert behind
        except InvalidRequest:
            assert not given
            assert {*memory} <= gone
        else:
            self.versions[name] += 1
            assert changed.version == self.versions[name]
            assert behind in (None, 0)
            for space, vector in vectors.items():
                if vector is not None:
                    memory[space] = vector.tolist()
                else:
                    memory.pop(space, None)

    @rule(name=NAMES, ids=st.lists(IDS, min_size=1, max_size=3, unique=True), again=st.none() | IDS)
    def expire(self, name, ids, again):
        """Memories that have expired are not there; one may be stored anew before the others are deleted."""
        if name not in self.collections:
            return
        repository, memories = self.repository, self.collections[name]
        collection = repository.get_collection(name)
        repository.put_memories(collection.id, [MemoryWrite(id_, expires_at=1) for id_ in ids])
        for id_ in ids:
            memories.pop(id_, None)
        found = repository.scroll(collection.id, None, 0, 10)
        assert [each.id for each in found.memories] == list(memories)
        assert repository.delete_memories(collection.id, ids).ids == []
        self.versions[name] += 1
        if again is not None:
            there = again in memories
            (status,) = repository.put_memories(collection.id, [MemoryWrite(again, if_version=0)]).statuses
            assert isinstance(status, PreconditionFailed) if there else status == "stored"
            self.versions[name] += not there
            memories.setdefault(again, {})
        left = len({*ids} - {again})
        assert repository.delete_expired(collection.id) == left
        self.versions[name] += bool(left)

    @rule(
        name=NAMES,
        space=st.sampled_from(["x", "y"]),
        lost=st.sets(IDS),
        rewritten=st.lists(IDS, max_size=2),
        deleted=st.lists(IDS, max_size=2),
        outcome=st.sampled_from(["swap", "cancel", "behind"]),
    )
    def reencode(self, name, space, lost, rewritten, deleted, outcome):
        """Every vector of a space is turned round, but those lost; some memories are written or deleted meanwhile."""
        if name not in self.collections:
            return
        repository = self.repository
        collection = repository.get_collection(name)
        job_id = repository.enqueue("reencode", collection.id, {})
        assert repository.claim(["reencode"], "model").id == job_id
        drafted = Drafted(space, job_id)
        size = dict(SPACES)[space]

        def draft():
            originals = repository.undrafted(collection.id, drafted, "image", 0, 10)
            drafts = []
            for original in originals:
                vector = -np.array(self.collections[name][original.id][space], np.float32)
                kept = (None, "lost") if original.id in lost else (vector, None)
                drafts.append(Draft(original.key, original.version, *kept))
            repository.put_drafts(job_id, drafts)
            return [original.id for original in originals]

        draft()
        self.put(name, [(id_, {"x", "y"}) for id_ in rewritten] or [("1", {"y"})])
        self.delete(name, deleted)
        memories = self.collections[name]
        again = draft()
        assert {*rewritten} & {*memories} <= {*again}, "what was written since has no draft"
        assert draft() == []
        if outcome == "cancel":
            repository.cancel(job_id)
            repository.remove_drafts()
            with pytest.raises(Conflict):
                repository.swap_space(collection.id, drafted, self.versions[name], {}, [], {})
            return
        if outcome == "behind":
            assert repository.swap_space(collection.id, drafted, self.versions[name] - 1, {}, [], {}) is None
            repository.cancel(job_id)
            repository.remove_drafts()
            return
        losing = [id_ for id_, vectors in memories.items() if id_ in lost and space in vectors]
        assert repository.lost(collection.id, drafted, 10).count == len(losing)
        swapped = repository.swap_space(collection.id, drafted, self.versions[name], {"name": name}, [], {"a": 1})
        self.versions[name] += 1
        for id_, vectors in list(memories.items()):
            if space in vectors:
                assert len(vectors[space]) == size
                vectors[space] = [-value for value in vectors[space]]
            if id_ in losing:
                del vectors[space]
        bare = [id_ for id_ in losing if not memories[id_]]
        for id_ in bare:
            del memories[id_]
        made = sum(space in vectors for vectors in memories.values())
        assert swapped == Swapped(self.versions[name], made, bare)
        job = repository.get_job(job_id)
        assert (job.status, job.result) == (
            "done",
            {"a": 1, "version": swapped.version, "memories": made, "deleted": len(bare)},
        )
        repository.remove_drafts()
        with pytest.raises(EncodersChanged):
            repository.put_memories(collection.id, [MemoryWrite("late")], generation=collection.generation)

    @invariant()
    def no_drafts_are_left(self):
        with self.database.read() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM pattern_drafts").scalar() == 0

    @invariant()
    def agree(self):
        listed = {each.name: each for each in self.repository.list_collections()}
        assert set(listed) == set(self.collections)
        for name, memories in self.collections.items():
            assert (listed[name].version, listed[name].count) == (self.versions[name], len(memories))
            with self.repository.iter_patterns(listed[name].id, SPACES, chunk=2) as stream:
                assert stream.version == self.versions[name]
                rows = [
                    (id_, {space: chunk.vectors[space][i].tolist() for space, _ in SPACES})
                    for chunk in stream.chunks
                    for i, id_ in enumerate(chunk.ids)
                ]
            assert rows == [
                (id_, {space: vectors.get(space, [0.0] * size) for space, size in SPACES})
                for id_, vectors in memories.items()
            ]


def test_storage_agrees_with_its_model(new_database, tmp_path):
    StorageMachine.place = new_database(tmp_path)
    run_state_machine_as_test(StorageMachine, settings=settings(stateful_step_count=12))
