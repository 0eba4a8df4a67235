"""Collections, gates and memories: every method, and versions that never go back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from service.errors import CollectionExists, CollectionNotFound, MemoryNotFound
from service.storage.learned import Gate
from service.storage.memories import IN_MAX, Deleted, MemoryWrite, Written

CONFIG = {"spaces": {"image": {"encoder": "pixels", "weight": 1.0}}, "name": "Größe"}
ODD_IDS = ["a/b/../c", "ü ∀ 🦜", "x" * 10_000, "", " ", "%_'\"\\;--", "line\nbreak"]


@pytest.fixture
def collection(repository):
    return repository.create_collection("c", CONFIG)


def vector(*values):
    return np.array(values, dtype=np.float32)


def everything(repository, collection_id, spaces, chunk=4096):
    with repository.iter_patterns(collection_id, spaces, chunk) as stream:
        chunks = list(stream.chunks)
        assert stream.count == sum(len(each.ids) for each in chunks)
        return stream.version, chunks


# --- collections ------------------------------------------------------------------------------------------------------


def test_collection_is_created_found_and_listed(repository):
    before = datetime.now(UTC)
    b = repository.create_collection("b", CONFIG)
    a = repository.create_collection("ü/ a", {})
    assert (b.name, b.config, b.version, b.count) == ("b", CONFIG, 0, 0)
    assert before <= b.created_at <= datetime.now(UTC)
    assert repository.get_collection("b") == b
    repository.put_memories(b.id, [MemoryWrite("1"), MemoryWrite("2")])
    listed = repository.list_collections()
    assert [(each.name, each.id, each.version, each.count) for each in listed] == [
        ("b", b.id, 1, 2),
        ("ü/ a", a.id, 0, 0),
    ]
    assert repository.get_collection("b") == listed[0]


def test_name_is_unique_and_unknown_ones_are_named(repository, collection):
    with pytest.raises(CollectionExists, match="'c'"):
        repository.create_collection("c", {})
    assert repository.get_collection("c").config == CONFIG
    with pytest.raises(CollectionNotFound, match="'d'"):
        repository.get_collection("d")
    with pytest.raises(CollectionNotFound, match="'d'"):
        repository.delete_collection("d")


def test_delete_takes_everything_of_that_collection_alone(storage, collection):
    repository = storage.repository
    other = repository.create_collection("other", {})
    jobs = {}
    for each in (collection, other):
        repository.put_memories(each.id, [MemoryWrite("m", vectors={"image": vector(1, 2)})])
        repository.put_gates(each.id, {"image": {"threshold": 1}})
        repository.put_kernel(each.id, "image", "cue", np.eye(2, dtype=np.float32), {}, activate=True)
        jobs[each.name] = repository.enqueue("store", each.id, {})
    repository.delete_collection("c")
    with storage.database.read() as connection:
        for table in ("collections", "memories", "patterns", "gates", "kernels", "jobs"):
            assert connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar() == 1
    assert repository.get_job(jobs["other"]).collection_id == other.id
    assert [each.name for each in repository.list_collections()] == ["other"]
    assert repository.get_memory(other.id, "m").spaces == ("image",)


def test_version_continues_where_a_deleted_collection_of_the_name_stopped(repository, collection):
    for version in (1, 2):
        assert repository.put_memories(collection.id, [MemoryWrite("m")]).version == version
    repository.delete_collection("c")
    again = repository.create_collection("c", {})
    assert again.id != collection.id
    assert again.version == 3  # deleting was a write
    assert again.count == 0
    assert repository.put_memories(again.id, [MemoryWrite("m")]) == Written(4, ["stored"])
    repository.delete_collection("c")
    assert repository.create_collection("c", {}).version == 5
    assert repository.create_collection("fresh", {}).version == 0


def test_writes_to_a_deleted_collection_are_refused(repository, collection):
    repository.delete_collection("c")
    for write in (
        lambda: repository.put_memories(collection.id, [MemoryWrite("m")]),
        lambda: repository.delete_memories(collection.id, ["m"]),
        lambda: repository.put_gates(collection.id, {"image": {}}),
        lambda: repository.put_kernel(collection.id, "image", "cue", np.eye(2, dtype=np.float32), {}, activate=False),
        lambda: repository.retire_kernel(collection.id, "image"),
        lambda: repository.enqueue("store", collection.id, {}),
        lambda: everything(repository, collection.id, []),
    ):
        with pytest.raises(CollectionNotFound, match="deleted"):
            write()


# --- gates ------------------------------------------------------------------------------------------------------------


def test_gates_are_kept_per_modality_and_replaced(repository, collection):
    other = repository.create_collection("other", {})
    assert repository.get_gates(collection.id) == {}
    repository.put_gates(other.id, {"image": {"threshold": 9.5}})
    repository.put_gates(collection.id, {"image": {"threshold": 1.5}, "gone": {}})
    before = datetime.now(UTC)
    records = {"image": {"threshold": 3.5}, "image+text": {"threshold": 2.5, "notes": ["ü"]}}
    repository.put_gates(collection.id, records)
    gates = repository.get_gates(collection.id)
    assert {modality: gate.record for modality, gate in gates.items()} == {
        "image": {"threshold": 3.5},
        "image+text": {"threshold": 2.5, "notes": ["ü"]},
    }
    assert isinstance(gates["image"], Gate)
    assert before <= gates["image+text"].created_at == gates["image"].created_at
    repository.put_gates(collection.id, {})
    assert repository.get_gates(collection.id) == {}
    assert list(repository.get_gates(other.id)) == ["image"]


# --- memories ---------------------------------------------------------------------------------------------------------


def test_memory_comes_back_whole(repository, collection):
    write = MemoryWrite(
        "m",
        text="a caption, ü",
        payload={"tags": ["a", None, 1.5], "nested": {"ü": True}, "big": 2**53 + 1},
        blob_hash="0" * 64,
        media_type="image/png",
        vectors={"image": vector(1, -2.5, 1e-30), "text": vector(3)},
    )
    assert repository.put_memories(collection.id, [write]) == Written(1, ["stored"])
    memory = repository.get_memory(collection.id, "m")
    for name in ("id", "text", "payload", "blob_hash", "media_type"):
        assert getattr(memory, name) == getattr(write, name)
    assert (memory.version, memory.spaces) == (1, ("image", "text"))
    assert datetime.now(UTC) - memory.created_at < timedelta(minutes=1)
    assert memory.updated_at == memory.created_at
    vectors = repository.get_vectors(collection.id, "m")
    assert {space: each.dtype for space, each in vectors.items()} == {"image": np.float32, "text": np.float32}
    assert all(np.array_equal(vectors[space], write.vectors[space]) for space in write.vectors)


def test_storing_an_id_again_replaces_all_of_it_in_its_place(repository, collection):
    first = [
        MemoryWrite(
            id_, text="t", payload={"n": 1}, blob_hash="1" * 64, media_type="a", vectors={"image": vector(1, 1)}
        )
        for id_ in ("a", "b", "c")
    ]
    repository.put_memories(collection.id, first)
    created = repository.get_memory(collection.id, "b").created_at
    assert repository.put_memories(
        collection.id, [MemoryWrite("b", vectors={"text": vector(7)}), MemoryWrite("d")]
    ) == (Written(2, ["updated", "stored"]))
    b = repository.get_memory(collection.id, "b")
    assert (b.version, b.text, b.payload, b.blob_hash, b.media_type, b.spaces) == (2, None, None, None, None, ("text",))
    assert b.created_at == created < b.updated_at
    assert repository.get_memory(collection.id, "a").version == 1
    _, (chunk,) = everything(repository, collection.id, [])
    assert chunk.ids == ["a", "b", "c", "d"]
    assert repository.count(collection.id) == 4


def test_last_of_one_id_in_a_batch_wins(repository, collection):
    writes = [MemoryWrite(id_, payload={"n": n}, vectors={"s": vector(n)}) for n, id_ in enumerate("abaa")]
    assert repository.put_memories(collection.id, writes) == Written(1, ["stored", "stored", "updated", "updated"])
    assert repository.get_memory(collection.id, "a").payload == {"n": 3}
    assert repository.get_vectors(collection.id, "a")["s"] == vector(3)
    assert repository.count(collection.id) == 2


def test_odd_ids_and_long_payloads(repository, collection):
    payload = {"long": "ü" * 1_000_000}
    repository.put_memories(collection.id, [MemoryWrite(id_, text=id_, payload=payload) for id_ in ODD_IDS])
    for id_ in ODD_IDS:
        memory = repository.get_memory(collection.id, id_)
        assert (memory.text, memory.payload) == (id_, payload)
    assert repository.delete_memories(collection.id, ODD_IDS) == Deleted(2, ODD_IDS)


def test_batch_longer_than_a_statement_takes(repository, collection):
    writes = [MemoryWrite(str(i), vectors={"s": vector(i)}) for i in range(2 * IN_MAX + 1)]
    assert set(repository.put_memories(collection.id, writes).statuses) == {"stored"}
    assert set(repository.put_memories(collection.id, writes).statuses) == {"updated"}
    _, (chunk,) = everything(repository, collection.id, [("s", 1)])
    assert chunk.ids == [write.id for write in writes]
    assert chunk.vectors["s"][:, 0].tolist() == list(range(len(writes)))
    assert len(repository.delete_memories(collection.id, chunk.ids).ids) == len(writes)
    assert repository.count(collection.id) == 0


def test_collections_do_not_see_each_others_memories(repository, collection):
    other = repository.create_collection("other", {})
    for each, value in ((collection, 1), (other, 2)):
        repository.put_memories(each.id, [MemoryWrite("same", payload={"n": value}, vectors={"s": vector(value)})])
    assert repository.get_memory(other.id, "same").payload == {"n": 2}
    assert repository.get_vectors(collection.id, "same")["s"] == vector(1)
    assert repository.delete_memories(collection.id, ["same"]).ids == ["same"]
    assert repository.get_memory(other.id, "same").version == 1


def test_delete_names_what_existed_and_takes_a_version_only_then(repository, collection):
    repository.put_memories(collection.id, [MemoryWrite(id_, vectors={"s": vector(1)}) for id_ in "abc"])
    assert repository.delete_memories(collection.id, ["c", "x", "a", "c"]) == Deleted(2, ["c", "a"])
    assert repository.delete_memories(collection.id, ["c", "x"]) == Deleted(2, [])
    assert repository.delete_memories(collection.id, []) == Deleted(2, [])
    assert repository.get_collection("c").version == 2
    for read in (repository.get_memory, repository.get_vectors):
        with pytest.raises(MemoryNotFound, match="'a'"):
            read(collection.id, "a")
    version, (chunk,) = everything(repository, collection.id, [("s", 1)])
    assert (version, chunk.ids) == (2, ["b"])


def test_vector_may_be_a_strided_or_wider_array(repository, collection):
    matrix = np.arange(12, dtype=np.float64).reshape(3, 4)
    repository.put_memories(collection.id, [MemoryWrite("m", vectors={"s": matrix[:, 1]})])
    assert repository.get_vectors(collection.id, "m")["s"].tolist() == [1, 5, 9]


# --- the stream a bank loads from -------------------------------------------------------------------------------------


def test_stream_gives_all_in_order_with_zeros_for_lacking_spaces(repository, collection):
    for i in range(7):
        vectors = {"image": vector(i, -i)} if i % 3 else {}
        vectors |= {"text": vector(i, i, i)} if i % 2 else {}
        repository.put_memories(collection.id, [MemoryWrite(f"m{i}", payload={"i": i} if i else None, vectors=vectors)])
    version, chunks = everything(repository, collection.id, [("text", 3), ("image", 2), ("none", 1)], chunk=3)
    assert version == 7
    assert [chunk.ids for chunk in chunks] == [["m0", "m1", "m2"], ["m3", "m4", "m5"], ["m6"]]
    assert [payload for chunk in chunks for payload in chunk.payloads] == [
        None,
        *(b'{"i":%d}' % i for i in range(1, 7)),
    ]
    stacked = {space: np.concatenate([chunk.vectors[space] for chunk in chunks]) for space in ("text", "image", "none")}
    assert {each.dtype for each in stacked.values()} == {np.dtype(np.float32)}
    assert stacked["image"].tolist() == [[i, -i] if i % 3 else [0, 0] for i in range(7)]
    assert stacked["text"].tolist() == [[i] * 3 if i % 2 else [0] * 3 for i in range(7)]
    assert stacked["none"].tolist() == [[0]] * 7
    assert chunks[0].vectors["text"].flags.writeable


def test_stream_of_an_empty_collection(repository, collection):
    assert everything(repository, collection.id, [("image", 2)]) == (0, [])


def test_stream_stays_at_its_version_while_others_write(repository, collection):
    repository.put_memories(collection.id, [MemoryWrite(str(i), vectors={"s": vector(i)}) for i in range(10)])
    with repository.iter_patterns(collection.id, [("s", 1)], chunk=2) as stream:
        first = next(stream.chunks)
        repository.put_memories(collection.id, [MemoryWrite("9", vectors={"s": vector(99)}), MemoryWrite("new")])
        repository.delete_memories(collection.id, ["5"])
        rest = list(stream.chunks)
    assert (stream.version, stream.count) == (1, 10)
    assert np.concatenate([chunk.vectors["s"] for chunk in [first, *rest]])[:, 0].tolist() == list(range(10))
    version, chunks = everything(repository, collection.id, [("s", 1)])
    assert (version, chunks[0].ids) == (3, ["0", "1", "2", "3", "4", "6", "7", "8", "9", "new"])


def test_stream_may_be_left_early(repository, collection):
    repository.put_memories(collection.id, [MemoryWrite(str(i)) for i in range(10)])
    for _ in range(100):  # more often than there are connections
        with repository.iter_patterns(collection.id, [], chunk=2) as stream:
            next(stream.chunks)
    repository.delete_collection("c")


def test_stream_refuses_another_dimension(repository, collection):
    repository.put_memories(collection.id, [MemoryWrite("m", vectors={"s": vector(1, 2)})])
    with pytest.raises(ValueError, match="reshape"):
        everything(repository, collection.id, [("s", 3)])


# --- originals --------------------------------------------------------------------------------------------------------


def test_blobs_of_memories_are_in_use_until_none_names_them(repository, collection):
    one, two, unknown = "1" * 64, "2" * 64, "3" * 64
    repository.put_memories(collection.id, [MemoryWrite("a", blob_hash=one), MemoryWrite("b", blob_hash=one)])
    repository.put_memories(collection.id, [MemoryWrite("c", blob_hash=two), MemoryWrite("d")])
    assert repository.blob_hashes_in_use([one, two, unknown]) == {one, two}
    assert repository.blob_hashes_in_use([]) == set()
    repository.delete_memories(collection.id, ["a"])
    repository.put_memories(collection.id, [MemoryWrite("c")])
    assert repository.blob_hashes_in_use([one, two]) == {one}
    repository.delete_collection("c")
    assert repository.blob_hashes_in_use([one, two]) == set()


def test_removal_of_originals_spares_those_in_use(storage, collection):
    kept, left = storage.blobs.put_many([b"kept", b"left"])
    storage.repository.put_memories(collection.id, [MemoryWrite("m", blob_hash=kept)])
    assert storage.blobs.remove_unreferenced(storage.repository.blob_hashes_in_use, older_than_s=0) == 1
    assert (storage.blobs.exists(kept), storage.blobs.exists(left)) == (True, False)
