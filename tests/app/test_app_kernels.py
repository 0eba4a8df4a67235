"""Kernels from a user's side: trained, tried, swapped in, chosen among, retired; and what a recall then says."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from service.app.engine import Engine
from service.app.schemas import CollectionConfig, RecallRequest, StoreRequest, TrainRequest
from service.errors import KernelNotFound, TrainingRefused, UnknownKernel, UnknownSpace
from service.settings import Settings
from workers.loop import running

N, D = 300, 24
RNG = np.random.default_rng(0)
# Memories that share a large direction, as pictures do: plain cosine hardly tells them apart.
CROWDED = (RNG.standard_normal((N, D)) + 6.0 * RNG.standard_normal((1, D))).astype(np.float32)
HALVES = {"spaces": {"v": {"dimension": D}}, "corruptions": [{"kind": "mask", "share": 0.5}]}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(Settings(data=tmp_path / "memories")) as opened, running(opened):
        yield opened


def make(engine: Engine, rows: np.ndarray[Any, Any], **config: Any) -> None:
    engine.create_collection("c", CollectionConfig.model_validate(config or HALVES))
    memories = [{"id": f"m{i}", "vectors": {"v": row}} for i, row in enumerate(rows)]
    engine.store("c", StoreRequest(memories=memories))


def finished(engine: Engine, operation_id: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while (operation := engine.operation(operation_id)).status in ("queued", "running"):
        assert time.monotonic() < deadline, "it did not end"
        time.sleep(0.02)
    return operation


def train(engine: Engine, **request: Any) -> Any:
    asked = {"what": "kernel", "steps_max": 300, "learning_rate": 0.01, **request}
    return finished(engine, engine.train("c", TrainRequest.model_validate(asked)).id)


def ask(engine: Engine, cues: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    reply = engine.recall("c", RecallRequest.model_validate({"cues": cues, "limit": 1, **options}))
    return [dict(result) for result in reply["results"]]


def halves(seed: int) -> list[dict[str, Any]]:
    hidden = np.random.default_rng(seed).random((N, D)).argsort(axis=1) < D // 2
    return [{"vectors": {"v": row}} for row in np.where(hidden, 0, CROWDED).astype(np.float32)]


def share(answers: list[dict[str, Any]]) -> float:
    return sum(a["matches"][0]["id"] == f"m{i}" for i, a in enumerate(answers)) / len(answers)


def firsts(engine: Engine, cues: list[dict[str, Any]], **options: Any) -> list[tuple[str, float]]:
    """The nearest memories before any step: β follows the calibration, and with it where recalls settle."""
    answers = ask(engine, cues, update_steps_max=0, **options)
    return [(a["matches"][0]["id"], a["matches"][0]["similarity"]) for a in answers]


def test_a_kernel_that_finds_more_is_swapped_in_kept_and_retired(engine: Engine, tmp_path: Path) -> None:
    make(engine, CROWDED)
    cues = halves(1)
    before, version = ask(engine, cues), engine.collection("c").version
    found = firsts(engine, cues)
    assert {a["recall"]["compared_by"] for a in before} == {"cosine"}
    operation = train(engine)
    assert operation.status == "done", operation.error
    assert operation.kind == "kernel"
    record = operation.result
    assert record["kept"]
    assert "are found with it that were not, and 0 no longer" in record["why"]
    assert "the kernel itself makes" in record["why"]
    assert record["curve"][0]["step"] == 0
    assert record["curve"][-1]["step"] == record["steps"]
    row = record["trial"][0]
    assert row["corruption"] == "mask (share 0.5)"
    assert set(row["alone"]) == {"own", "kernel", "neg_l2", "observed_neg_l2", "whitening"}
    assert row["chosen"] > row["before"]
    assert row["oracle"] >= row["chosen"]

    info = engine.collection("c")
    assert info.version == version + 1  # a swap is a write
    assert [kernel.id for kernel in info.kernels] == ["v-1"]
    auto, none, named = (ask(engine, cues, kernel=kernel) for kernel in ("auto", "none", "v-1"))
    assert share(auto) > share(before) + 0.2
    assert {a["recall"]["compared_by"] for a in none} == {"cosine"}
    assert firsts(engine, cues, kernel="none") == found
    assert share(named) > share(before)
    assert {a["recall"]["compared_by"] for a in named} == {"kernel"}
    assert all(a["recall"]["kernels"] == ["v-1"] and a["recall"]["probability"] is None for a in named)
    assert all(0 <= a["recall"]["probability"] <= 1 for a in auto)
    # Thresholds of its own: known cues are let in, others are not.
    assert sum(a["verdict"] in ("known", "ambiguous") for a in auto) > 0.85 * N
    strangers = np.random.default_rng(5).standard_normal((N, D)).astype(np.float32)
    unknown = ask(engine, [{"vectors": {"v": row}} for row in strangers])
    assert sum(a["verdict"] == "unknown" for a in unknown) > 0.8 * N
    choice = info.calibration.choices[0]
    assert choice.modality == "v"
    assert choice.chosen >= max(choice.alone.values()) - 0.05

    # One cue by itself, and a dense support, go the same way as the batch.
    alone = engine.recall("c", RecallRequest.model_validate({"cue": cues[7], "limit": 1}))["results"][0]
    assert alone["matches"][0]["id"] == auto[7]["matches"][0]["id"]
    assert alone["recall"]["compared_by"] == auto[7]["recall"]["compared_by"]
    dense = ask(engine, cues, support="dense")
    assert [a["matches"][0]["id"] for a in dense] == [a["matches"][0]["id"] for a in auto]

    engine.retire_kernel("c", "v-1")
    assert engine.collection("c").kernels == []
    assert firsts(engine, cues) == found
    assert engine.kernels("c").kernels[0].status == "retired"
    with pytest.raises(UnknownKernel, match="not v-1"):
        ask(engine, cues[:1], kernel="v-1")
    with pytest.raises(KernelNotFound, match="no kernel v-1"):
        engine.retire_kernel("c", "v-1")


def test_a_kernel_and_its_choices_are_there_again_after_a_restart(tmp_path: Path) -> None:
    cues = halves(1)
    with Engine(Settings(data=tmp_path / "memories")) as engine, running(engine):
        make(engine, CROWDED)
        assert train(engine).result["kept"]
        first = ask(engine, cues)
    with Engine(Settings(data=tmp_path / "memories")) as engine:
        again = ask(engine, cues)
        assert [kernel.id for kernel in engine.collection("c").kernels] == ["v-1"]
    for was, now in zip(first, again, strict=True):
        assert was["matches"][0]["id"] == now["matches"][0]["id"]
        assert was["recall"]["compared_by"] == now["recall"]["compared_by"]
        assert was["verdict"] == now["verdict"]


def test_a_long_memory_and_a_huge_cue_change_nothing_for_the_others(engine: Engine) -> None:
    make(engine, CROWDED)
    assert train(engine).result["kept"]
    cues = halves(1)
    before = share(ask(engine, cues))
    engine.store("c", StoreRequest(memories=[{"id": "long", "vectors": {"v": 1e4 * CROWDED[0]}}]))
    assert share(ask(engine, cues)) > before - 0.02
    huge = {"vectors": {"v": np.full(D, 1e14, dtype=np.float32)}}
    answers = ask(engine, [cues[3], huge, cues[5]])
    assert [a["error"] for a in answers] == [None] * 3
    assert answers[1]["recall"]["compared_by"] == "cosine"
    assert [answers[i]["matches"][0]["id"] for i in (0, 2)] == ["m3", "m5"]


def test_memories_stored_again_during_a_training_are_judged_where_they_are_now(engine: Engine) -> None:
    make(engine, CROWDED)
    started = engine.train(
        "c", TrainRequest.model_validate({"what": "kernel", "steps_max": 400, "learning_rate": 0.01})
    )
    deadline = time.monotonic() + 60
    while engine.operation(started.id).progress < 0.3 and time.monotonic() < deadline:
        time.sleep(0.005)
    memories = [{"id": f"m{i}", "vectors": {"v": row}} for i, row in enumerate(CROWDED)]
    engine.store("c", StoreRequest(memories=memories[::-1]))  # the same ids, at other rows
    result = finished(engine, started.id).result
    assert result["kept"], result["why"]
    assert result["trial"][0]["oracle"] > 0.9


def test_a_beta_of_the_requests_own_means_the_collections_similarity(engine: Engine) -> None:
    make(engine, CROWDED)
    assert train(engine).result["kept"]
    answers = ask(engine, halves(1)[:5], beta=50.0)
    assert {(a["recall"]["compared_by"], a["recall"]["beta"]) for a in answers} == {("cosine", 50.0)}


def test_a_collection_emptied_and_restarted_keeps_its_kernel(tmp_path: Path) -> None:
    with Engine(Settings(data=tmp_path / "memories")) as engine, running(engine):
        make(engine, CROWDED)
        assert train(engine).result["kept"]
        engine.delete_memories("c", [f"m{i}" for i in range(N)])
        finished(engine, engine.train("c", TrainRequest.model_validate({"what": "gate"})).id)
    with Engine(Settings(data=tmp_path / "memories")) as engine:
        assert [kernel.id for kernel in engine.collection("c").kernels] == ["v-1"]


def test_a_retired_kernel_is_gone_after_a_restart_as_well(tmp_path: Path) -> None:
    cues = halves(1)
    with Engine(Settings(data=tmp_path / "memories")) as engine, running(engine):
        make(engine, CROWDED)
        assert train(engine).result["kept"]
        engine.retire_kernel("c", "v-1")
    with Engine(Settings(data=tmp_path / "memories")) as engine:
        assert {a["recall"]["compared_by"] for a in ask(engine, cues)} == {"cosine"}
        assert engine.collection("c").calibration.choices == []


def test_a_kernel_that_finds_no_more_is_dropped_and_changes_nothing(engine: Engine) -> None:
    apart = np.random.default_rng(3).standard_normal((100, 64)).astype(np.float32)
    make(engine, apart, spaces={"v": {"dimension": 64}}, corruptions=[{"kind": "vector_noise", "sigma": 0.1}])
    version = engine.collection("c").version
    operation = train(engine, steps_max=30)
    assert operation.status == "done"
    assert not operation.result["kept"]
    assert operation.result["why"].endswith("no more than chance would have it")
    assert engine.collection("c").version == version
    assert engine.collection("c").kernels == []
    assert engine.kernels("c").kernels[0].status == "dropped"
    assert engine.resources.live("c").bank.view().kernels == {}


@pytest.mark.parametrize("objective", ["separation", "separation_plus"])
def test_the_papers_own_objectives_are_trained_and_tried_alike(engine: Engine, objective: str) -> None:
    make(engine, CROWDED)
    result = train(engine, objective=objective, start="identity").result
    losses = [point["held_out"] for point in result["curve"]]
    assert min(losses) < losses[0]
    assert result["objective"] == objective
    assert result["cues"] == 0


def test_a_cancelled_training_leaves_nothing(engine: Engine) -> None:
    make(engine, CROWDED)
    started = engine.train("c", TrainRequest(what="kernel", steps_max=100_000, time_limit_s=600))
    deadline = time.monotonic() + 60
    while engine.operation(started.id).progress < 0.3 and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.cancel(started.id)
    assert engine.operation(started.id).status == "cancelled"
    time.sleep(1.0)  # the worker notices at its next beat
    assert engine.kernels("c").kernels == []
    assert engine.collection("c").kernels == []
    assert finished(engine, engine.train("c", TrainRequest(what="kernel", steps_max=1)).id).status == "done"


def test_writes_and_recalls_go_on_during_a_training(engine: Engine) -> None:
    make(engine, CROWDED)
    cues = halves(2)
    problems: list[BaseException] = []
    stop = threading.Event()

    def recall() -> None:
        while not stop.is_set():
            try:
                ask(engine, cues[:20])
            except BaseException as problem:
                problems.append(problem)
                return

    reader = threading.Thread(target=recall)
    reader.start()
    started = engine.train("c", TrainRequest(what="kernel", steps_max=200, learning_rate=0.01))
    for i in range(20):
        engine.store("c", StoreRequest(memories=[{"id": f"new{i}", "vectors": {"v": CROWDED[i] + 3.0}}]))
    operation = finished(engine, started.id)
    stop.set()
    reader.join()
    assert operation.status == "done"
    assert not problems
    new = ask(engine, [{"vectors": {"v": CROWDED[i] + 3.0}} for i in range(20)])
    assert [a["matches"][0]["id"] for a in new] == [f"new{i}" for i in range(20)]


def test_masked_pictures_are_compared_by_what_they_show(engine: Engine) -> None:
    """Digits whose left half is missing: their distance over the half that is seen is 0."""
    pictures = load_digits().images[:200]

    def png(values: np.ndarray[Any, Any]) -> bytes:
        file = io.BytesIO()
        Image.fromarray(values.astype(np.uint8)).save(file, "PNG")
        return file.getvalue()

    space = {"encoder": "pixels", "options": {"size": 8, "colour": False, "centre": False}}
    left = {"kind": "missing_side", "side": "left", "share": 0.5}
    engine.create_collection("c", CollectionConfig.model_validate({"spaces": {"v": space}, "corruptions": [left]}))
    memories = [{"id": f"m{i}", "image": {"base64": png(15 * picture)}} for i, picture in enumerate(pictures)]
    engine.store("c", StoreRequest.model_validate({"memories": memories}))
    mask = np.zeros((8, 8))
    mask[:, :4] = 255
    cues = [{"image": {"base64": png(15 * p)}, "mask": {"base64": png(mask)}} for p in pictures]
    plain = share(ask(engine, cues))
    operation = train(engine, steps_max=100)
    assert operation.result["kept"], operation.result["why"]
    answers = ask(engine, cues)
    assert share(answers) > plain
    assert share(answers) > 0.97
    (row,) = operation.result["trial"]
    assert row["alone"]["observed_neg_l2"] > 0.97
    assert row["alone"]["neg_l2"] < 0.9


@pytest.mark.parametrize(
    ("config", "request_", "error", "words"),
    [
        ({}, {"space": "w"}, UnknownSpace, "no space w; it has v"),
        ({}, {"corruptions": [{"kind": "blur", "sigma": 0.1}]}, TrainingRefused, "none of blur applies"),
        (
            {"spaces": {"v": {"dimension": D, "similarity": "neg_l2"}}}, {}, TrainingRefused, "compares by neg_l2",
        ),
        ({"spaces": {"v": {"dimension": 20_000}}}, {}, TrainingRefused, "takes at most 16384"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_at_once(
    engine: Engine, config: dict[str, Any], request_: dict[str, Any], error: type[Exception], words: str
) -> None:
    engine.create_collection("c", CollectionConfig.model_validate(config or HALVES))
    with pytest.raises(error, match=words):
        engine.train("c", TrainRequest.model_validate({"what": "kernel", **request_}))


def test_too_few_memories_are_refused_saying_how_many_are_missing(engine: Engine) -> None:
    make(engine, CROWDED[:7])
    operation = train(engine)
    assert operation.status == "failed"
    assert operation.error.code == "training_refused"
    assert operation.error.detail == "a kernel needs n >= 10 memories that fill the space v, has 7"
