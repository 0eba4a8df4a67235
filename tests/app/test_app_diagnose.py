"""The diagnostics of collections over a real engine: figures against what was stored on purpose."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.app import diagnose as diagnose_module
from service.app.engine import Engine
from service.app.reports import Diagnostics
from service.app.schemas import CollectionConfig, RecallRequest, StoreRequest
from service.errors import CollectionNotFound
from service.settings import Settings
from workers.loop import running

D = 16


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(Settings(data=tmp_path / "memories")) as opened, running(opened):
        yield opened


def make(engine: Engine, **config: Any) -> None:
    engine.create_collection("c", CollectionConfig.model_validate({"spaces": {"v": {"dimension": D}}, **config}))


def store(engine: Engine, vectors: np.ndarray[Any, Any], space: str = "v", prefix: str = "m") -> None:
    memories = [{"id": f"{prefix}{i}", "vectors": {space: row}} for i, row in enumerate(vectors)]
    for start in range(0, len(memories), 500):
        reply = engine.store("c", StoreRequest(memories=memories[start : start + 500]))
        assert {result.status for result in reply.results} == {"stored"}


def drawn(rows: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((rows, D)).astype(np.float32)


def only(found: Diagnostics) -> Any:
    assert found.spaces["v"].model_copy(update={"index": None}) == found.whole
    return found.spaces["v"]


def test_an_empty_collection_has_figures_for_nothing(engine: Engine) -> None:
    make(engine)
    found = engine.diagnostics("c")
    assert (found.memories, found.sampled, found.whole, found.betas, found.calibration) == (0, 0, None, [], "none")
    assert (found.spaces["v"].memories, found.spaces["v"].margin) == (0, None)
    with pytest.raises(CollectionNotFound):
        engine.diagnostics("other")


def test_a_single_memory_has_no_margin(engine: Engine) -> None:
    make(engine)
    store(engine, drawn(1))
    report = only(engine.diagnostics("c"))
    assert (report.memories, report.margin, report.radius) == (1, None, None)
    assert (report.fixed_points.share, report.capacity.memories) == (1.0, None)


def test_margins_radius_and_rank_are_those_of_the_vectors(engine: Engine) -> None:
    make(engine, recall={"beta": 50.0, "separation": "sparsemax"})
    vectors = drawn(300) @ np.diag([1.0] * 5 + [0.0] * (D - 5)).astype(np.float32)
    store(engine, vectors)
    found = engine.diagnostics("c")
    report = only(found)
    assert found.sampled == found.memories == 300
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -1)
    margins = 1 - cosines.max(1)
    assert report.margin.minimum == pytest.approx(margins.min(), abs=1e-6)
    assert report.margin.share_95 == pytest.approx(np.quantile(margins, 0.05), abs=1e-6)
    assert report.radius == pytest.approx(math.sqrt(2 * margins.min()) / 2, rel=1e-3)
    assert report.fixed_points.share == pytest.approx((margins * 50 >= 1).mean())
    assert report.fixed_points.margin_needed == pytest.approx(1 / 50)
    assert (report.rank.rank, report.rank.relative) == (5, 5 / D)
    assert [(beta.beta, beta.rests_on) for beta in found.betas] == [(50.0, "the configured beta")]


def test_a_sample_stands_for_all_and_says_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    make(engine)
    store(engine, drawn(1_000))
    every = engine.diagnostics("c")
    monkeypatch.setattr(diagnose_module, "WORK_MAX", 400 * 1_000 * D)
    some = engine.diagnostics("c")
    assert (every.sampled, some.sampled, some.memories) == (1_000, 400, 1_000)
    assert some == engine.diagnostics("c").model_copy(update={"seconds": some.seconds})
    assert only(some).margin.minimum >= only(every).margin.minimum
    assert only(some).margin.median == pytest.approx(only(every).margin.median, rel=0.15)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "neg_l2"])
def test_memories_stored_twice_are_named(engine: Engine, similarity: str) -> None:
    make(engine, spaces={"v": {"dimension": D, "similarity": similarity}}, recall={"beta": 1.0})
    vectors = drawn(60)
    store(engine, vectors)
    store(engine, vectors[[7, 30]], prefix="again")
    found = only(engine.diagnostics("c")).near_duplicates
    assert found.memories == 4
    assert {frozenset(pair.ids) for pair in found.pairs} == {frozenset({"m7", "again0"}), frozenset({"m30", "again1"})}
    own = {"cosine": 1.0, "dot": float(vectors[7] @ vectors[7]), "neg_l2": 0.0}[similarity]
    pair = next(pair for pair in found.pairs if "m7" in pair.ids)
    assert pair.similarity == pytest.approx(own, rel=1e-5)


def test_many_near_duplicates_are_counted_and_some_named(engine: Engine) -> None:
    make(engine)
    store(engine, np.repeat(drawn(30), 2, axis=0))
    found = only(engine.diagnostics("c")).near_duplicates
    assert (found.memories, len(found.pairs)) == (60, diagnose_module.PAIRS_MAX)


def test_auto_beta_says_what_it_rests_on(engine: Engine) -> None:
    make(engine, corruptions=[{"kind": "vector_noise", "sigma": 0.2}])
    store(engine, drawn(200))
    live = engine.resources.live("c")
    started = time.monotonic()
    while live.calibration_state() != "current":
        assert time.monotonic() - started < 60
        time.sleep(0.02)
    found = engine.diagnostics("c")
    (beta,) = found.betas
    record = live.records["v"]
    assert (beta.modality, beta.rests_on, beta.margin, beta.cues) == (
        "v", "calibration cues", record.margin, record.cues,
    )  # fmt: skip
    assert found.calibration == "current"
    assert found.drift == 0
    recalled = engine.recall("c", RecallRequest.model_validate({"cue": {"vectors": {"v": drawn(1)[0]}}}))
    assert recalled["results"][0]["recall"]["beta"] == beta.beta
    assert only(found).fixed_points.beta == beta.beta


def test_spaces_are_told_apart_and_the_whole_beside_them(engine: Engine) -> None:
    config = {"spaces": {"a": {"dimension": D}, "b": {"dimension": D, "weight": 3.0}}, "recall": {"beta": 100.0}}
    make(engine, **config)
    a, b = drawn(80), drawn(80, seed=1)
    a[5] = a[6]  # the same key in one space: the other still tells them apart
    memories = [{"id": f"m{i}", "vectors": {"a": a[i]} if i >= 70 else {"a": a[i], "b": b[i]}} for i in range(80)]
    engine.store("c", StoreRequest(memories=memories))
    found = engine.diagnostics("c")
    assert (found.spaces["a"].memories, found.spaces["b"].memories) == (80, 70)
    assert [set(pair.ids) for pair in found.spaces["a"].near_duplicates.pairs] == [{"m5", "m6"}]
    assert found.spaces["b"].near_duplicates.memories == 0
    assert found.whole is not None
    assert found.whole.near_duplicates.memories == 0
    assert found.whole.margin is not None
    assert found.whole.margin.minimum > 0.01
    assert found.spaces["a"].margin is not None
    assert found.spaces["a"].margin.minimum == pytest.approx(0, abs=1e-6)


def test_what_holds_the_memories_is_counted(engine: Engine) -> None:
    make(engine)
    store(engine, drawn(50))
    engine.delete_memories("c", ["m3", "m4"])
    found = engine.diagnostics("c")
    index = only(found).index
    assert (found.memories, index.kind, index.scanned, index.graph, index.graphs) == (48, "scan", 50, 0, 0)
    assert found.bytes == engine.resources.live("c").bank.sizes()
    assert found.bytes_per_memory["patterns"] == pytest.approx(found.bytes["patterns"] / 48)


def test_graphs_are_counted(engine: Engine) -> None:
    make(engine)
    bank = engine.resources.live("c").bank
    bank._scan_values_max = 100 * D
    store(engine, drawn(400))
    deadline = time.monotonic() + 60
    while bank.seal_due() or not any(part.segment.graphs for part in bank.view().parts):
        assert time.monotonic() < deadline
        engine.seal()
        time.sleep(0.02)
    index = only(engine.diagnostics("c")).index
    assert index.graphs >= 1
    assert index.graph + index.scanned == 400
    assert engine.diagnostics("c").bytes["graph"] > 0


def test_default_spaces_are_diagnosed(engine: Engine) -> None:
    engine.create_collection("c", CollectionConfig())
    buffers = []
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC).save(buffer, "PNG")
        buffers.append(buffer.getvalue())
    memories = [{"id": f"p{i}", "image": {"base64": content}} for i, content in enumerate(buffers)]
    memories[0]["text"] = "one of three"
    engine.store("c", StoreRequest(memories=memories))
    found = engine.diagnostics("c")
    assert {name: report.memories for name, report in found.spaces.items()} == {"image": 3, "joint": 3, "text": 1}
    assert found.whole is not None
    assert found.whole.memories == 3


def test_equal_unit_vectors_are_warned_of(engine: Engine) -> None:
    """All have one norm; an exact copy is found among them all the same."""
    rows = np.random.default_rng(11).standard_normal((400, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    engine.create_collection("unit", CollectionConfig.model_validate({"spaces": {"v": {"dimension": 32}}}))
    engine.store("unit", StoreRequest(memories=[{"id": f"m{i}", "vectors": {"v": row}} for i, row in enumerate(rows)]))
    again = [{"id": f"n{i}", "vectors": {"v": rows[i]}} for i in range(0, 400, 40)]
    reply = engine.store("unit", StoreRequest(memories=again))
    for i, item in zip(range(0, 400, 40), reply.results, strict=True):
        assert item.warnings == [f"nearly the same as memory m{i}: no cue will tell the two apart"]
