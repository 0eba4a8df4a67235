"""Changing encoders: the former answers until the swap, nothing written meanwhile is lost, and nobody sees both."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel

from service.app import memories
from service.app.engine import Engine
from service.app.memory_schemas import DeleteRequest
from service.app.reencode_schemas import ReencodeRequest
from service.app.schemas import CollectionConfig, Operation, RecallRequest, StoreRequest, TrainRequest
from service.app.store import accept, commit
from service.encoders import registry
from service.encoders.pixels import Pixels, PixelsOptions
from service.encoders.protocol import Encoded, Source
from service.errors import (
    Conflict,
    EncoderMismatch,
    EncodersChanged,
    InvalidRequest,
    OriginalsMissing,
    UnknownEncoder,
    UnknownSpace,
    WeightsMissing,
)
from service.settings import Settings
from service.storage.folder import read_owner
from service.storage.memories import MemoryWrite
from workers.loop import running

SPACES: dict[str, Any] = {"image": {"encoder": "pixels", "options": {"size": 8}}}


def png(seed: int, size: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


class Held(Pixels):
    """`pixels` that waits before every batch until it is let go on."""

    name = "held"
    let_go = threading.Event()
    waiting = threading.Event()

    def __init__(self, options: PixelsOptions) -> None:
        super().__init__(options)
        self.fingerprint = f"held/{self.fingerprint}"

    def encode_images(self, pictures: Any) -> Encoded:
        self.waiting.set()
        assert self.let_go.wait(60)
        return super().encode_images(pictures)


class Letters:
    """A text as how often each letter is in it; `scale` only tells two of them apart."""

    name = "letters"
    dimension = 26
    takes: frozenset[Source] = frozenset({"text"})

    class Options(BaseModel):
        letters: int = 26

    def __init__(self, options: Options) -> None:
        self.dimension = options.letters
        self.fingerprint = f"letters/{options.letters}"

    def encode_images(self, pictures: Any) -> Encoded:
        raise InvalidRequest("no images")

    def encode_texts(self, texts: Any) -> Encoded:
        counts = [[text.lower().count(chr(97 + i)) for i in range(self.dimension)] for text in texts]
        return Encoded(np.array(counts, dtype=np.float32))


class Elsewhere(BaseModel):
    """Options of an encoder whose weights are not here."""


def absent(*_: object) -> Any:
    raise WeightsMissing("its weights are not here: put them into /models/x.safetensors")


@pytest.fixture(autouse=True)
def encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    Held.let_go.set()
    Held.waiting.clear()
    monkeypatch.setitem(registry._TABLE, "held", lambda: (PixelsOptions, lambda options, *_: Held(options)))
    monkeypatch.setitem(registry._TABLE, "letters", lambda: (Letters.Options, lambda options, *_: Letters(options)))
    monkeypatch.setitem(registry._TABLE, "elsewhere", lambda: (Elsewhere, absent))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(Settings(data=tmp_path / "memories")) as opened, running(opened):
        yield opened
        Held.let_go.set()


def make(engine: Engine, **config: Any) -> None:
    engine.create_collection("c", CollectionConfig.model_validate(config or {"spaces": SPACES}))


def store(engine: Engine, memories: list[dict[str, Any]], **options: Any) -> Any:
    reply = engine.store("c", StoreRequest(memories=memories, **options))
    assert all(item.error is None for item in reply.results), reply
    return reply


def pictures(*seeds: int, **more: Any) -> list[dict[str, Any]]:
    return [{"id": str(seed), "image": {"base64": png(seed)}, **more} for seed in seeds]


def first(engine: Engine, cue: dict[str, Any], **options: Any) -> dict[str, Any]:
    options = {"limit": 1, "gate": False, **options}
    reply = engine.recall("c", RecallRequest.model_validate({"cue": cue, **options}))
    (match,) = reply["results"][0]["matches"]
    return dict(match)


def image(seed: int) -> dict[str, Any]:
    return {"image": {"base64": png(seed)}}


def reencode(engine: Engine, space: str = "image", **request: Any) -> Operation:
    return engine.reencode("c", space, ReencodeRequest.model_validate(request))


def ended(engine: Engine, operation: Operation, status: str = "done") -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (now := engine.operation(operation.id)).status in ("queued", "running"):
        assert time.monotonic() < deadline, now
        time.sleep(0.01)
    assert now.status == status, now
    return now.result if now.result is not None else now.error.model_dump() if now.error else {}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def calibrated(engine: Engine) -> dict[str, Any]:
    until(lambda: engine.collection("c").calibration.state == "current")
    return {record.modality: record for record in engine.collection("c").calibration.modalities}


def drafts(engine: Engine) -> int:
    with engine.repository._database.read() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM pattern_drafts").scalar_one())


def set_fingerprint(data: Path, space: str, fingerprint: str) -> None:
    """As if the library under the collection's encoder had changed while the server was down."""
    import sqlite3

    import orjson

    with sqlite3.connect(data / "engram.db") as connection:
        ((config,),) = connection.execute("SELECT config FROM collections")
        changed = orjson.loads(config)
        changed["fingerprints"][space] = fingerprint
        connection.execute("UPDATE collections SET config = ?", (orjson.dumps(changed),))
    connection.close()


# --- from one encoder to another --------------------------------------------------------------------------------------


def test_a_space_is_encoded_again_and_stays_so(tmp_path: Path) -> None:
    with Engine(Settings(data=tmp_path)) as engine, running(engine):
        make(engine)
        store(engine, pictures(*range(30)))
        assert calibrated(engine)["image"].refused is None
        before = engine.collection("c")
        operation = reencode(engine, encoder="pixels", options={"size": 16})
        assert (operation.kind, operation.collection) == ("reencode", "c")
        result = ended(engine, operation)
        after = engine.collection("c")
        assert (after.version, after.count) == (before.version + 1, 30)
        assert after.spaces["image"].dimension == 16 * 16 * 3
        assert result["former"] == before.spaces["image"].fingerprint
        assert result["fingerprint"] == after.spaces["image"].fingerprint
        assert (result["memories"], result["dropped"]["count"], result["deleted"]) == (30, 0, 0)
        assert (result["version"], result["dimension"]) == (after.version, 768)
        for seed in range(30):
            match = first(engine, image(seed))
            assert (match["id"], match["similarity"]) == (str(seed), pytest.approx(1, abs=1e-5))
        drawn = engine.recall("c", RecallRequest.model_validate({"cue": image(3), "reconstruct": True, "gate": False}))
        drawing = drawn["results"][0]["reconstruction"]
        assert drawing is not None
        assert Image.open(io.BytesIO(base64.b64decode(drawing["base64"]))).size == (16, 16)
        assert calibrated(engine)["image"].version == after.version
        assert drafts(engine) == 0
    with Engine(Settings(data=tmp_path)) as engine, running(engine):
        assert engine.collection("c").spaces == after.spaces
        assert engine.collection("c").calibration.state == "current"
        assert first(engine, image(7))["id"] == "7"
        store(engine, pictures(99))
        assert first(engine, image(99))["id"] == "99"


def test_until_it_is_calibrated_again_the_verdict_says_so(tmp_path: Path) -> None:
    with Engine(Settings(data=tmp_path)) as engine:
        make(engine)
        with running(engine):
            store(engine, pictures(*range(30)))
            calibrated(engine)
        reencode(engine, options={"size": 4})
        job = engine.repository.claim(["reencode"], "this test")
        assert job is not None
        engine.handlers()["reencode"](job, lambda progress: None)
        result = engine.recall("c", RecallRequest.model_validate({"cue": image(1)}))["results"][0]
        assert result["verdict"] == "uncalibrated"
        assert any("calibration is under way" in warning for warning in result["warnings"])
    with Engine(Settings(data=tmp_path)) as engine:
        assert engine.collection("c").calibration.state == "pending"
        with running(engine):
            assert calibrated(engine)["image"].refused is None


def test_what_was_calibrated_without_the_space_stays(engine: Engine) -> None:
    make(engine, spaces=SPACES | {"v": {"dimension": 8}})
    rows = np.random.default_rng(1).standard_normal((40, 8)).astype(np.float32)
    store(engine, [memory | {"vectors": {"v": rows[i]}} for i, memory in enumerate(pictures(*range(40)))])
    calibrated(engine)
    engine.train("c", TrainRequest.model_validate({"what": "gate", "negatives": [{"vectors": {"v": -rows[0]}}] * 4}))
    until(lambda: calibrated(engine)["v"].negatives is not None)
    with engine.resources.learning(engine.resources.live("c").id) as live:  # nothing is calibrated meanwhile
        operation = reencode(engine, options={"size": 4})
        assert live.generation == 0
    ended(engine, operation)
    assert calibrated(engine)["v"].negatives is not None, "what was supplied for another space is kept"
    assert {"image", "v"} <= set(calibrated(engine))


def test_a_kernel_of_the_space_goes_and_one_of_another_stays(engine: Engine) -> None:
    make(engine, spaces={name: {"encoder": "pixels", "options": {"size": 4}} for name in ("a", "b")})
    store(engine, pictures(*range(40)))
    live = engine.resources.live("c")
    weight = np.eye(48, dtype=np.float32)
    for space in ("a", "b"):
        engine.repository.put_kernel(live.id, space, "cues", weight, _kernel_record(space), True)
    data = engine.resources.settings.data
    engine.close()
    with Engine(Settings(data=data)) as again, running(again):
        assert [kernel.id for kernel in again.collection("c").kernels] == ["a-1", "b-1"]
        result = ended(again, reencode(again, "a", options={"size": 8}))
        assert result["kernels_dropped"] == ["a-1"]
        assert [kernel.id for kernel in again.collection("c").kernels] == ["b-1"]
        assert {k.id: k.status for k in again.kernels("c").kernels} == {"a-1": "dropped", "b-1": "active"}
        assert first(again, image(5), kernel="b-1")["id"] == "5"
    with Engine(Settings(data=data)) as again:
        assert [kernel.id for kernel in again.collection("c").kernels] == ["b-1"]


def _kernel_record(space: str) -> dict[str, Any]:
    return {
        "space": space, "objective": "cues", "start": "whitening", "memories": 1, "cues": 1, "corruptions": [],
        "steps": 1, "best_step": 1, "stopped": "steps", "seconds": 1.0, "curve": [], "trial": [], "kept": True,
        "why": "a test",
    }  # fmt: skip


def test_texts_are_encoded_again(engine: Engine) -> None:
    spaces = {"text": {"encoder": "letters", "source": "text"}, **SPACES}
    make(engine, spaces=spaces)
    words = ["apple", "banana", "cherry", "date"]
    store(engine, [{"id": word, "text": word} for word in words] + pictures(1, 2))
    result = ended(engine, reencode(engine, "text", options={"letters": 20}))
    assert (result["memories"], engine.collection("c").spaces["text"].dimension) == (4, 20)
    assert [first(engine, {"text": word})["id"] for word in words] == words
    assert first(engine, image(2))["id"] == "2"


# --- while it runs ----------------------------------------------------------------------------------------------------


def test_the_former_answers_and_takes_writes_until_the_swap(engine: Engine) -> None:
    make(engine)
    store(engine, pictures(*range(100)))
    former = engine.collection("c").spaces["image"]
    Held.let_go.clear()
    operation = reencode(engine, encoder="held", options={"size": 4})
    assert Held.waiting.wait(60)
    assert first(engine, image(3))["id"] == "3"
    store(engine, pictures(100, 101))  # new
    store(engine, [{"id": "5", "image": {"base64": png(500)}}])  # another picture under an id that is there
    store(engine, [{"id": "99", "image": {"base64": png(990)}}])  # the same, far behind
    engine.delete_memories("c", ["6", "98", "101"])
    store(engine, pictures(98))  # deleted, and stored again
    assert engine.collection("c").spaces["image"] == former
    assert first(engine, image(100))["id"] == "100"
    assert engine.operation(operation.id).status == "running"
    Held.let_go.set()
    result = ended(engine, operation)
    assert engine.collection("c").spaces["image"].dimension == 48
    assert (result["memories"], engine.count("c").count) == (100, 100)
    for seed, name in [(3, "3"), (100, "100"), (500, "5"), (990, "99"), (98, "98")]:
        match = first(engine, image(seed))
        assert (match["id"], match["similarity"]) == (name, pytest.approx(1, abs=1e-5))
    for gone in (5, 6, 99, 101):
        assert first(engine, image(gone))["similarity"] < 0.999
    live = engine.resources.live("c")
    assert len(engine.repository.get_vectors(live.id, "5")["image"]) == 48


def test_a_store_that_loses_the_race_is_encoded_again(engine: Engine) -> None:
    """Its vectors are of the former encoder when the swap comes first."""
    make(engine, spaces={"image": {"encoder": "held", "options": {"size": 4}}})
    store(engine, pictures(*range(5)))
    Held.let_go.clear()
    Held.waiting.clear()
    reply = engine.store("c", StoreRequest(memories=pictures(7), wait=False))
    assert Held.waiting.wait(60)
    ended(engine, reencode(engine, encoder="pixels", options={"size": 8}))
    assert engine.count("c").count == 5
    Held.let_go.set()
    until(lambda: engine.operation(reply.operation_id).status == "done")
    assert engine.count("c").count == 6
    assert first(engine, image(7))["id"] == "7"
    live = engine.resources.live("c")
    assert len(engine.repository.get_vectors(live.id, "7")["image"]) == 192


def test_who_still_holds_the_former_collection_writes_to_the_one_there_is(engine: Engine) -> None:
    make(engine, spaces=SPACES | {"v": {"dimension": 2}})
    store(engine, pictures(*range(6), vectors={"v": [1, 2]}))
    former = engine.resources.live("c")
    ended(engine, reencode(engine, options={"size": 4}))
    by_filter = DeleteRequest.model_validate({"filter": {"must": [{"key": "none", "exists": False}]}, "dry_run": True})
    assert memories.delete(engine.resources, former, by_filter).count == 6
    assert memories.delete_ids(engine.resources, former, ["3"]).deleted == ["3"]
    accepted = accept(engine.resources, former, StoreRequest(memories=[{"id": "v", "vectors": {"v": [2, 1]}}]))
    assert [item.status for item in accepted.results] == ["stored"]
    view = engine.resources.live("c").bank.view()
    assert (view.count, view.version) == (6, engine.repository.get_collection("c").version)
    assert view.rows_of(["3"]).tolist() == [-1]
    assert former.bank.view().count == 6, "a recall that holds it sees what it saw"
    with pytest.raises(EncodersChanged):
        commit(engine.resources, former, [MemoryWrite("late", vectors={"image": np.ones(192, dtype=np.float32)})])


def test_nobody_sees_both_encoders(engine: Engine) -> None:
    """Recalls, stores and deletes without a pause while the space changes back and forth."""
    make(engine)
    store(engine, pictures(*range(40)))
    stop = threading.Event()
    recalled = [0]

    def recalls() -> None:
        while not stop.is_set():
            for seed in range(0, 40, 7):
                match = first(engine, image(seed))
                assert (match["id"], match["similarity"]) == (str(seed), pytest.approx(1, abs=1e-4))
                recalled[0] += 1

    def writes() -> None:
        seed = 1_000
        while not stop.is_set():
            store(engine, pictures(seed, seed + 1))
            assert engine.delete_memories("c", [str(seed)]).deleted == [str(seed)]
            seed += 2

    with ThreadPoolExecutor(3) as pool:
        running_ = [pool.submit(recalls), pool.submit(recalls), pool.submit(writes)]
        try:
            for size in (4, 16, 8):
                ended(engine, reencode(engine, options={"size": size}))
        finally:
            stop.set()
        for each in running_:
            each.result()
    assert recalled[0] > 0
    live = engine.resources.live("c")
    view = live.bank.view()
    assert engine.count("c").count == engine.repository.count(live.id) == view.count
    with engine.repository.iter_patterns(live.id, [("image", 192)]) as stream:  # one of another size is refused
        kept = {id_: row for chunk in stream.chunks for id_, row in zip(chunk.ids, chunk.vectors["image"], strict=True)}
        assert stream.version == view.version
    assert all(row.any() for row in kept.values())
    assert (view.rows_of(list(kept)) >= 0).all()


def test_cancelled_it_leaves_everything_as_it_was(engine: Engine) -> None:
    make(engine)
    store(engine, pictures(*range(100)))
    before = calibrated(engine), engine.collection("c")
    Held.let_go.clear()
    operation = reencode(engine, encoder="held", options={"size": 4})
    assert Held.waiting.wait(60)
    with pytest.raises(Conflict, match="already; cancel it or wait"):
        reencode(engine, options={"size": 16})
    assert engine.cancel(operation.id).status == "cancelled"
    Held.let_go.set()
    until(lambda: engine.resources.live("c").changed is None)
    assert (calibrated(engine), engine.collection("c")) == before
    assert first(engine, image(4))["id"] == "4"
    until(lambda: drafts(engine) == 0)
    ended(engine, reencode(engine, options={"size": 4}))  # and another one is not held up


def test_a_server_that_stops_takes_it_up_again(tmp_path: Path) -> None:
    with Engine(Settings(data=tmp_path)) as engine, running(engine):
        make(engine)
        store(engine, pictures(*range(130)))
        Held.let_go.clear()
        operation = reencode(engine, encoder="held", options={"size": 4})
        assert Held.waiting.wait(60)
        threading.Timer(0.3, Held.let_go.set).start()  # the workers are told to stop before
    with Engine(Settings(data=tmp_path)) as engine:
        assert 0 < drafts(engine) < 130
        assert engine.operation(operation.id).status == "running"
        assert first(engine, image(9))["id"] == "9"
        with running(engine):
            assert ended(engine, operation)["memories"] == 130
            assert first(engine, image(9))["id"] == "9"


SERVE = """
import sys, time
from service.app.store import accept, commit
from service.encoders import registry
from service.encoders.pixels import Pixels, PixelsOptions

class Slow(Pixels):
    def __init__(self, options):
        super().__init__(options)
        self.fingerprint = f"slow/{self.fingerprint}"
    def encode_images(self, pictures):
        time.sleep(0.2)
        return super().encode_images(pictures)

registry._TABLE["slow"] = lambda: (PixelsOptions, lambda options, *_: Slow(options))
from engram.cli import main
main(["serve", "--data", sys.argv[1], "--port", "0"])
"""


def serve(data: Path) -> tuple[subprocess.Popen[bytes], httpx.Client]:
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(data)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (owner := read_owner(data)) is None or owner.url is None or owner.pid != process.pid:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, httpx.Client(base_url=owner.url, timeout=60)


def test_killed_in_the_middle_it_goes_on_from_there(tmp_path: Path) -> None:
    count = 640
    process, http = serve(tmp_path)
    try:
        http.put("/v1/collections/c", json={"spaces": SPACES}).raise_for_status()
        for start in range(0, count, 320):
            memories = [
                {"id": str(i), "image": {"base64": base64.b64encode(png(i, 8)).decode()}}
                for i in range(start, start + 320)
            ]
            http.post("/v1/collections/c/store", json={"memories": memories}).raise_for_status()
        asked = {"encoder": "slow", "options": {"size": 4}}
        reply = http.post("/v1/collections/c/spaces/image/reencode", json=asked)
        assert reply.status_code == 202
        address = f"/v1/operations/{reply.json()['id']}"
        while http.get(address).json()["progress"] < 0.2:
            time.sleep(0.02)
        assert http.get(address).json()["status"] == "running"
    finally:
        process.kill()
        process.wait()
        http.close()
    with Engine(Settings(data=tmp_path)) as engine:  # no workers: as it was left
        left = drafts(engine)
        assert 64 <= left < count
        assert engine.collection("c").spaces["image"].dimension == 192
        assert first(engine, {"image": {"base64": png(11, 8)}})["id"] == "11"
    process, http = serve(tmp_path)
    try:
        while (operation := http.get(address).json())["status"] in ("queued", "running"):
            time.sleep(0.02)
        assert operation["status"] == "done", operation
        assert operation["result"]["memories"] == count
        space = http.get("/v1/collections/c").json()["spaces"]["image"]
        assert (space["encoder"], space["dimension"]) == ("slow", 48)
        cue = {"cue": {"image": {"base64": base64.b64encode(png(11, 8)).decode()}}}
        answer = http.post("/v1/collections/c/recall", json=cue).json()["results"][0]
        assert answer["matches"][0]["id"] == "11"
    finally:
        process.kill()
        process.wait()
        http.close()


# --- memories that nothing is kept of ---------------------------------------------------------------------------------


def blob_of(engine: Engine, memory_id: str) -> Path:
    found = engine.repository.get_memory(engine.resources.live("c").id, memory_id)
    assert found.blob_hash is not None
    return engine.blobs._path(found.blob_hash)


@pytest.fixture
def damaged(engine: Engine) -> Engine:
    """Of 1 the original is gone, of 2 and 3 it is damaged; 1 and 2 have vectors as well."""
    make(engine, spaces=SPACES | {"v": {"dimension": 2}})
    store(engine, [*pictures(1, 2, vectors={"v": [1, 2]}), *pictures(*range(3, 12))])
    blob_of(engine, "1").unlink()
    blob_of(engine, "2").write_bytes(png(77))
    blob_of(engine, "3").write_bytes(b"nothing like an image")
    return engine


def test_missing_originals_are_named_and_nothing_is_begun(damaged: Engine) -> None:
    with pytest.raises(
        OriginalsMissing, match=r"1 memories .* \(1: the file of its original is gone\).*lose the space"
    ):
        reencode(damaged, options={"size": 4})
    assert damaged.operations().operations[0].kind != "reencode"


def test_damaged_originals_end_it_and_change_nothing(damaged: Engine) -> None:
    damaged.delete_memories("c", ["1"])
    before = damaged.collection("c").spaces
    problem = ended(damaged, reencode(damaged, options={"size": 4}), "failed")
    assert problem["code"] == "originals_missing"
    assert "2 memories" in problem["detail"]
    assert "2: its original is damaged" in problem["detail"]
    assert damaged.collection("c").spaces == before
    assert first(damaged, image(3))["id"] == "3", "the patterns are still there"
    assert drafts(damaged) == 0


def test_told_to_it_drops_what_it_cannot_encode(damaged: Engine) -> None:
    result = ended(damaged, reencode(damaged, options={"size": 4}, drop_without_original=True))
    assert set(result["dropped"]["first"]) == {"1", "2", "3"}
    assert (result["dropped"]["count"], result["deleted"], result["memories"]) == (3, 1, 8)
    assert damaged.count("c").count == 10, "3 had no other space"
    assert damaged.memory("c", "1").spaces == ["v"]
    assert first(damaged, {"vectors": {"v": [1, 2]}})["id"] in ("1", "2")
    again = ended(damaged, reencode(damaged, options={"size": 8}))
    assert again["dropped"]["count"] == 0, "what lost the space already has nothing to lose"


# --- an encoder that is not what it was -------------------------------------------------------------------------------


def test_a_changed_encoder_says_what_to_do_and_can_be_mended(tmp_path: Path) -> None:
    spaces = {**SPACES, "text": {"encoder": "letters", "source": "text"}}
    with Engine(Settings(data=tmp_path)) as engine:  # no workers: what is stored stays queued
        make(engine, spaces=spaces)
        with running(engine):
            store(engine, [memory | {"text": f"number {memory['id']}"} for memory in pictures(*range(12))])
        queued = engine.store("c", StoreRequest(memories=pictures(50), wait=False))
    set_fingerprint(tmp_path, "image", "pixels/0:of another library")
    with Engine(Settings(data=tmp_path)) as engine, running(engine):
        info = engine.collection("c")
        assert info.count == 12
        problem = info.spaces["image"].problem
        assert problem is not None
        assert problem.code == "encoder_mismatch"
        assert "engram reencode c image" in problem.detail
        assert "POST /v1/collections/c/spaces/image/reencode" in problem.detail
        assert (info.spaces["image"].dimension, info.spaces["text"].problem) == (192, None)
        assert [c.name for c in engine.collections().collections] == ["c"]
        for needs_it in (
            lambda: first(engine, image(1)),
            lambda: first(engine, {"text": "number"}),
            lambda: first(engine, image(1), spaces={"image": 1}),
            lambda: store(engine, pictures(20)),
            lambda: engine.train("c", TrainRequest.model_validate({"what": "gate"})),
        ):
            with pytest.raises(EncoderMismatch, match="engram reencode c image"):
                needs_it()
        # The rest works.
        assert first(engine, {"text": "number 7"}, spaces={"text": 1})["id"] in map(str, range(12))
        store(engine, [{"id": "words", "text": "words alone"}])
        assert engine.delete_memories("c", ["3"]).deleted == ["3"]
        assert engine.content("c", "4")[0] == png(4)
        assert engine.memory("c", "4").spaces == ["image", "text"]
        # What was accepted before waits for an encoder.
        until(lambda: engine.operation(queued.operation_id).status == "failed")
        error = engine.operation(queued.operation_id).error
        assert error is not None
        assert error.code == "encoder_mismatch"
        result = ended(engine, reencode(engine))
        assert (result["former"], result["memories"]) == ("pixels/0:of another library", 11)
        assert engine.collection("c").spaces["image"].problem is None
        until(lambda: engine.operation(queued.operation_id).status == "done")
        assert first(engine, image(50))["id"] == "50"
        assert first(engine, image(1))["id"] == "1"
        assert calibrated(engine)["image"].refused is None


def test_an_encoder_that_is_gone_can_be_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(Settings(data=tmp_path)) as engine, running(engine):
        make(engine, spaces={"image": {"encoder": "held", "options": {"size": 4}}})
        store(engine, pictures(*range(5)))
    monkeypatch.setitem(registry._TABLE, "held", lambda: (PixelsOptions, absent))
    monkeypatch.setattr(registry, "_slots", type(registry._slots)())  # a new process has none ready
    with Engine(Settings(data=tmp_path)) as engine, running(engine):
        assert engine.collection("c").spaces["image"].dimension == 48
        with pytest.raises(WeightsMissing, match=r"/models/x\.safetensors.*engram reencode c image --encoder NAME"):
            first(engine, image(1))
        with pytest.raises(WeightsMissing):
            reencode(engine)
        ended(engine, reencode(engine, encoder="pixels"))
        assert first(engine, image(1))["id"] == "1"
    monkeypatch.delitem(registry._TABLE, "held")
    with Engine(Settings(data=tmp_path)) as engine:
        assert engine.collection("c").spaces["image"].encoder == "pixels"


def test_both_spaces_of_a_changed_encoder_are_mended_one_by_one(tmp_path: Path) -> None:
    spaces = {name: {"encoder": "pixels", "options": {"size": 4}} for name in ("a", "b")}
    with Engine(Settings(data=tmp_path)) as engine, running(engine):
        make(engine, spaces=spaces)
        store(engine, pictures(*range(5)))
    set_fingerprint(tmp_path, "a", "former")
    set_fingerprint(tmp_path, "b", "former")
    with Engine(Settings(data=tmp_path)) as engine, running(engine):
        ended(engine, reencode(engine, "a"))
        assert [space.problem is None for space in engine.collection("c").spaces.values()] == [True, False]
        with pytest.raises(EncoderMismatch, match="engram reencode c b"):
            first(engine, image(1))
        assert first(engine, image(1), spaces={"a": 1})["id"] == "1"
        ended(engine, reencode(engine, "b"))
        assert first(engine, image(1))["id"] == "1"


@pytest.mark.parametrize(
    ("space", "request_", "error", "words"),
    [
        ("sound", {}, UnknownSpace, "no space sound; it has image, v"),
        ("v", {}, InvalidRequest, "the callers' own vectors"),
        ("image", {}, InvalidRequest, "already"),
        ("image", {"encoder": "pixels"}, InvalidRequest, "already"),
        ("image", {"encoder": "pixls"}, UnknownEncoder, "no encoder 'pixls'"),
        ("image", {"options": {"sise": 3}}, InvalidRequest, "sise"),
        ("image", {"encoder": "letters"}, InvalidRequest, "does not read images"),
        ("image", {"encoder": "elsewhere"}, WeightsMissing, "put them into"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    engine: Engine, space: str, request_: dict[str, Any], error: type[Exception], words: str
) -> None:
    make(engine, spaces=SPACES | {"v": {"dimension": 2}})
    with pytest.raises(error, match=words):
        reencode(engine, space, **request_)


def test_an_empty_collection_changes_its_encoder_too(engine: Engine) -> None:
    make(engine)
    assert ended(engine, reencode(engine, options={"size": 4}))["memories"] == 0
    store(engine, pictures(1))
    assert first(engine, image(1))["id"] == "1"


def test_it_ends_with_its_collection(engine: Engine) -> None:
    make(engine)
    store(engine, pictures(*range(80)))
    Held.let_go.clear()
    reencode(engine, encoder="held")
    assert Held.waiting.wait(60)
    engine.delete_collection("c")
    Held.let_go.set()
    make(engine)
    until(lambda: drafts(engine) == 0)
    store(engine, pictures(1))
    assert engine.count("c").count == 1
