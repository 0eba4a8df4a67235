"""Near-duplicates are warned of when they are stored: equal vectors, and encoded memories nearly equal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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
    assert warned(engine, [{"id": "n", "vectors": {"a": ROWS[0], "b": ROWS[2]}}]) == {}
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
    assert warned(engine, twins) == {"x": "y", "y": "x"}, "each finds the other stored"
    assert warned(engine, [{"id": "m3", "image": picture(3)}]) == {"m3": "n"}
