"""Snapshots: of one version, whole, and what comes back is what was there, on either database and across them."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.app import restore, snapshots
from service.app.engine import Engine
from service.app.memory_schemas import DeleteRequest, PatchRequest
from service.app.schemas import CollectionConfig, Operation, RecallRequest, StoreRequest
from service.app.snapshot_schemas import RestoreRequest
from service.errors import (
    CollectionNotEmpty,
    CollectionNotFound,
    Conflict,
    EncoderMismatch,
    EngramError,
    InvalidRequest,
    SnapshotDamaged,
    SnapshotNotFound,
)
from service.settings import Settings
from service.storage.collection import HIDDEN
from service.storage.tables import collections
from workers.loop import running

D = 16
SPACES = {"v": {"dimension": D}, "image": {"encoder": "pixels", "options": {"size": 4}}}
RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((80, D)).astype(np.float32)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((16, 16)).save(buffer, "PNG")
    return buffer.getvalue()


Open = Callable[..., Engine]


@pytest.fixture
def settings(tmp_path: Path, new_database: Callable[[Path], Path | str]) -> Settings:
    where = new_database(tmp_path / "memories")
    return Settings(data=tmp_path / "memories", database_url=where if isinstance(where, str) else None)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    with Engine(settings) as opened, running(opened):
        yield opened


def fill(engine: Engine, name: str = "c", count: int = 60) -> None:
    config = {"spaces": SPACES, "corruptions": [{"kind": "noise", "sigma": 0.05}]}
    engine.create_collection(name, CollectionConfig.model_validate(config))
    memories: list[dict[str, Any]] = [
        {"id": f"m{i}", "vectors": {"v": ROWS[i]}, "payload": {"n": i, "ä": ["x", None, 1.5]}, "text": f"text {i}"}
        for i in range(count)
    ]
    for i in range(count):
        if i % 5:
            memories[i]["image"] = {"base64": png(i)}
    assert all(item.error is None for item in store(engine, memories, name).results)
    deadline = time.monotonic() + 60
    while engine.collection(name).calibration.state != "current":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def store(engine: Engine, memories: list[dict[str, Any]], name: str = "c") -> Any:
    return engine.store(name, StoreRequest(memories=memories))


def ended(engine: Engine, operation: Operation) -> dict[str, Any]:
    """Its result. Raises why it failed."""
    deadline = time.monotonic() + 60
    while operation.status in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
        operation = engine.operation(operation.id)
    if operation.error is not None:
        raise AssertionError(operation.error.code, operation.error.detail)
    assert operation.status == "done"
    return operation.result or {}


def snapshot(engine: Engine, name: str = "c") -> str:
    return str(ended(engine, engine.create_snapshot(name))["id"])


def restored(engine: Engine, id_: str, name: str = "c", **request: Any) -> dict[str, Any]:
    return ended(engine, engine.restore(name, id_, RestoreRequest(**request)))


def content(engine: Engine, name: str) -> dict[str, Any]:
    """All of a collection that does not depend on when it was written."""
    live = engine.resources.live(name)
    layout = [(space.name, space.dimension) for space in live.spaces.values()]
    vectors: dict[str, Any] = {}
    with engine.repository.iter_patterns(live.id, layout) as stream:
        for chunk in stream.chunks:
            for row, id_ in enumerate(chunk.ids):
                vectors[id_] = {space: block[row].tobytes() for space, block in chunk.vectors.items()}
    found: dict[str, Any] = {"order": list(vectors), "vectors": vectors}
    for id_ in vectors:
        memory = engine.repository.get_memory(live.id, id_)
        found[id_] = (memory.text, memory.payload, memory.media_type, memory.created_at, memory.updated_at)
        found[id_] += (memory.spaces, engine.content(name, id_) if memory.blob_hash else None)
    found["kernels"] = [
        (k.space, k.number, k.status, k.record, None if k.weight is None else k.weight.tobytes(), k.created_at)
        for k in engine.repository.get_kernels(live.id)
    ]
    gates = engine.repository.get_gates(live.id)
    found["gates"] = {name: {**gate.record, "version": 0, "alone": 0} for name, gate in gates.items()}
    info = engine.collection(name)
    found["info"] = info.model_dump(exclude={"name", "version", "calibration", "indexing", "bytes"})
    found["calibration"] = info.calibration.model_dump(exclude={"modalities", "choices"})
    return found


def order(engine: Engine) -> list[str]:
    with engine.repository.iter_patterns(engine.resources.live("c").id, [("v", D)]) as stream:
        return [id_ for chunk in stream.chunks for id_ in chunk.ids]


def verdicts(engine: Engine, name: str) -> list[Any]:
    cues = [{"image": {"base64": png(i)}} for i in range(80)]  # the last ones were never stored
    results = engine.recall(name, RecallRequest.model_validate({"cues": cues}))["results"]
    return [(result["verdict"], result["matches"][0]["id"], result["gate"]) for result in results]


RECORD: dict[str, Any] = {
    "space": "v", "objective": "cues", "start": "whitening", "memories": 2, "cues": 2, "corruptions": [], "steps": 1,
    "best_step": 1, "stopped": "steps", "seconds": 1.0, "curve": [], "trial": [], "kept": True, "why": "for the test",
}  # fmt: skip


def test_what_comes_back_is_what_was_there(engine: Engine) -> None:
    fill(engine)
    live = engine.resources.live("c")
    for activate in (True, False):
        weight = RNG.standard_normal((4, D)).astype(np.float32)
        engine.repository.put_kernel(live.id, "v", "cues", weight, RECORD, activate)
    store(engine, [{"id": "m5", "vectors": {"v": ROWS[5]}, "text": "once more"}])
    before, judged, version = content(engine, "c"), verdicts(engine, "c"), engine.collection("c").version
    assert {verdict for verdict, _, _ in judged} == {"known", "unknown"}
    id_ = snapshot(engine)
    info = engine.snapshot("c", id_)
    assert (info.made_of, info.memories, info.originals) == ("c", 60, 48)
    assert info.version == engine.repository.get_collection("c").version

    done = restored(engine, id_, into="d")  # into another name
    assert (done["memories"], done["originals"], done["problems"]) == (60, 48, {})
    assert done["version"] == engine.collection("d").version > version
    before["info"]["kernels"] = engine.collection("d").kernels  # put behind the live collection's back, above
    after = content(engine, "d")
    after["info"]["kernels"] = before["info"]["kernels"]
    after["calibration"] = before["calibration"]  # of which the next test asks
    assert after == before
    assert verdicts(engine, "d")[1][1] == "m1"

    engine.delete_memories("c", ["m2", "m3"])  # and over itself, with what came since
    store(engine, [{"id": "new", "vectors": {"v": ROWS[70]}}])
    version = engine.collection("c").version
    with pytest.raises(CollectionNotEmpty):
        engine.restore("c", id_, RestoreRequest())
    assert restored(engine, id_, replace=True)["version"] > version + 1
    assert content(engine, "c")["order"] == before["order"]
    versions = {engine.memory("c", f"m{i}").version for i in range(60)}
    assert min(versions) > version
    assert engine.memory("c", "m5").version > engine.memory("c", "m4").version  # the calibration stood between
    assert engine.repository.hidden_collections() == []
    engine.delete_collection("c")  # a deleted one comes back, and its numbers go on
    version = restored(engine, id_)["version"]
    assert version > max(versions)
    assert store(engine, [{"id": "again", "vectors": {"v": ROWS[3]}}]).version > version


def test_verdicts_are_as_before_at_once(engine: Engine, settings: Settings) -> None:
    fill(engine)
    before, calibration = verdicts(engine, "c"), engine.collection("c").calibration
    id_ = snapshot(engine)
    restored(engine, id_, into="d")
    assert verdicts(engine, "d") == before
    now = engine.collection("d").calibration
    assert (now.state, now.changed_rows, now.rows_then) == ("current", calibration.changed_rows, 60)
    recorded = {m.modality: (m.log_lambda, m.gate_beta) for m in calibration.modalities}
    assert {m.modality: (m.log_lambda, m.gate_beta) for m in now.modalities} == recorded


def test_a_restored_collection_survives_a_restart(settings: Settings) -> None:
    with Engine(settings) as first, running(first):
        fill(first, count=30)
        restored(first, snapshot(first), into="d")
        before, version = content(first, "d"), first.collection("d").version
    with Engine(settings) as second:
        assert content(second, "d") == before
        assert second.collection("d").version == version


def test_a_snapshot_is_of_one_version(engine: Engine) -> None:
    """Pairs are stored and deleted together while snapshots are made: none holds half of a pair."""
    engine.create_collection("c", CollectionConfig.model_validate({"spaces": {"v": {"dimension": D}}}))
    stop = threading.Event()

    def write() -> None:
        pair = 0
        while not stop.is_set():
            store(engine, [{"id": f"{pair}-{half}", "vectors": {"v": ROWS[pair % 80]}} for half in "ab"])
            if pair % 3 == 2:
                engine.delete_memories("c", [f"{pair - 1}-{half}" for half in "ab"])
            pair += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        made = [snapshot(engine) for _ in range(4)]
    finally:
        stop.set()
        writer.join()
    assert len({engine.snapshot("c", id_).version for id_ in made}) > 1
    for id_ in made:
        done = restored(engine, id_, into="d", replace=True)
        order = content(engine, "d")["order"]
        assert done["memories"] == len(order) == engine.snapshot("c", id_).memories
        assert {i.split("-")[0] for i in order if i.endswith("a")} == {i.split("-")[0] for i in order if i[-1] == "b"}


@pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)
def test_across_databases(engine: Engine, tmp_path: Path, postgres_schema: Callable[[], str]) -> None:
    fill(engine, count=30)
    before, judged = content(engine, "c"), verdicts(engine, "c")
    id_ = snapshot(engine)
    there = Settings(data=tmp_path / "there", database_url=postgres_schema())
    with Engine(there) as other, running(other):
        copy(engine, other, "c", id_)
        restored(other, id_)
        assert content(other, "c") == before
        assert verdicts(other, "c") == judged
        back = snapshot(other)
        copy(other, engine, "c", back)
        restored(engine, back, replace=True)
    assert content(engine, "c") == before
    assert verdicts(engine, "c") == judged


def copy(source: Engine, target: Engine, name: str, id_: str) -> None:
    size, pieces = source.snapshot_content(name, id_)
    with target.receive_snapshot(name, id_) as receiving:
        for piece in pieces:
            receiving.write(piece)
        assert receiving.keep().size_bytes == size
    with target.receive_snapshot(name, id_) as receiving:  # sent again it is kept once
        for piece in source.snapshot_content(name, id_)[1]:
            receiving.write(piece)
        receiving.keep()


def kept_file(engine: Engine, id_: str, name: str = "c") -> Path:
    return engine.folder.path / "snapshots" / name / f"{id_}.tar"


def test_a_damaged_snapshot_changes_nothing(engine: Engine) -> None:
    fill(engine, count=30)
    id_ = snapshot(engine)
    before = content(engine, "c")
    path = kept_file(engine, id_)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"text 7", b"text 8"))
    with pytest.raises(AssertionError, match=r"snapshot_damaged.*00000000\.ndjson"):
        restored(engine, id_, replace=True)
    path.write_bytes(whole[:-5_000])
    with pytest.raises(SnapshotDamaged):
        engine.restore("c", id_, RestoreRequest(replace=True))
    assert engine.snapshots("c").snapshots == []
    assert set(engine.snapshots("c").damaged) == {id_}
    with engine.receive_snapshot("c", "other") as receiving:
        receiving.write(whole[:-5_000])
        with pytest.raises(SnapshotDamaged):
            receiving.keep()
    with pytest.raises(SnapshotNotFound):
        engine.restore("c", "other", RestoreRequest())
    with pytest.raises(InvalidRequest), engine.receive_snapshot("c", "../x"):
        pass
    assert content(engine, "c") == before
    assert engine.repository.hidden_collections() == []
    assert list((engine.folder.path / "snapshots/.tmp").iterdir()) == []
    path.write_bytes(whole)
    engine.delete_snapshot("c", id_)
    with pytest.raises(SnapshotNotFound):
        engine.delete_snapshot("c", id_)


def test_a_space_of_another_encoder_is_marked(engine: Engine) -> None:
    fill(engine, count=30)
    row = engine.repository.get_collection("c")
    former = {**row.config, "fingerprints": {**row.config["fingerprints"], "image": "pixels/0:former"}}
    change = collections.update().where(collections.c.id == row.id).values(config=former)
    engine.repository._writer.submit(lambda connection: connection.execute(change))
    done = restored(engine, snapshot(engine), into="d")
    assert done["problems"].keys() == {"image"}
    assert "engram reencode d image" in done["problems"]["image"]["detail"]
    assert engine.collection("d").spaces["image"].problem is not None
    with pytest.raises(EncoderMismatch):
        engine.recall("d", RecallRequest.model_validate({"cue": {"image": {"base64": png(0)}}}))
    cue = {"cue": {"vectors": {"v": ROWS[4]}}, "spaces": {"v": 1}}
    assert engine.recall("d", RecallRequest.model_validate(cue))["results"][0]["matches"][0]["id"] == "m4"


def test_what_is_missing_is_counted(engine: Engine) -> None:
    fill(engine, count=10)
    files = sorted((engine.folder.path / "blobs").glob("??/*"))
    files[0].unlink()
    files[1].write_bytes(b"damaged")
    info = engine.snapshot("c", snapshot(engine))
    assert (info.originals, info.originals_missing) == (6, 2)
    assert restored(engine, info.id, into="d")["originals_missing"] == 2


def test_only_one_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(engine, count=10)
    begun, hold = threading.Event(), threading.Event()
    get = engine.blobs.get

    def held(hash_: str) -> bytes:
        begun.set()
        hold.wait()
        return get(hash_)

    monkeypatch.setattr(engine.blobs, "get", held)
    first = engine.create_snapshot("c")
    with pytest.raises(Conflict, match=first.id):
        engine.create_snapshot("c")
    begun.wait(30)
    engine.delete_memories("c", ["m1", "m2"])  # and what it has yet to read is not removed meanwhile
    assert engine.blobs.remove_unreferenced(engine.repository.blob_hashes_in_use, older_than_s=-60) == 0
    hold.set()
    assert ended(engine, first)["originals"] == 8
    assert engine.blobs.remove_unreferenced(engine.repository.blob_hashes_in_use, older_than_s=-60) == 2


def test_what_a_crash_left_is_tidied(engine: Engine) -> None:
    fill(engine, count=10)
    row = engine.repository.get_collection("c")
    for name in ("restore-gone", "former-7"):
        engine.repository.stage_collection(HIDDEN + name, row.config, 0, 1, row.created_at)
    assert len(engine.repository.hidden_collections()) == 2
    assert [info.name for info in engine.collections().collections] == ["c"]
    with pytest.raises(CollectionNotFound):
        engine.delete_collection(HIDDEN + "restore-gone")  # gRPC takes any name
    engine.housekeep()
    assert engine.repository.hidden_collections() == []
    with pytest.raises(EngramError):
        engine.collection(HIDDEN + "former-7")
    assert restore.STAGING.startswith(HIDDEN)


def test_a_write_never_goes_to_what_a_restore_took_the_place_of(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a request, or of another server, that has not heard of the restore: the former is still being removed."""
    engine.create_collection("c", CollectionConfig.model_validate({"spaces": {"v": {"dimension": D}}}))
    store(engine, [{"id": f"m{i}", "vectors": {"v": ROWS[i]}} for i in range(5)])
    former = engine.resources.live("c")
    kept = snapshot(engine)
    monkeypatch.setattr(restore, "remove_hidden", lambda _: None)
    restored(engine, kept, replace=True)
    new = engine.resources.live("c")
    engine.resources.lives["c"] = former
    monkeypatch.setattr(engine.resources, "look", lambda: engine.resources.lives.update(c=new))
    reply = store(engine, [{"id": "late", "vectors": {"v": ROWS[0]}}])
    assert reply.results[0].status == "stored"
    assert engine.resources.live("c") is new
    assert order(engine)[-1] == "late"
    for write in (
        lambda: engine.patch("c", "m1", PatchRequest(payload={"n": -1})),
        lambda: engine.delete_memories("c", ["m2"]),
        lambda: engine.delete("c", DeleteRequest(ids=["m3"])),
    ):
        engine.resources.lives["c"] = former
        write()
        assert engine.resources.live("c") is new
    assert engine.memory("c", "m1").payload == {"n": -1}
    assert {"m2", "m3"}.isdisjoint(order(engine))


PROGRAM = """
import sys, time
from service.app.engine import Engine
from service.app.schemas import StoreRequest
from service.app.snapshot_schemas import RestoreRequest
from service.settings import Settings
from workers.loop import running

with Engine(Settings(data=sys.argv[1], database_url=sys.argv[2] or None)) as engine, running(engine):
    while True:
        for begin in (
            lambda: engine.create_snapshot("c"),
            lambda: engine.restore("c", sys.argv[3], RestoreRequest(replace=True)),
        ):
            operation = begin()
            print(operation.kind, flush=True)
            while engine.operation(operation.id).status in ("queued", "running"):
                time.sleep(0.01)
        engine.store("c", StoreRequest(memories=[{"id": "new", "vectors": {"v": [1.0] * 16}}]))
"""


@pytest.mark.full("postgres")
@pytest.mark.parametrize("kind", ["snapshot", "restore"])
def test_kill_9_leaves_the_former_or_the_new(settings: Settings, kind: str) -> None:
    """Killed while a snapshot is made or restored: what answers is whole, what was begun is done, nothing is left."""
    url = None if settings.database_url is None else settings.database_url.get_secret_value()
    rows = RNG.standard_normal((2_000, D)).astype(np.float32)
    ids = [f"m{i}" for i in range(len(rows))]
    with Engine(settings) as engine, running(engine):
        engine.create_collection("c", CollectionConfig.model_validate({"spaces": {"v": {"dimension": D}}}))
        for start in (0, 1_000):
            store(engine, [{"id": ids[i], "vectors": {"v": rows[i]}} for i in range(start, start + 1_000)])
        kept = snapshot(engine)
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(settings.data), url or "", kept], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child.stdout:
        while child.stdout.readline().strip() != kind:
            assert child.poll() is None
        time.sleep(float(np.random.default_rng().uniform(0, 0.5)))
        child.kill()
        child.wait()
    with Engine(settings) as engine, running(engine):
        assert order(engine) in (ids, [*ids, "new"])
        engine.repository.release_leases()  # over PostgreSQL a lease has to run out: as if it had
        engine.resources.wake_workers()
        for operation in engine.operations().operations:
            if operation.kind in ("snapshot", "restore"):
                ended(engine, operation)
        assert order(engine) in (ids, [*ids, "new"])
        engine.housekeep()
        assert engine.repository.hidden_collections() == []
        assert engine.snapshots("c").damaged == {}
        for info in engine.snapshots("c").snapshots:
            keeps = engine.resources.snapshots
            snapshots.verify(keeps, keeps.find("c", info.id), 2**26)
            assert info.memories in (len(ids), len(ids) + 1)
        assert list((settings.data / "snapshots" / ".tmp").iterdir()) == []
