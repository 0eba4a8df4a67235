"""Near-duplicates are warned of when they are stored: equal vectors, and encoded memories nearly equal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from service.app.engine import Engine
from service.app.schemas import CollectionConfig, StoreRequest
from service.settings import Settings
from workers.loop import running

D = 16
ROWS = np.random.default_rng(3).standard_normal((40, D)).astype(np.float32)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(Settings(data=tmp_path / "memories")) as opened, running(opened):
        yield opened


def warned(engine: Engine, memories: list[dict[str, Any]]) -> dict[str | None, str]:
    """Memory → whom it is nearly the same as."""
    reply = engine.store("c", StoreRequest(memories=memories))
    assert {result.status for result in reply.results} <= {"stored", "updated"}
    told = {result.id: [w for w in result.warnings if w.startswith("nearly the same")] for result in reply.results}
    return {name: warnings[0].split()[5].rstrip(":") for name, warnings in told.items() if warnings}


def vectors(rows: np.ndarray[Any, Any], prefix: str) -> list[dict[str, Any]]:
    return [{"id": f"{prefix}{i}", "vectors": {"v": row}} for i, row in enumerate(rows)]


@pytest.mark.parametrize("similarity", ["cosine", "dot", "neg_l2"])
def test_equal_vectors_are_warned_of(engine: Engine, similarity: str) -> None:
    engine.create_collection(
        "c", CollectionConfig.model_validate({"spaces": {"v": {"dimension": D, "similarity": similarity}}})
    )
    assert warned(engine, vectors(ROWS[:20], "a")) == {}
    assert warned(engine, vectors(ROWS[[25, 4, 26, 9]], "b")) == {"b1": "a4", "b3": "a9"}
    opposite = [{"id": "c0", "vectors": {"v": -ROWS[5]}}]  # of the same norm, and far away
    assert warned(engine, opposite) == {}


def test_equal_vectors_of_one_request_are_warned_of(engine: Engine) -> None:
    engine.create_collection("c", CollectionConfig.model_validate({"spaces": {"v": {"dimension": D}}}))
    assert warned(engine, vectors(ROWS[[0, 1, 0]], "a")) == {"a0": "a2", "a2": "a0"}


def test_a_memory_stored_again_is_no_duplicate_of_itself(engine: Engine) -> None:
    engine.create_collection("c", CollectionConfig.model_validate({"spaces": {"v": {"dimension": D}}}))
    for _ in range(3):
        assert warned(engine, vectors(ROWS[:5], "a")) == {}
    moved = [{"id": "a0", "vectors": {"v": ROWS[30]}}]
    assert warned(engine, moved) == {}
    assert warned(engine, vectors(ROWS[[0]], "b")) == {}, "what a0 held before is gone"
    engine.delete_memories("c", ["a1"])
    assert warned(engine, vectors(ROWS[[1]], "d")) == {}


def test_memories_of_several_spaces_are_compared_in_those_that_both_bring(engine: Engine) -> None:
    spaces = {"a": {"dimension": D}, "b": {"dimension": D}}
    engine.create_collection("c", CollectionConfig.model_validate({"spaces": spaces}))
    assert warned(engine, [{"id": "m", "vectors": {"a": ROWS[0], "b": ROWS[1]}}]) == {}
    assert warned(engine, [{"id": "n", "vectors": {"a": ROWS[0], "b": ROWS[2]}}]) == {"n": "m"}, "a cue of a alone"
    assert warned(engine, [{"id": "o", "vectors": {"a": ROWS[0]}}])["o"] in ("m", "n")
    assert warned(engine, [{"id": "p", "vectors": {"a": ROWS[0], "b": ROWS[1]}}]) == {"p": "m"}


def picture(seed: int, changed: int = 0) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    pixels[:changed, 0] ^= 1
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"base64": buffer.getvalue()}


def test_pictures_nearly_equal_are_warned_of(engine: Engine) -> None:
    engine.create_collection("c", CollectionConfig.model_validate({"spaces": {"image": {"encoder": "pixels"}}}))
    assert warned(engine, [{"id": f"m{i}", "image": picture(i)} for i in range(5)]) == {}
    again = [{"id": "n", "image": picture(3, changed=8)}, {"id": "o", "image": picture(9)}]
    assert warned(engine, again) == {"n": "m3"}
    twins = [{"id": "x", "image": picture(20)}, {"id": "y", "image": picture(20, changed=8)}]
    assert warned(engine, twins) == {"y": "x"}
    assert warned(engine, twins)["y"] == "x"
    assert warned(engine, twins[:1]) == {"x": "y"}
    assert warned(engine, [{"id": "m3", "image": picture(3)}]) == {"m3": "n"}


def told(engine: Engine, memories: list[dict[str, Any]]) -> dict[str | None, list[str]]:
    """Memory → what it is warned of, or why it was refused."""
    results = engine.store("c", StoreRequest(memories=memories)).results
    return {
        r.id: [f"{r.error.code}: {r.error.detail}"] if r.error else [w for w in r.warnings if "nearly the same" in w]
        for r in results
    }


CAPTIONED = {
    "image": {"encoder": "pixels", "options": {"size": 8}},
    "text": {"encoder": "bridge", "source": "text"},
}


def test_pictures_of_one_caption_are_warned_of_by_the_space_that_does_not_tell_them_apart(engine: Engine) -> None:
    engine.create_collection("c", CollectionConfig.model_validate({"spaces": CAPTIONED}))
    only = "a cue of that alone will not tell the two apart"
    first = told(engine, [
        {"id": "a", "image": picture(1), "text": "by the sea"},
        {"id": "b", "image": picture(2), "text": "by the sea"},
        {"id": "c", "image": picture(1), "text": "a red tractor"},
        {"id": "d", "image": picture(2), "text": "a red tractor"},
        {"id": "e", "image": picture(3), "text": "a bowl of soup"},
    ])  # fmt: skip
    assert first == {
        "a": [],
        "b": [f"nearly the same as memory a in text: {only}"],
        "c": [f"nearly the same as memory a in image: {only}"],
        "d": [f"nearly the same as memory {x} in {space}: {only}" for x, space in (("b", "image"), ("c", "text"))],
        "e": [],
    }
    second = told(engine, [{"id": "f", "image": picture(1), "text": "by the sea"}, {"id": "g", "text": "by the sea"}])
    assert second["f"] == ["nearly the same as memory a: no cue will tell the two apart"]
    assert second["g"][0].split()[5] in ("a:", "b:", "f:"), "all that it brings is another's"
    report = engine.diagnostics("c")
    assert report.spaces["text"].near_duplicates.memories == 6
    assert report.spaces["image"].near_duplicates.memories == 5
    assert report.whole is not None
    assert [set(pair.ids) for pair in report.whole.near_duplicates.pairs] == [{"a", "f"}]


def test_a_photograph_is_taken_once_whatever_its_caption(engine: Engine) -> None:
    config = {"spaces": CAPTIONED, "duplicates": {"refuse": ["image"]}}
    info = engine.create_collection("c", CollectionConfig.model_validate(config))
    assert info.model_dump(mode="json")["duplicates"] == {"refuse": ["image"]}
    first = told(engine, [
        {"id": "a", "image": picture(1), "text": "by the sea"},
        {"id": "b", "image": picture(1, changed=8), "text": "a red tractor"},
        {"id": "c", "image": picture(2), "text": "by the sea"},
        {"id": "d", "text": "by the sea"},
    ])  # fmt: skip
    assert first["b"] == ["duplicate: nearly the same as memory a in image, which this collection refuses"]
    assert [first["a"], first["c"][0].split()[5:8]] == [[], ["a", "in", "text:"]]
    assert not first["d"][0].startswith("duplicate")
    assert engine.count("c").count == 3
    assert told(engine, [{"id": "a", "image": picture(1)}]) == {"a": []}, "no duplicate of itself"
    before = engine.memory("c", "a")
    assert "memory c in image" in told(engine, [{"id": "a", "image": picture(2)}])["a"][0]
    assert engine.memory("c", "a") == before, "what a duplicate would have replaced stays"
    swap = [{"id": "a", "image": picture(5)}, {"id": "e", "image": picture(1)}]
    assert told(engine, swap) == {"a": [], "e": []}, "what the batch replaces is no rival"


@pytest.mark.parametrize("similarity", ["cosine", "neg_l2"])
def test_vectors_nearly_equal_are_refused_where_that_is_asked_for(engine: Engine, similarity: str) -> None:
    spaces = {"v": {"dimension": D, "similarity": similarity}}
    engine.create_collection("c", CollectionConfig.model_validate({"spaces": spaces, "duplicates": "refuse"}))
    assert set(map(len, told(engine, vectors(ROWS[:20], "a")).values())) == {0}
    near = ROWS[[4, 25, 25, 9]] * (1 + 1e-4 * np.random.default_rng(1).standard_normal((4, D)).astype(np.float32))
    answers = told(engine, vectors(near, "b"))
    where = "in every space, which this collection refuses"
    assert answers == {
        "b0": [f"duplicate: nearly the same as memory a4 {where}"],
        "b1": [],
        "b2": [f"duplicate: nearly the same as memory b1 {where}"],
        "b3": [f"duplicate: nearly the same as memory a9 {where}"],
    }
    assert engine.count("c").count == 21
    none = engine.store("c", StoreRequest(memories=vectors(near[:1], "d")))
    assert (none.version, none.results[0].status) == (None, "error")


def test_what_is_the_same_in_some_spaces_is_refused_only_where_these_are_named(engine: Engine) -> None:
    spaces = {"a": {"dimension": D}, "b": {"dimension": D}}
    engine.create_collection("c", CollectionConfig.model_validate({"spaces": spaces, "duplicates": "refuse"}))
    told(engine, [{"id": "m", "vectors": {"a": ROWS[0], "b": ROWS[1]}}])
    answers = told(engine, [
        {"id": "n", "vectors": {"a": ROWS[0], "b": ROWS[2]}},
        {"id": "o", "vectors": {"a": ROWS[3], "b": ROWS[2]}},
        {"id": "p", "vectors": {"a": ROWS[0], "b": ROWS[2]}},
        {"id": "q", "vectors": {"b": ROWS[1]}},
    ])  # fmt: skip
    codes = {name: [what.split()[0] for what in whats] for name, whats in answers.items()}
    assert codes == {"n": ["nearly"], "o": ["nearly"], "p": ["duplicate:"], "q": ["duplicate:"]}


def test_of_copies_stored_at_one_moment_one_is_let_in(engine: Engine) -> None:
    spaces = {"v": {"dimension": D}, "image": {"encoder": "pixels", "options": {"size": 8}}}
    config = {"spaces": spaces, "duplicates": {"refuse": ["v", "image"]}}
    engine.create_collection("c", CollectionConfig.model_validate(config))

    def bring(i: int) -> list[str]:
        both = [{"id": f"v{i}", "vectors": {"v": ROWS[i % 5]}}, {"id": f"p{i}", "image": picture(i % 5)}]
        return [r.error.code if r.error else r.status for r in engine.store("c", StoreRequest(memories=both)).results]

    with ThreadPoolExecutor(8) as pool:
        outcomes = [outcome for both in pool.map(bring, range(40)) for outcome in both]
    assert (outcomes.count("stored"), outcomes.count("duplicate")) == (10, 70)
    assert engine.count("c").count == 10


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"duplicates": "ignore"}, "is warn, refuse or {\"refuse\": [spaces]}, not 'ignore'"),
        ({"duplicates": {"refuse": ["w"]}}, "duplicates names w; the spaces are v"),
        ({"duplicates": {"refuse": []}}, "is warn, refuse or"),
        ({"duplicates": "refuse", "spaces": {"v": {"dimension": D, "similarity": "dot"}}}, "under dot"),
    ],
)
def test_what_cannot_be_refused_is_said_when_the_collection_is_made(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as raised:
        CollectionConfig.model_validate({"spaces": {"v": {"dimension": D}}, **config})
    assert told in str(raised.value)
