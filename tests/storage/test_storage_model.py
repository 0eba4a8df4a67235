"""Storage against a model of it in a dict, restart being one of the moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from service.errors import CollectionExists, CollectionNotFound
from service.storage.database import Database
from service.storage.memories import MemoryWrite
from service.storage.repository import Repository
from service.storage.tables import collections, name_versions
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
