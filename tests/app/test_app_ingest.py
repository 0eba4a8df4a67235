"""The pipeline of store jobs: order, bad items, cancelling, shared batches, what is remembered, crashes."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prometheus_client import generate_latest
from sqlalchemy import update

from service.app import handover
from service.app import store as store_module
from service.app.encoding import EncodeCache, Parts
from service.app.engine import Engine
from service.app.live import LiveCollection, make_spaces
from service.app.schemas import CollectionConfig, RecallRequest, StoreReply, StoreRequest
from service.encoders.protocol import Encoded, Picture, Source
from service.errors import StorageUnavailable
from service.observability import Metrics
from service.settings import Settings
from service.storage import tables
from workers import ingest
from workers.loop import running

BAD, BROKEN = 13, 14  # the red of a picture that the encoder refuses, and of one that it fails on


class Means:
    """An encoder of mean colours, which notes its batches, and waits where it is told to."""

    name = "means"
    fingerprint = "means/1"
    dimension = 3
    takes: frozenset[Source] = frozenset({"image", "text"})

    def __init__(self) -> None:
        self.batches: list[list[int]] = []  # the red of each picture
        self.texts = 0
        self.open = threading.Event()
        self.open.set()

    def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
        colours = np.stack([picture.pixels.mean((0, 1)) for picture in pictures]).astype(np.float32)
        reds = [int(red) for red in colours[:, 0]]
        self.batches.append(reds)
        assert self.open.wait(60)
        if BAD in reds:
            raise MemoryError
        if BROKEN in reds:
            raise ZeroDivisionError
        return Encoded(colours, ((),) * len(pictures))

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        self.texts += len(texts)
        rows = np.array([[len(text), 1, text.count(" ")] for text in texts], dtype=np.float32)
        return Encoded(rows, tuple(("cut",) if len(text) > 9 else () for text in texts))


def png(red: int, shade: int = 7) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 5, 3), (red, shade, 9), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def memory(red: int, **given: Any) -> dict[str, Any]:
    return {"id": str(red), "image": {"base64": png(red)}, **given}


@pytest.fixture
def encoder() -> Means:
    return Means()


@pytest.fixture
def engine(tmp_path: Path, encoder: Means) -> Iterator[Engine]:
    """Without workers: a test says when they start."""
    with Engine(Settings(data=tmp_path)) as opened:
        opened.resources.make_encoder = lambda name, options: encoder
        opened.resources.calibrate_if_due = lambda live: None  # it encodes cues of its own
        for name in ("a", "b"):
            opened.create_collection(name, CollectionConfig.model_validate({"spaces": {"m": {"encoder": "means"}}}))
        encoder.batches.clear()
        yield opened


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def store(engine: Engine, memories: list[dict[str, Any]], name: str = "a", **options: Any) -> StoreReply:
    return engine.store(name, StoreRequest(memories=memories, **options))


def queued(engine: Engine, memories: list[dict[str, Any]], name: str = "a") -> str:
    return store(engine, memories, name, wait=False).operation_id or ""


def done(engine: Engine, *operations: str) -> bool:
    return all(engine.operation(operation).status == "done" for operation in operations)


def test_small_requests_of_several_collections_share_batches(engine: Engine, encoder: Means) -> None:
    jobs = [queued(engine, [memory(red)], "ab"[red % 2]) for red in range(20, 60)]
    encoder.open.clear()
    with running(engine):
        until(lambda: bool(encoder.batches))
        time.sleep(0.3)  # the rest is read meanwhile; were it not yet, the batches would only be smaller
        encoder.open.set()
        until(lambda: done(engine, *jobs))
    assert sorted(red for batch in encoder.batches for red in batch) == list(range(20, 60))
    assert len(encoder.batches) < 20
    assert any({red % 2 for red in batch} == {0, 1} for batch in encoder.batches)
    assert (engine.count("a").count, engine.count("b").count) == (20, 20)
    # Of a batch's jobs, those of one collection are committed together.
    assert engine.count("a").version < 20


def test_of_one_id_the_memory_accepted_last_stays(engine: Engine) -> None:
    many = [memory(red, id="same", payload={"red": red}) for red in range(20, 220)]
    jobs = [queued(engine, many), queued(engine, [memory(7, id="same", payload={"red": 7})])]
    with running(engine):
        until(lambda: done(engine, *jobs))
    first, second = (engine.operation(job).result or {} for job in jobs)
    assert [position for position, _ in first["results"]] == list(range(200))
    assert [item["status"] for _, item in first["results"]] == ["stored"] + ["updated"] * 199
    assert [item["status"] for _, item in second["results"]] == ["updated"]
    assert engine.memory("a", "same").payload == {"red": 7}
    vectors = engine.repository.get_vectors(engine.resources.live("a").id, "same")
    assert vectors["m"].tolist() == [7, 7, 9]


def test_a_bad_item_fails_alone_among_those_that_share_its_batch(
    engine: Engine, encoder: Means, monkeypatch: pytest.MonkeyPatch
) -> None:
    reds = [20, 21, BAD, 22, BROKEN, 23, 24]
    job = queued(engine, [memory(red) for red in reds])
    other = queued(engine, [memory(30)], "b")
    gone = engine.repository.get_job(job).id
    (hash_,) = [i.body["blob_hash"] for i in engine.repository.pending_items(gone, 10) if i.body["id"] == "23"]
    (engine.resources.settings.data / "blobs" / hash_[:2] / hash_).unlink()
    engine.resources.decoded = handover.Handover()  # as after a restart: what was decoded is gone
    with running(engine):
        until(lambda: done(engine, job, other))
    results = [item for _, item in (engine.operation(job).result or {})["results"]]
    assert [item["id"] for item in results] == [str(red) for red in reds]
    errors = {item["id"]: item["error"]["code"] for item in results if item.get("error")}
    assert errors == {str(BAD): "out_of_memory", str(BROKEN): "internal", "23": "content_not_found"}
    assert (engine.count("a").count, engine.count("b").count) == (4, 1)


def test_nothing_is_stored_after_a_cancel_and_others_go_on(
    engine: Engine, encoder: Means, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "BEAT_S", 0.02)
    jobs = [queued(engine, [memory(red) for red in range(20, 220)]), queued(engine, [memory(230)], "b")]
    encoder.open.clear()
    with running(engine):
        until(lambda: bool(encoder.batches))
        assert engine.cancel(jobs[0]).status == "cancelled"
        time.sleep(0.5)  # some beats, of which one finds it out
        encoder.open.set()
        until(lambda: done(engine, jobs[1]))
        assert engine.operation(jobs[0]).status == "cancelled"
        assert engine.count("a").count == 0
        assert store(engine, [memory(20)]).results[0].status == "stored"
    assert len([red for batch in encoder.batches for red in batch]) < 200, "what was cancelled is not encoded"


def test_a_job_outlives_a_database_that_was_away(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was accepted is not given up for an outage of a moment."""
    put = engine.repository.put_memories
    job = queued(engine, [memory(1)])
    away = threading.Event()

    def fails(*given: Any, **named: Any) -> Any:
        if away.is_set():
            return put(*given, **named)
        away.set()
        raise StorageUnavailable("the database does not answer")

    monkeypatch.setattr(engine.repository, "put_memories", fails)
    with running(engine):
        assert away.wait(60)
        deadline = time.monotonic() + 60
        while (status := engine.operation(job).status) != "done":
            assert status in ("queued", "running"), status
            assert time.monotonic() < deadline
            engine.repository.release_leases()  # as if they had run out
            time.sleep(0.05)
    assert engine.memory("a", "1").spaces == ["m"]


def test_what_was_encoded_once_is_remembered(engine: Engine, encoder: Means, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    decode = ingest.decode
    monkeypatch.setattr(ingest, "decode", lambda *given: (opened.append(given), decode(*given))[1])
    spaces = {"m": {"encoder": "means"}, "t": {"encoder": "means", "source": "text"}}
    engine.create_collection("c", CollectionConfig.model_validate({"spaces": spaces}))
    encoder.batches.clear()
    encoder.texts = 0
    with running(engine):
        long = "a caption too long"
        first = store(engine, [memory(20, text=long)], "c").results[0]
        again = store(engine, [memory(20, id="again", text=long)], "c").results[0]
        assert (first.status, again.status) == ("stored", "stored")
        assert first.warnings == ["cut"]
        assert "cut" in again.warnings
        assert (encoder.batches, encoder.texts, len(opened)) == ([[20]], 1, 1)
        store(engine, [memory(21, text=long)], "c")
        assert (encoder.batches, encoder.texts, len(opened)) == ([[20], [21]], 1, 2)
        cue = {"image": {"base64": png(20)}, "text": long}
        reply = engine.recall("c", RecallRequest.model_validate({"cue": cue, "limit": 1}))
        assert reply["results"][0]["matches"][0]["similarity"] == pytest.approx(1)
        assert "cut" in reply["results"][0]["warnings"]
        assert (len(encoder.batches), encoder.texts) == (2, 1)
    live = engine.resources.live("c")
    vectors = [engine.repository.get_vectors(live.id, id_) for id_ in ("20", "again")]
    assert vectors[0]["m"].tolist() == vectors[1]["m"].tolist() == [20, 7, 9]
    metrics = generate_latest(engine.resources.metrics.registry).decode()
    assert 'engram_encode_cache_total{encoder="means",outcome="hit",source="image"} 2.0' in metrics
    assert 'engram_encode_cache_total{encoder="means",outcome="miss",source="text"} 1.0' in metrics


def test_what_a_former_encoder_has_encoded_is_encoded_again(engine: Engine, encoder: Means) -> None:
    class Halves(Means):
        fingerprint = "halves/1"

        def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
            return Encoded(super().encode_images(pictures).vectors / 2)

    job = queued(engine, [memory(red) for red in range(20, 90)])
    encoder.open.clear()
    with running(engine):
        until(lambda: bool(encoder.batches))
        former, changed = engine.resources.live("a"), Halves()
        generation = update(tables.collections).where(tables.collections.c.id == former.id).values(generation=1)
        engine.repository._writer.submit(lambda connection: connection.execute(generation))
        row = next(row for row in engine.repository.list_collections() if row.id == former.id)
        spaces = make_spaces(former.config, lambda name, options: changed)
        engine.resources.replace(LiveCollection(row, former.config, spaces, "cpu"))
        encoder.open.set()
        until(lambda: done(engine, job))
    for red in range(20, 90):
        assert engine.repository.get_vectors(former.id, str(red))["m"].tolist() == [red / 2, 3.5, 4.5]
    assert engine.count("a").count == 70


def test_a_picture_that_was_decoded_to_check_it_is_taken_once_and_none_is_kept_for_good(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Picture(np.zeros((10, 10, 3), np.uint8))
    kept = handover.Handover(pixels_max=250)
    for content in "abc":
        kept.give(content, whole)
    assert kept.take("a") is whole
    assert (kept.take("a"), kept.take("c")) == (None, None), "a third found no room"
    monkeypatch.setattr(handover, "STALE_S", -1.0)
    kept.give("d", whole)
    assert (kept.take("b"), kept.take("d")) == (None, whole)
    opened: list[bytes] = []
    read = store_module.read_picture
    monkeypatch.setattr(store_module, "read_picture", lambda *g, **n: (opened.append(g[0]), read(*g, **n))[1])
    monkeypatch.setattr(handover, "STALE_S", 60.0)
    with running(engine):
        assert store(engine, [memory(20), memory(21)]).results[1].status == "stored"
        assert len(opened) == 2
        engine.resources.decoded = handover.Handover(pixels_max=0)
        assert store(engine, [memory(22)]).results[0].status == "stored"
        assert len(opened) == 4
    assert engine.count("a").count == 3


def test_another_mask_is_another_cue(engine: Engine, encoder: Means) -> None:
    masks = [np.zeros((6, 5), dtype=np.uint8) for _ in range(2)]
    masks[0][0], masks[1][1] = 255, 255
    with running(engine):
        store(engine, [memory(20)])
        asked = len(encoder.batches)
        for mask in (None, *masks, masks[0]):
            cue: dict[str, Any] = {"image": {"base64": png(20)}}
            if mask is not None:
                buffer = io.BytesIO()
                Image.fromarray(mask).save(buffer, "PNG")
                cue["mask"] = {"base64": buffer.getvalue()}
            engine.recall("a", RecallRequest.model_validate({"cue": cue}))
    assert len(encoder.batches) - asked == 2, "the whole picture was remembered, each mask is encoded once"


def test_a_cache_holds_no_more_than_it_may(encoder: Means) -> None:
    cache = EncodeCache(10_000, Metrics())
    for i in range(100):
        cache.keep(Parts(text=str(i)), ("means/1", "text"), (np.full(100, i, np.float32), ()))
        assert cache.bytes <= 10_000
        first = Parts(text="0")
        cache.look_up(first, {"t": (encoder, "text")})  # what is used stays
        assert first.known["means/1", "text"][0][0] == 0
    last, older = Parts(text="99"), Parts(text="50")
    cache.look_up(last, {"t": (encoder, "text")})
    cache.look_up(older, {"t": (encoder, "text")})
    assert (len(last.known), len(older.known)) == (1, 0)
    nothing = EncodeCache(0, Metrics())
    nothing.keep(Parts(text="x"), ("means/1", "text"), (np.ones(3, np.float32), ()))
    assert nothing.bytes == 0


CRASH = """
import os, sys, time
from pathlib import Path
from service.app.engine import Engine
from service.app.live import LiveCollection, make_spaces
from service.app.schemas import CollectionConfig, StoreRequest
from service.settings import Settings
from service.storage import tables
from tests.app.test_app_ingest import png
from workers.loop import running

with Engine(Settings(data=Path(sys.argv[1]))) as engine:
    spaces = {"image": {"encoder": "pixels", "options": {"size": 4}}}
    engine.create_collection("c", CollectionConfig.model_validate({"spaces": spaces}))
    whole, calls = engine.repository.put_memories, []

    def dying(*given, **named):
        calls.append(given)
        if len(calls) == 2:
            os.kill(os.getpid(), 9)  # encoded, and not committed
        return whole(*given, **named)

    for job in range(4):
        memories = [{"id": f"{job}-{i}", "image": {"base64": png(i, 100 + job)}} for i in range(150)]
        engine.store("c", StoreRequest(memories=memories, wait=False))
    engine.repository.put_memories = dying
    with running(engine):
        time.sleep(60)
"""


def test_a_crash_between_encoding_and_committing_loses_nothing(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], cwd=root, check=False, timeout=120)
    assert ended.returncode == -9
    with Engine(Settings(data=tmp_path)) as engine:
        before = engine.count("c").count
        assert 0 < before < 600
        with running(engine):
            until(lambda: all(o.status == "done" for o in engine.operations().operations if o.kind == "store"))
        assert engine.count("c").count == 600
        for operation in engine.operations().operations:
            if operation.kind == "store":
                results = (operation.result or {})["results"]
                assert {item["status"] for _, item in results} == {"stored"}, "an item was stored twice"
