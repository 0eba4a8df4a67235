"""Sizing against what is: estimates beside collections that are really stored, and the arithmetic's own rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.app.engine import Engine
from service.app.schemas import CollectionConfig, StoreRequest
from service.app.sizing import Means, estimate
from service.app.sizing_schemas import SizingRequest
from service.settings import Settings

TOLERANCE = 0.15
D = 128


@pytest.fixture
def engine(tmp_path: Path, new_database: Callable[[Path], Path | str]) -> Iterator[Engine]:
    where = new_database(tmp_path)
    url = None if isinstance(where, Path) else where
    with Engine(Settings.model_validate({"data": tmp_path, "database_url": url})) as opened:
        yield opened


def store(engine: Engine, count: int, spaces: dict[str, int], payload: dict[str, Any] | None = None) -> None:
    drawn = np.random.default_rng(0)
    for start in range(0, count, 1_000):
        items = [
            {"vectors": {n: drawn.standard_normal(d).astype(np.float32) for n, d in spaces.items()}, "payload": payload}
            for _ in range(min(1_000, count - start))
        ]
        engine.store("c", StoreRequest.model_validate({"memories": items}))


def make(engine: Engine, spaces: dict[str, int]) -> None:
    config = {"spaces": {name: {"dimension": dimension} for name, dimension in spaces.items()}}
    engine.create_collection("c", CollectionConfig.model_validate(config))


@pytest.mark.full("postgres")
def test_what_is_stored_takes_what_was_estimated(engine: Engine) -> None:
    """20,000 × 128 in SQLite, fewer in PostgreSQL: on disk, and in the bank, scanned and then with a graph."""
    memories = 4_000 if engine.repository.is_postgres else 20_000
    make(engine, {"v": D})
    empty = engine.repository.size_bytes()
    store(engine, 500, {"v": D}, {"kind": "a payload", "number": 17})
    told = engine.size("c", SizingRequest(memories=memories))
    store(engine, memories - 500, {"v": D}, {"kind": "a payload", "number": 17})
    live = engine.resources.live("c")
    assert (told.index, told.graph_from) == ("scan", 62_501)
    assert engine.repository.size_bytes() - empty == pytest.approx(told.disk.bytes, rel=TOLERANCE)
    assert sum(live.bank.sizes().values()) == pytest.approx(told.ram.bytes, rel=TOLERANCE)
    found = engine.diagnostics("c")
    assert found.disk.database == pytest.approx(told.disk.bytes, rel=0.01)
    assert found.disk.whole_database == engine.repository.size_bytes()
    assert (found.device.name, found.device.bytes) == ("cpu", 0)
    if not engine.repository.is_postgres:  # the bank is the same
        live.bank._scan_values_max = 10_000
        assert live.bank.seal()
        told = engine.size("c", SizingRequest(memories=memories))
        assert (told.index, told.graph_from) == ("graph", 79)
        held = live.bank.sizes()
        assert sum(held.values()) == pytest.approx(told.ram.bytes, rel=TOLERANCE)
        assert held["graph"] == pytest.approx(told.ram.parts["graph"], rel=0.01)
        assert held["patterns"] == pytest.approx(told.ram.parts["patterns"], rel=0.02)  # and a new, empty tail


@pytest.mark.parametrize("spaces", [{"image": 1_280, "joint": 768, "text": 384}, {"v": 3_072}], ids=str)
def test_wide_vectors_take_what_was_estimated_on_disk(engine: Engine, spaces: dict[str, int]) -> None:
    make(engine, spaces)
    empty = engine.repository.size_bytes()
    store(engine, 1_000, spaces, {"text": "x" * 300})
    told = engine.size("c", SizingRequest(memories=1_000))
    assert engine.repository.size_bytes() - empty == pytest.approx(told.disk.bytes, rel=TOLERANCE)


def test_what_is_given_takes_the_place_of_what_is_stored(engine: Engine) -> None:
    make(engine, {"v": 4})
    nothing = engine.size("c", SizingRequest(memories=1))
    assert nothing.assumed["id_bytes"] == 36  # a UUID, as an id is made where none is given
    assert nothing.assumed["payload_bytes"] == nothing.disk.parts["originals"] == 0
    asked = SizingRequest(memories=1_000, spaces={"w": 100}, payload_bytes=50, text_bytes=10, image_bytes=5_000)
    told = engine.size("c", asked)
    assert told.spaces == {"w": 100}
    assert told.disk.parts["originals"] == 1_000 * 8_192
    assert told.assumed["payload_bytes"] == 50


SPACES = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 4_096), min_size=1)


@given(st.integers(1, 10**9), SPACES, st.booleans())
def test_more_needs_more_and_the_arithmetic_adds_up(memories: int, spaces: dict[str, int], is_postgres: bool) -> None:
    told = estimate(memories, spaces, Means(), 8_000_000, is_postgres)
    more = estimate(2 * memories, spaces, Means(), 8_000_000, is_postgres)
    for amount in (told.ram, told.disk, told.device):
        assert amount.bytes == pytest.approx(sum(amount.parts.values()), abs=4)
    assert told.disk.bytes >= memories * 4 * sum(spaces.values())
    assert told.ram.bytes >= memories * 4 * sum(spaces.values())
    assert more.disk.bytes > told.disk.bytes
    assert more.ram.parts["ids"] > told.ram.parts["ids"]
    assert more.load_s > told.load_s
    assert (told.index == "graph") == (memories >= told.graph_from)
    assert told.ram_peak_bytes >= told.ram.bytes - 4
    assert told.recall_ms > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"memories": 0}, {"memories": 10**11}, {"memories": 1.5}, {}, {"memories": 1, "spaces": {}},
        {"memories": 1, "spaces": {"v": 0}}, {"memories": 1, "payload_bytes": -1}, {"memories": 1, "nodes": 3},
        {"memories": 1, "image_bytes": float("nan")},
    ],
)  # fmt: skip
def test_what_cannot_be_sized_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SizingRequest.model_validate(wrong)
