"""A delete leaves nothing behind: not in the database's file, not in its log, not among the originals."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from service.app.engine import Engine
from service.app.memory_schemas import DeleteRequest, PatchRequest
from service.app.schemas import CollectionConfig, StoreRequest
from service.settings import Settings
from service.storage.jobs import ItemAnswer, NewItem
from workers.loop import running

COUNT = 60
D = 128
ROWS = np.random.default_rng(0).standard_normal((COUNT, D)).astype(np.float32)
SPACES = {"v": {"dimension": D}, "image": {"encoder": "pixels", "options": {"size": 8}}}


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def memory(i: int) -> dict[str, Any]:
    made = {"id": f"id-{i}", "vectors": {"v": ROWS[i].tolist()}, "payload": {"said": f"payload-{i:03} " * (1 + i)}}
    return made | ({"image": {"base64": png(i)}, "text": f"text-{i:03}"} if i % 3 == 0 else {})


def kept(folder: Path) -> bytes:
    """Every byte of the database, and of its log."""
    return b"".join(path.read_bytes() for path in sorted(folder.glob("engram.db*")))


def traces(engine: Engine, content: bytes, i: int) -> list[str]:
    """What is still found of a memory."""
    parts = {
        "payload": f"payload-{i:03}".encode(), "changed": f"changed-{i:03}".encode(), "text": f"text-{i:03}".encode(),
        "start of the pattern": ROWS[i, :8].tobytes(), "end of the pattern": ROWS[i, -8:].tobytes(),
    }  # fmt: skip
    return [name for name, part in parts.items() if part in content]


def test_nothing_of_a_deleted_memory_is_left(tmp_path: Path) -> None:
    with Engine(Settings(data=tmp_path)) as engine, running(engine):
        engine.create_collection("c", CollectionConfig.model_validate({"spaces": SPACES}))
        for start in range(0, COUNT, 20):
            memories = [memory(i) for i in range(start, start + 20)]
            reply = engine.store(
                "c", StoreRequest.model_validate({"memories": memories, "idempotency_key": f"k{start}"})
            )
            assert not [item.error for item in reply.results if item.error]
        encoded = [engine.repository.get_vectors(engine.resources.live("c").id, f"id-{i}")["image"] for i in (0, 3)]
        for i in range(0, COUNT, 4):  # rows that grow and shrink move between pages
            engine.patch("c", f"id-{i}", PatchRequest.model_validate({"payload": {"said": f"changed-{i:03}" * 90}}))
            engine.patch("c", f"id-{i}", PatchRequest.model_validate({"payload": {"said": f"changed-{i:03}"}}))
        content = kept(tmp_path)
        assert traces(engine, content, 4) == ["payload", "changed", "start of the pattern", "end of the pattern"]
        assert traces(engine, content, 3)
        assert encoded[1].tobytes()[:64] in content

        gone = [i for i in range(COUNT) if i % 5]
        engine.delete("c", DeleteRequest.model_validate({"ids": [f"id-{i}" for i in gone]}))
        hashes = {path.name: path for path in tmp_path.glob("blobs/??/*")}
        assert len(hashes) == COUNT // 3
        for path in hashes.values():
            os.utime(path, (1, 1))
        engine.housekeep()
        content = kept(tmp_path)
        assert {i: traces(engine, content, i) for i in gone if traces(engine, content, i)} == {}
        assert encoded[1].tobytes()[:64] not in content
        left = [i for i in range(COUNT) if i % 5 == 0]
        assert all(traces(engine, content, i) for i in left)
        assert encoded[0].tobytes()[:64] in content
        assert sum(path.exists() for path in hashes.values()) == len([i for i in left if i % 3 == 0])

        engine.delete_collection("c")
        engine.housekeep()
        content = kept(tmp_path)
        assert not any(traces(engine, content, i) for i in range(COUNT))
        assert b"id-3" not in content  # receipts and operations went with the collection


def test_an_answered_item_is_not_kept_with_what_it_was(tmp_path: Path) -> None:
    with Engine(Settings(data=tmp_path)) as engine:
        live = engine.create_collection("c", CollectionConfig.model_validate({"spaces": SPACES}))
        assert live.count == 0
        hash_ = engine.blobs.put(png(0))
        items = [NewItem({"text": "answered-text"}, hash_), NewItem({"text": "waiting-text"})]
        id_ = engine.repository.enqueue("kind", engine.resources.live("c").id, {"items": 2}, items)
        engine.repository.claim(["kind"], "owner")
        engine.repository.finish_items(id_, [ItemAnswer(0, "done", {"id": "x"})])
        engine.repository.fail(id_, {"code": "internal", "detail": "for the test"})
        assert [answer.result for answer in engine.repository.item_answers(id_)] == [{"id": "x"}]
        assert engine.repository.blob_hashes_in_use([hash_]) == set()
        engine.housekeep()
        assert b"answered-text" not in kept(tmp_path)
        assert b"waiting-text" in kept(tmp_path)  # so that it can be retried


def test_the_log_is_emptied_later_where_a_reader_is_in_the_way(tmp_path: Path) -> None:
    with Engine(Settings(data=tmp_path)) as engine:
        engine.create_collection("c", CollectionConfig.model_validate({"spaces": SPACES}))
        reading, done = threading.Event(), threading.Event()

        def read() -> None:
            with engine.repository.iter_patterns(engine.resources.live("c").id, [("v", D)]):
                reading.set()
                assert done.wait(30)

        reader = threading.Thread(target=read)
        reader.start()
        assert reading.wait(30)
        engine.store("c", StoreRequest.model_validate({"memories": [{"id": "m", "vectors": {"v": ROWS[0].tolist()}}]}))
        assert not engine.repository.empty_log()
        done.set()
        reader.join()
        assert engine.repository.empty_log()
        assert (tmp_path / "engram.db-wal").stat().st_size == 0
