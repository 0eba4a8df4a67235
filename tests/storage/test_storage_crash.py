"""`kill -9` and a full disk: what was acknowledged is there, and answers."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from service.errors import StorageFull
from service.storage.memories import MemoryWrite

KILLS = int(os.environ.get("ENGRAM_TEST_KILLS", "5"))

STORE = """
import sys, threading
from pathlib import Path
import numpy as np
from service.storage.blobs import Blobs
from service.storage.database import Database
from service.storage.folder import DataFolder
from service.storage.memories import MemoryWrite
from service.storage.repository import Repository
from service.storage.writer import Writer

folder = DataFolder.open(sys.argv[1])
life = sys.argv[2]
database = Database.open(folder.database_path if sys.argv[3] == "sqlite" else sys.argv[3])
repository, blobs = Repository(database, Writer(database)), Blobs(folder.blobs_path)
collection = repository.get_collection("c")

def store(thread):
    for i in range(10_000):
        ids = [f"{life}-{thread}-{i}-{n}" for n in range(1 + 10 * (thread == 0))]
        hashes = blobs.put_many([id_.encode() for id_ in ids])
        written = repository.put_memories(collection.id, [
            MemoryWrite(id_, blob_hash=hash_, vectors={"s": np.full(100, len(id_), np.float32)})
            for id_, hash_ in zip(ids, hashes)
        ])
        sys.stdout.write("".join(f"{id_} {written.version}\\n" for id_ in ids))
        sys.stdout.flush()

for thread in range(4):
    threading.Thread(target=store, args=(thread,), daemon=True).start()
threading.Event().wait()
"""


def test_acknowledged_memories_survive_kills(tmp_path, opener, new_database, spawn):
    where = new_database(tmp_path / "data")
    on_sqlite = isinstance(where, Path)
    storage = opener(tmp_path / "data")
    storage.repository.create_collection("c", {})
    storage.close()
    acknowledged: dict[str, int] = {}
    for life in range(KILLS):
        child = spawn(STORE, tmp_path / "data", life, "sqlite" if on_sqlite else where)
        first = child.stdout.readline()
        time.sleep(random.uniform(0, 0.2))
        child.kill()
        lines = (first + child.stdout.read()).splitlines(keepends=True)
        whole = (line.split() for line in lines if line.endswith("\n"))
        new = {id_: int(version) for id_, version in whole}

        storage = opener(tmp_path / "data")
        collection = storage.repository.get_collection("c")
        for id_, version in new.items():
            memory = storage.repository.get_memory(collection.id, id_)
            assert memory.version == version
            assert storage.blobs.get(memory.blob_hash) == id_.encode()
        acknowledged |= new
        assert collection.version >= max(acknowledged.values())
        with storage.repository.iter_patterns(collection.id, [("s", 100)]) as stream:
            rows = {id_: row for chunk in stream.chunks for id_, row in zip(chunk.ids, chunk.vectors["s"], strict=True)}
        assert all(np.array_equal(rows[id_], np.full(100, len(id_))) for id_ in acknowledged)
        if on_sqlite:
            with storage.database.read() as connection:
                assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        storage.close()
    assert len({id_.split("-")[0] for id_ in acknowledged}) == KILLS


@pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)  # the disk is the data folder's
def test_full_disk_refuses_the_write_and_harms_nothing_stored(mount, opener):
    point = mount("size=6m")
    (point / "something else").write_bytes(bytes(2 * 2**20))
    storage = opener(point / "data")
    repository = storage.repository
    collection = repository.create_collection("c", {})
    vector = np.arange(25_000, dtype=np.float32)
    stored: list[str] = []

    def fill():
        while True:
            repository.put_memories(collection.id, [MemoryWrite(str(len(stored)), vectors={"s": vector})])
            stored.append(str(len(stored)))

    def check():
        now = repository.get_collection("c")
        assert (now.version, now.count) == (len(stored), len(stored))
        for id_ in stored:
            assert np.array_equal(repository.get_vectors(collection.id, id_)["s"], vector)

    for _ in range(3):  # no write is half done, and readers go on
        with pytest.raises(StorageFull):
            fill()
        assert stored
        check()
    storage.close()
    storage = opener(storage.folder.path)  # also where the log could not be folded in
    repository = storage.repository
    check()
    (point / "something else").unlink()
    count = len(stored)
    with pytest.raises(StorageFull):
        fill()
    assert len(stored) > count  # goes on as soon as there is room
    check()
    storage.close()
