"""Filters: what the bank keeps, what SQL keeps, and a plain reading of the filter's document are the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis import example, given

from service.app.filter_schemas import Filter
from service.bank.filtering import Filtering
from service.storage.database import Database
from service.storage.memories import MemoryWrite
from service.storage.repository import Repository
from service.storage.writer import Writer

Document = dict[str, Any]

NAMES = ["a", "d.e", "é x"]
Scalar = str | int | float
TEXTS = ["", "a", "ab", "abc", "B", "é", "日本", "😀", "\U0010ffff", "\U0010ffffz", "\ud7ff", "true", "1", "a'b\"c\\\n"]
DATES = [
    "2026-11-25", "2026-11-25T00:00:00Z", "2026-11-25t01:00:00+01:00", "2026-11-25T00:00:00.0000001Z",
    "2026-11-25T00:00:00.000001Z", "2026-11-24T23:59:60Z", "2026-11-25 00:00", "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59.999999-23:59", "1969-12-31T23:59:59.5Z", "2026-02-29", "2026-11-25T24:00:00Z", "26-11-25",
    "２０26-11-25",
]  # fmt: skip
NUMBERS = [
    0, -0.0, 1, 1.0, -1, 0.1, 2**53, 2.0**53, 2**53 + 1, 2**63 - 1, 2.0**63, 2**63, 2**64 - 1, -(2**63), 5e-324, 1e308,
    math.nextafter(0.1, 1),
]  # fmt: skip

texts = st.sampled_from(TEXTS + DATES) | st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=3
)
numbers = st.sampled_from(NUMBERS) | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.booleans() | numbers | texts
names = st.sampled_from(NAMES)
values = st.recursive(
    st.none() | scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
payloads = st.none() | st.dictionaries(names, values, max_size=4)
ids = st.sampled_from([f"m{i}" for i in range(8)])

# Drawn by functions, whose names are short: strategies print all that they are made of when a test fails.


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Any], list[Document]]:
    """Payloads, and filters that ask about values that are in them as often as about others."""
    stored = draw(st.lists(payloads, min_size=1, max_size=8))
    there = [value for payload in stored for value in scalars_in(payload)]
    asked = scalars | st.sampled_from(there) if there else scalars
    return stored, draw(st.lists(filters(asked), min_size=1, max_size=6))


def scalars_in(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [found for each in inside for found in ([each] if isinstance(each, Scalar) else scalars_in(each))]


@st.composite
def filters(draw: st.DrawFn, asked: Any, depth: int = 2, least: int = 0) -> Document:
    groups = draw(st.sets(st.sampled_from(["must", "should", "must_not"]), min_size=least))
    return {group: draw(st.lists(conditions(asked, depth), max_size=2)) for group in sorted(groups)}


@st.composite
def conditions(draw: st.DrawFn, asked: Any, depth: int) -> Document:
    kinds = ["match", "any", "except", "range", "range", "exists", "null", "prefix", "ids"]
    kind = draw(st.sampled_from([*kinds, "filter"] if depth else kinds))
    if kind == "filter":
        return draw(filters(asked, depth - 1, least=1))
    if kind == "ids":
        return {"ids": draw(st.lists(ids, max_size=3))}
    path = draw(st.lists(names, min_size=1, max_size=draw(st.sampled_from([1, 1, 1, 2, 3]))))
    key = ".".join(f'"{name}"' if "." in name else name for name in path)
    if kind == "range":
        return {"key": key, "range": draw(bounds(asked))}
    asks = {"match": asked, "prefix": asked.filter(is_text).map(lambda text: text[:2])}
    lists = st.lists(asked, max_size=4)
    return {"key": key, kind: draw(asks.get(kind, lists if kind in ("any", "except") else st.booleans()))}


@st.composite
def bounds(draw: st.DrawFn, asked: Any) -> Document:
    of = draw(st.sampled_from([numbers, asked.filter(is_number), st.sampled_from(DATES[:10])]))
    return {name: draw(of) for name in draw(st.sets(st.sampled_from(["gt", "gte", "lt", "lte"]), min_size=1))}


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- a plain reading --------------------------------------------------------------------------------------------------


def keeps(document: Document, memory_id: str, payload: Any) -> bool:
    must, should, none_of = (document.get(group, []) for group in ("must", "should", "must_not"))
    return (
        all(holds(each, memory_id, payload) for each in must)
        and (not should or any(holds(each, memory_id, payload) for each in should))
        and not any(holds(each, memory_id, payload) for each in none_of)
    )


def holds(condition: Document, memory_id: str, payload: Any) -> bool:
    if "ids" in condition:
        return memory_id in condition["ids"]
    if "key" not in condition:
        return keeps(condition, memory_id, payload)
    path = [name.strip('"') for name in condition["key"].replace('"d.e"', '"d e"').split(".")]
    path = ["d.e" if name == "d e" else name for name in path]
    found, there = [payload], False
    for name in path:
        holders = [each for each in found if isinstance(each, dict) and name in each]
        there = bool(holders)
        found = [v for holder in holders for v in (holder[name] if isinstance(holder[name], list) else [holder[name]])]
    if "exists" in condition:
        return there == condition["exists"]
    if "null" in condition:
        return (None in found) == condition["null"]
    if "match" in condition:
        return any(same(each, condition["match"]) for each in found)
    if "any" in condition:
        return any(same(each, value) for each in found for value in condition["any"])
    if "except" in condition:
        return any(e is not None and not any(same(e, value) for value in condition["except"]) for e in found)
    if "prefix" in condition:
        return any(isinstance(each, str) and each.startswith(condition["prefix"]) for each in found)
    return any(inside(each, condition["range"]) for each in found)


def compared(value: Any) -> Any:
    return float(value) if type(value) is int and not -(2**63) <= value < 2**63 else value


def same(one: Any, other: Any) -> bool:
    kinds = [bool if isinstance(v, bool) else float if isinstance(v, int | float) else type(v) for v in (one, other)]
    return kinds[0] is kinds[1] and bool(compared(one) == compared(other))


def inside(value: Any, bounds: Document) -> bool:
    if isinstance(next(iter(bounds.values())), str):
        value = instant(value) if isinstance(value, str) else None
        bounds = {name: instant(bound) for name, bound in bounds.items()}
    elif isinstance(value, bool) or not isinstance(value, int | float):
        value = None
    if value is None:
        return False
    value, bounds = compared(value), {name: compared(bound) for name, bound in bounds.items()}
    return (
        ("gt" not in bounds or value > bounds["gt"])
        and ("gte" not in bounds or value >= bounds["gte"])
        and ("lt" not in bounds or value < bounds["lt"])
        and ("lte" not in bounds or value <= bounds["lte"])
    )


KNOWN_INSTANTS = {
    "2026-11-25t01:00:00+01:00": datetime(2026, 11, 25),
    "2026-11-25T00:00:00.0000001Z": datetime(2026, 11, 25),
    "2026-11-24T23:59:60Z": datetime(2026, 11, 25),
    "2026-11-25 00:00": datetime(2026, 11, 25),
    "2026-11-25T24:00:00Z": None, "26-11-25": None, "２０26-11-25": None, "2026-02-29": None,
}  # fmt: skip


def instant(text: str) -> timedelta | None:
    """Since the year 1, by the standard library where it reads RFC 3339 right."""
    start = datetime(1, 1, 1, tzinfo=UTC)
    if text in KNOWN_INSTANTS:
        known = KNOWN_INSTANTS[text]
        return None if known is None else known.replace(tzinfo=UTC) - start
    if text not in DATES:
        return None
    moment = datetime.fromisoformat(text)
    offset = moment.utcoffset() or timedelta()
    return moment.replace(tzinfo=UTC) - start - offset


# --- the comparison ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(
    tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[Path], Path | str]
) -> Iterator[Repository]:
    database = Database.open(new_database(tmp_path_factory.mktemp("filters")))
    writer = Writer(database)
    yield Repository(database, writer)
    writer.close()
    database.close()


def just(key: str, **asked: Any) -> Document:
    return {"must": [{"key": key, **asked}]}


@given(case=cases())
@example(case=([{"a": 1}, {"a": True}], [just("a", match=1), just("a", match=True)]))
@example(case=([{"a": [None]}, {"a": [None, 1]}, {"a": []}], [just("a", **{"except": []}), just("a", null=True)]))
@example(
    case=([{"a": 2.0**53}, {"a": 2**53 + 1}], [just("a", range={"gt": 2**53}), just("a", range={"lt": 2**53 + 1})])
)
@example(case=([{"a": 2.0**53}], [just("a", range={"gte": 2**53 - 1, "lte": 2**53 + 1}), just("a", match=2**53 + 1)]))
@example(case=([{"a": 2.0**53 + 4}], [just("a", range={"gt": 2**53 + 3}), just("a", range={"lte": 2**53 + 3})]))
@example(case=([{"a": 2.0**53}], [just("a", range={"gte": 2**53 + 1}), just("a", range={"lt": 2**53 + 1})]))
@example(case=([{"a": "\ud7ffz"}, {"a": "\U0010ffffz"}], [just("a", prefix="\ud7ff"), just("a", prefix="\U0010ffff")]))
def test_bank_and_sql_keep_what_the_filter_says(repository: Repository, case: tuple[list[Any], list[Document]]) -> None:
    stored, asked = case
    names = [f"m{i}" for i in range(len(stored))]
    name = f"c{len(repository.list_collections())}"
    collection = repository.create_collection(name, {})
    repository.put_memories(collection.id, [MemoryWrite(i, payload=p) for i, p in zip(names, stored, strict=True)])
    rows = [None if payload is None else orjson.dumps(payload) for payload in stored]
    bank = Filtering(names, rows)
    for document in asked:
        expected = [keeps(document, i, p) for i, p in zip(names, stored, strict=True)]
        clause = Filter.model_validate(document).clause()
        assert bank.mask(clause, len(rows)).tolist() == expected
        kept = [i for i, keep in zip(names, expected, strict=True) if keep]
        assert [memory.id for memory in repository.scroll(collection.id, clause, 0, 100).memories] == kept
        assert repository.count_where(collection.id, clause)[1] == len(kept)
    repository.delete_where(collection.id, clause)
    assert [m.id for m in repository.scroll(collection.id, None, 0, 100).memories] == [
        i for i in names if i not in kept
    ]
    repository.delete_collection(name)
