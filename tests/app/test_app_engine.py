"""The engine in process, where its parts meet: what a request over HTTP cannot stage."""

from __future__ import annotations

import gc
import io
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.app.engine import Engine
from service.app.schemas import CollectionConfig, RecallRequest, StoreRequest, TrainRequest
from service.errors import (
    CollectionNotFound,
    EngramError,
    InvalidRequest,
    InvalidVector,
    NothingObserved,
    StorageFull,
)
from service.settings import Settings
from workers.loop import running

D = 32
RNG = np.random.default_rng(0)  # the seed a user would take
ROWS = RNG.standard_normal((120, D)).astype(np.float32)
VECTORS: dict[str, Any] = {"spaces": {"v": {"dimension": D}}}


def png(seed: int, size: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def settings(tmp_path: Path, new_database: Callable[[Path], Path | str]) -> Settings:
    """Of an engine on either database."""
    where = new_database(tmp_path / "memories")
    return Settings(data=tmp_path / "memories", database_url=where if isinstance(where, str) else None)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    with Engine(settings) as opened, running(opened):
        yield opened


def make(engine: Engine, name: str = "c", **config: Any) -> None:
    engine.create_collection(name, CollectionConfig.model_validate(config or VECTORS))


def store(engine: Engine, memories: list[dict[str, Any]], name: str = "c", **options: Any) -> Any:
    return engine.store(name, StoreRequest(memories=memories, **options))


def rows(vectors: np.ndarray[Any, Any], prefix: str = "m") -> list[dict[str, Any]]:
    return [{"id": f"{prefix}{i}", "vectors": {"v": row}} for i, row in enumerate(vectors)]


def ask(engine: Engine, cue: dict[str, Any], name: str = "c", **options: Any) -> dict[str, Any]:
    reply = engine.recall(name, RecallRequest.model_validate({"cue": cue, **options}))
    return dict(reply["results"][0])


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def calibrated(engine: Engine, name: str = "c") -> dict[str, Any]:
    until(lambda: engine.collection(name).calibration.state == "current")
    return {record.modality: record for record in engine.collection(name).calibration.modalities}


def test_a_caller_that_dies_after_the_commit_leaves_the_bank_in_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(engine)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine.resources, "after_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store(engine, rows(ROWS[:3]))
    assert engine.count("c").count == 3
    store(engine, rows(ROWS[3:5], "n"))
    assert (engine.count("c").count, engine.count("c").version) == (5, 2)


def test_writes_of_many_threads_arrive_in_the_order_of_their_versions(engine: Engine) -> None:
    from concurrent.futures import ThreadPoolExecutor

    make(engine)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store(engine, [{"id": "same", "vectors": {"v": ROWS[i]}}]), range(100)))
    version = engine.collection("c").version
    assert version == 100
    stored = engine.repository.get_vectors(engine.resources.live("c").id, "same")["v"]
    assert ask(engine, {"vectors": {"v": stored}}, limit=1)["matches"][0]["similarity"] == pytest.approx(1.0, abs=1e-5)


def test_data_made_with_a_common_seed_is_calibrated_like_any_other(engine: Engine) -> None:
    make(engine, spaces={"v": {"dimension": 256}}, corruptions=[{"kind": "vector_noise", "sigma": 1.0}])
    data = np.random.default_rng(0).standard_normal((400, 256)).astype(np.float32)
    store(engine, rows(data))
    assert calibrated(engine)["v"].first_share > 0.9


@pytest.mark.parametrize("gate", [{"interaction": "bank"}, {"interaction": {"prototypes": 8}}])
def test_other_vectors_under_the_same_ids_make_a_calibration_stale(engine: Engine, gate: dict[str, Any]) -> None:
    make(engine, **VECTORS, gate=gate)
    store(engine, rows(ROWS))
    before = calibrated(engine)["v"].version
    store(engine, rows(-ROWS[::-1]))
    until(lambda: calibrated(engine)["v"].version > before)
    assert ask(engine, {"vectors": {"v": -ROWS[5]}})["verdict"] == "known"


@pytest.mark.parametrize("separation", ["softmax", "sparsemax", "max", {"entmax": 1.5}, {"entmax": 1.1}, {"entmax": 4}])
def test_an_exact_cue_is_known_by_every_separation(engine: Engine, separation: Any) -> None:
    make(engine)
    store(engine, rows(ROWS))
    calibrated(engine)
    for support in (1, 64, "dense"):
        result = ask(engine, {"vectors": {"v": ROWS[7]}}, separation=separation, support=support, limit=1)
        assert (result["verdict"], result["matches"][0]["id"]) == ("known", "m7"), support


def test_a_twin_outside_the_support_makes_a_cue_ambiguous(engine: Engine) -> None:
    make(engine)
    store(engine, [*rows(ROWS), {"id": "twin", "vectors": {"v": ROWS[7]}}])
    calibrated(engine)
    for support in (1, 64):
        assert ask(engine, {"vectors": {"v": ROWS[7]}}, support=support, limit=1)["verdict"] == "ambiguous"


def test_a_cue_in_spaces_that_no_memory_fills_finds_nothing(engine: Engine) -> None:
    make(engine, spaces={"a": {"dimension": 3}, "b": {"dimension": 3}})
    store(engine, [{"id": str(i), "vectors": {"a": ROWS[i, :3]}} for i in range(4)])
    for support in (64, "dense"):
        result = ask(engine, {"vectors": {"b": ROWS[0, :3]}}, support=support)
        assert (result["matches"], result["verdict"]) == ([], "uncalibrated")
        assert result["recall"]["outcome"] == "no_rows"
        assert result["recall"]["energy"] == []
        assert result["recall"]["margin"] is None


def test_dense_and_top_k_have_the_same_candidates(engine: Engine) -> None:
    make(engine, spaces={"a": {"dimension": 3}, "b": {"dimension": 3}})
    store(engine, [{"id": f"a{i}", "vectors": {"a": ROWS[i, :3]}} for i in range(5)])
    store(engine, [{"id": f"b{i}", "vectors": {"b": ROWS[i, :3]}} for i in range(5)])
    cue = {"vectors": {"b": ROWS[2, :3]}}
    listed = [{match["id"] for match in ask(engine, cue, support=s, limit=10)["matches"]} for s in (64, "dense")]
    assert listed[0] == listed[1] == {f"b{i}" for i in range(5)}


def test_each_space_of_vectors_is_calibrated_alone_and_together(engine: Engine) -> None:
    make(engine, spaces={"a": {"dimension": D}, "b": {"dimension": D}})
    memories = [{"id": str(i), "vectors": {"a": ROWS[i], "b": ROWS[-i]}} for i in range(1, 60)]
    store(engine, memories)
    assert set(calibrated(engine)) == {"a", "b", "a+b"}
    assert ask(engine, {"vectors": {"b": ROWS[-5]}})["verdict"] == "known"


def test_a_corruption_that_leaves_nothing_does_not_stop_the_others(engine: Engine) -> None:
    corruptions = [{"kind": "missing_side", "share": 0.99}, {"kind": "noise", "sigma": 0.05}]
    make(engine, spaces={"image": {"encoder": "pixels", "options": {"size": 4}}}, corruptions=corruptions)
    store(engine, [{"id": str(i), "image": {"base64": png(i)}} for i in range(30)])
    assert calibrated(engine)["image"].refused is None


def test_one_bad_cue_of_a_batch_is_its_own_error(engine: Engine) -> None:
    make(engine, spaces={"image": {"encoder": "pixels", "options": {"size": 4}}})
    store(engine, [{"id": str(i), "image": {"base64": png(i)}} for i in range(3)])
    mask = np.full((24, 24), 255, dtype=np.uint8)
    mask[0, 0] = 0  # one pixel of 576 is seen: no cell of the latent is half seen
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    cues = [{"image": {"base64": png(1)}}, {"image": {"base64": png(2)}, "mask": {"base64": buffer.getvalue()}}]
    reply = engine.recall("c", RecallRequest.model_validate({"cues": cues}))
    assert reply["results"][0]["matches"][0]["id"] == "1"
    assert (reply["results"][1]["error"] or {})["code"] == "nothing_observed"
    with pytest.raises(NothingObserved):
        engine.recall("c", RecallRequest.model_validate({"cue": cues[1]}))


def test_nothing_is_drawn_of_a_memory_without_a_picture(engine: Engine) -> None:
    make(engine, spaces={"image": {"encoder": "pixels"}, "v": {"dimension": D}})
    store(engine, [{"id": "bare", "vectors": {"v": ROWS[0]}}, {"id": "other", "vectors": {"v": ROWS[1]}}])
    result = ask(engine, {"vectors": {"v": ROWS[0]}}, reconstruct=True, trace=True)
    assert result["matches"][0]["id"] == "bare"
    assert result["reconstruction"] is None
    assert set(result["trace"]) == {None}


@pytest.mark.parametrize("similarity", ["cosine", "dot", "neg_l2"])
def test_a_zero_vector_is_refused(engine: Engine, similarity: str) -> None:
    make(engine, spaces={"v": {"dimension": D, "similarity": similarity}})
    (item,) = store(engine, [{"vectors": {"v": np.zeros(D)}}]).results
    assert item.error is not None
    assert item.error.code == "invalid_vector"
    with pytest.raises(InvalidVector):
        ask(engine, {"vectors": {"v": np.zeros(D)}})


def test_large_raw_values_are_recalled(engine: Engine) -> None:
    make(engine, spaces={"v": {"dimension": D, "similarity": "dot"}})
    store(engine, rows(1e8 * ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)))
    assert ask(engine, {"vectors": {"v": ROWS[3]}})["matches"][0]["id"] == "m3"


def test_an_answer_too_large_to_hold_is_refused(engine: Engine) -> None:
    make(engine)
    cues = [{"vectors": {"v": ROWS[0]}}] * 1000
    with pytest.raises(InvalidRequest, match="at most"):
        engine.recall("c", RecallRequest.model_validate({"cues": cues, "limit": 1000}))


def test_a_delete_that_fails_leaves_the_collection(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    make(engine)
    store(engine, rows(ROWS[:3]))

    def full(name: str) -> None:
        raise StorageFull("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(engine.repository, "delete_collection", full)
        with pytest.raises(StorageFull):
            engine.delete_collection("c")
    assert engine.collection("c").count == 3
    engine.delete_collection("c")
    with pytest.raises(CollectionNotFound):
        engine.collection("c")


def test_deleting_a_collection_tells_those_who_wait_for_its_jobs(settings: Settings) -> None:
    with Engine(settings) as engine:  # no workers: the job stays queued
        make(engine, spaces={"image": {"encoder": "pixels"}})
        accepted = engine.accept("c", StoreRequest(memories=[{"image": {"base64": png(1)}}]))
        assert accepted.done is not None
        assert not accepted.done.done()
        engine.delete_collection("c")
        assert accepted.done.done()


def test_a_cancelled_calibration_is_asked_for_again(settings: Settings) -> None:
    with Engine(settings) as engine:
        make(engine)
        store(engine, rows(ROWS[:60]))
        (job,) = engine.operations().operations
        engine.cancel(job.id)
        store(engine, rows(ROWS[60:], "n"))
        assert [o.status for o in engine.operations().operations] == ["queued", "cancelled"]
        with running(engine):
            calibrated(engine)


def test_what_a_job_stored_before_it_failed_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    make(engine, spaces={"image": {"encoder": "pixels", "options": {"size": 4}}})
    whole, calls = engine.repository.put_memories, 0

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # the first queues the job
            raise StorageFull("no space left")
        return whole(*arguments, **named)

    monkeypatch.setattr(engine.repository, "put_memories", failing)
    reply = store(engine, [{"id": str(i), "image": {"base64": png(i, 8)}} for i in range(600)])
    statuses = [item.status for item in reply.results]
    stored = statuses.count("stored")
    assert 0 < stored < 600
    assert statuses == ["stored"] * stored + ["error"] * (600 - stored)
    assert {item.error.code for item in reply.results if item.error} == {"storage_full"}
    assert reply.operation_id is None
    assert engine.count("c").count == stored


def test_a_collection_that_cannot_be_loaded_does_not_hold_up_the_others(settings: Settings) -> None:
    with Engine(settings) as engine:
        make(engine, "sound")
        make(engine, "changed", spaces={"image": {"encoder": "pixels"}})
        row = next(r for r in engine.repository.list_collections() if r.name == "changed")
        engine.repository.delete_collection("changed")
        config = {**row.config["config"], "recall": {"separation": "of a later version"}}
        engine.repository.create_collection("changed", {**row.config, "config": config})
    with Engine(settings) as engine:
        assert engine.collection("sound").count == 0
        with pytest.raises(InvalidRequest, match="none that this version knows"):
            engine.collection("changed")
        engine.delete_collection("changed")
        with pytest.raises(CollectionNotFound):
            engine.collection("changed")


@pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)
def test_a_folder_that_cannot_be_opened_leaves_nothing_behind(settings: Settings) -> None:
    import threading

    settings.data.mkdir()
    (settings.data / "engram.db").write_bytes(b"this is no database" * 100)
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(EngramError):
            Engine(settings)
    assert threading.active_count() == before


def test_a_closed_engine_lets_its_banks_go(settings: Settings) -> None:
    with Engine(settings) as engine, running(engine):
        make(engine)
        store(engine, rows(ROWS))
        ask(engine, {"vectors": {"v": ROWS[0]}})
        calibrated(engine)
        bank = weakref.ref(engine.resources.live("c").bank)
    del engine
    gc.collect()
    assert bank() is None


def test_training_an_empty_collection_ends(engine: Engine) -> None:
    make(engine)
    operation = engine.train("c", TrainRequest(what="gate"))
    until(lambda: engine.operation(operation.id).status not in ("queued", "running"))
    assert engine.operation(operation.id).status == "done"
    assert engine.collection("c").calibration.state == "none"
