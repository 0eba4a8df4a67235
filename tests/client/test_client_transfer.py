"""Import and export, one body of tests over HTTP and in process, in every form of rows."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from engram import Client, Collection
from engram.demo.data import png
from engram.transfer import Refusal
from service.errors import InvalidRequest, MalformedBody, NotFound, UnknownSpace

NewName = Callable[[], str]
FORMS = ("ndjson", "parquet", "arrow")
SPACES: dict[str, Any] = {"v": {"dimension": 3}, "w": {"dimension": 2}}
PIXELS = {"image": {"encoder": "pixels", "options": {"size": 16}}}


numbers = st.floats(-1e6, 1e6, width=32).filter(lambda value: value == 0 or abs(value) > 1e-6)
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(str.strip)
ids = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12).filter(lambda x: x[-8:] != "/content")
zones = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
SOON, LATE = datetime.now() + timedelta(days=2), datetime(9999, 12, 30)
payloads = st.dictionaries(
    texts,
    st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | texts, st.lists, max_leaves=4),
)


@st.composite
def memories(draw: st.DrawFn) -> list[dict[str, Any]]:
    made = []
    for id_ in draw(st.lists(ids, min_size=1, max_size=6, unique=True)):
        vectors = {
            name: np.array(draw(st.lists(numbers, min_size=d, max_size=d).filter(any)), dtype=np.float32)
            for name, d in draw(st.sampled_from([{"v": 3}, {"w": 2}, {"v": 3, "w": 2}])).items()
        }
        text, payload = draw(st.none() | texts), draw(st.none() | payloads)
        expires = draw(st.none() | st.datetimes(SOON, LATE, timezones=zones))
        made.append({"id": id_, "vectors": vectors, "text": text, "payload": payload, "expires_at": expires})
    return made


def contents(collection: Collection) -> list[tuple[Any, ...]]:
    """All that an export says of every memory, but for when it was written there."""
    lines = map(json.loads, b"".join(collection.iter_export(content=True)).splitlines()[1:])
    told = ("id", "text", "payload", "vectors", "media_type", "content", "expires_at")
    return [tuple(line[name] for name in told) for line in lines]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_exported_and_imported_is_the_same(
    form: str, client: Client, new_name: NewName, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names: list[str] = []

    def collection() -> Collection:
        names.append(new_name())
        return client.create_collection(names[-1], SPACES)

    @settings(max_examples=settings.default.max_examples // 10 or 1, suppress_health_check=list(HealthCheck))
    @given(memories())
    def holds(made: list[dict[str, Any]]) -> None:
        first, second = collection(), collection()
        imported = first.import_rows(made)
        assert (imported.stored, imported.refused) == (len(made), 0), imported.refusals
        told = contents(first)
        assert [(x[0], x[1], x[2]) for x in told] == [(m["id"], m["text"], m["payload"]) for m in made]
        for (_, _, _, vectors, _, _, expires), memory in zip(told, made, strict=True):
            assert (expires and datetime.fromisoformat(expires)) == memory["expires_at"]
            assert vectors.keys() == memory["vectors"].keys()
            assert all(np.array_equal(np.float32(vectors[s]), memory["vectors"][s]) for s in vectors)
        file = tmp_path_factory.mktemp("rows") / f"rows.{form}"
        assert first.export(file) == file.stat().st_size
        assert second.import_rows(file).stored == len(made)
        assert contents(second) == told

    holds()
    for name in names:
        client.delete_collection(name)


def pictures(count: int) -> list[bytes]:
    blocks = np.random.default_rng(7).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [png(np.asarray(Image.fromarray(each).resize((24, 24)))) for each in blocks]


@pytest.mark.parametrize("form", FORMS)
def test_originals_come_back_byte_for_byte_and_nothing_is_encoded_again(
    form: str, client: Client, new_name: NewName, tmp_path: Path
) -> None:
    collection = client.create_collection(new_name(), PIXELS)
    originals = pictures(4)
    assert not collection.store({"id": f"p{i}", "image": each} for i, each in enumerate(originals)).errors
    collection.export(tmp_path / f"rows.{form}", content=True)

    same = client.create_collection(new_name(), PIXELS)
    imported = same.import_rows(tmp_path / f"rows.{form}")
    assert (imported.stored, imported.encoded) == (4, ())
    assert [same.content(f"p{i}") for i in range(4)] == originals
    assert contents(same) == contents(collection)

    other = client.create_collection(new_name(), {"image": {"encoder": "pixels", "options": {"size": 8}}})
    imported = other.import_rows(tmp_path / f"rows.{form}")
    assert (imported.stored, imported.encoded) == (4, ("image",))
    assert other.recall(image=originals[2]).matches[0].id == "p2"

    without = client.create_collection(new_name(), {"image": {"encoder": "pixels", "options": {"size": 8}}})
    collection.export(tmp_path / f"bare.{form}")
    refused = without.import_rows(tmp_path / f"bare.{form}").refusals
    assert [(each.row, each.id) for each in refused] == [(i + 1, f"p{i}") for i in range(4)]
    assert "fills a space" in refused[0].detail


def rows_of(form: str, rows: list[dict[str, Any]], file: Path) -> Path:
    """Rows with `v` of three numbers, as a file that another program could have written."""
    file = file.with_suffix(f".{form}")
    if form == "ndjson":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file
    columns = {
        "id": pa.array([row.get("id") for row in rows]),
        "vectors.v": pa.array([row.get("vectors", {}).get("v") for row in rows], pa.list_(pa.float64())),
        "payload": pa.array([None if "payload" not in row else json.dumps(row["payload"]) for row in rows]),
        "expires_at": pa.array([row.get("expires_at") for row in rows], pa.string()),
    }
    table = pa.table(columns)
    if form == "parquet":
        pq.write_table(table, file, row_group_size=2)
    else:
        with pa.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return file


@pytest.mark.parametrize("form", FORMS)
def test_bad_rows_are_told_by_their_number_and_the_others_stored(
    form: str, client: Client, new_name: NewName, tmp_path: Path
) -> None:
    rows = [
        {"id": "good", "vectors": {"v": [1, 2, 3]}, "payload": {"a": 1}},
        {"id": "zero", "vectors": {"v": [0, 0, 0]}},
        {"id": "short", "vectors": {"v": [1, 2]}},
        {"id": " spaced", "vectors": {"v": [1, 2, 3]}},
        {"id": "nothing"},
        {"id": "listed", "vectors": {"v": [1, 2, 3]}, "payload": [1]},
        {"id": "huge", "vectors": {"v": [1e39, 2, 3]}},
        {"id": "good", "vectors": {"v": [3, 2, 1]}, "payload": {"a": 2}},
        {"id": "last", "vectors": {"v": [1, 2, 9]}},
        {"id": "past", "vectors": {"v": [1, 2, 3]}, "expires_at": "2020-01-01T00:00:00Z"},
        {"id": "unzoned", "vectors": {"v": [1, 2, 3]}, "expires_at": "2920-01-01T00:00:00"},
    ]
    heard: list[Refusal] = []
    collection = client.create_collection(new_name(), SPACES)
    done = collection.import_rows(rows_of(form, rows, tmp_path / "rows"), refused=heard.append)
    assert (done.rows, done.stored, done.updated, done.refused, done.durable_row) == (11, 2, 1, 8, 11)
    assert [(each.row, each.code) for each in heard] == [
        (2, "invalid_vector"), (3, "wrong_dimension"), (4, "invalid_request"), (5, "invalid_request"),
        (6, "invalid_request"), (7, "invalid_vector"), (10, "invalid_request"), (11, "invalid_request"),
    ]  # fmt: skip
    assert tuple(heard) == done.refusals
    assert collection.get("good").payload == {"a": 2}
    assert collection.recall(vectors={"v": [1, 2, 9]}, limit=1).matches[0].id == "last"


def test_rows_of_texts_and_vectors_keep_their_order_by_id(client: Client, new_name: NewName) -> None:
    """The first is encoded and the second is not; the later must be the one that stays, whichever is quicker."""
    spaces = {
        "text": {"encoder": "pixel_text", "source": "text", "options": {"encoder": "pixels"}},
        "v": {"dimension": 2},
    }
    collection = client.create_collection(new_name(), spaces)
    rows: list[dict[str, Any]] = []
    for i in range(30):
        rows += [{"id": f"a{i % 5}", "text": f"text {i}"}, {"id": f"a{i % 5}", "vectors": {"v": [1, i + 1]}}]
    done = collection.import_rows(rows)
    assert (done.stored, done.updated, done.refused) == (5, 55, 0), done.refusals
    assert [(m.id, m.text, m.spaces) for m in collection.scroll()] == [(f"a{i}", None, ("v",)) for i in range(5)]


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_ids_are_the_same_memories_when_they_are_sent_again(
    form: str, client: Client, new_name: NewName, tmp_path: Path
) -> None:
    file = rows_of(form, [{"vectors": {"v": [1, 2, i]}} for i in range(5)], tmp_path / "rows")
    collection = client.create_collection(new_name(), SPACES)
    assert collection.import_rows(file).stored == 5
    again = collection.import_rows(file, from_row=4)
    assert (again.rows, again.updated, again.durable_row) == (2, 2, 5)
    assert collection.count() == 5
    assert collection.get(next(collection.scroll()).id[:-1] + "4").version == again.version


def test_a_filter_chooses_what_is_exported(client: Client, new_name: NewName) -> None:
    collection = client.create_collection(new_name(), SPACES)
    collection.import_rows({"id": str(i), "vectors": {"v": [1, 1, i]}, "payload": {"n": i}} for i in range(20))
    keep = {"must": [{"key": "n", "range": {"gte": 18}}]}
    lines = b"".join(collection.iter_export(filter=keep, vectors=False)).splitlines()
    assert [json.loads(line)["id"] for line in lines[1:]] == ["18", "19"]
    assert "vectors" not in json.loads(lines[1])
    with pytest.raises(InvalidRequest):
        b"".join(collection.iter_export(filter={"must": 3}))
    with pytest.raises(InvalidRequest):
        collection.export("rows.docx")


def test_other_writers_columns_are_taken(client: Client, new_name: NewName, tmp_path: Path) -> None:
    """Integers as ids, a space's name alone, half precision, bytes of floats; Feather, compressed by default."""
    import pyarrow.feather as feather

    halves = pa.array([[1, 2, 3], [4, 5, 6]], pa.list_(pa.float16(), 3))
    packed = pa.array([np.array([i, 1], dtype="<f4").tobytes() for i in range(2)])
    feather.write_feather(pa.table({"id": [7, 8], "v": halves, "vectors.w": packed}), tmp_path / "rows.feather")
    collection = client.create_collection(new_name(), SPACES)
    assert collection.import_rows(tmp_path / "rows.feather").stored == 2
    told = {x[0]: x[3] for x in contents(collection)}
    assert told == {"7": {"v": [1, 2, 3], "w": [0, 1]}, "8": {"v": [4, 5, 6], "w": [1, 1]}}


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_moments_of_any_unit_are_taken(unit: str, client: Client, new_name: NewName, tmp_path: Path) -> None:
    late = {"s": 2**40, "ms": 2**50, "us": 2**60, "ns": 2**62}[unit]  # beyond the year 9999 where the unit reaches it
    second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    moments = pa.array([4_102_444_800 * second, late, -second, None], pa.timestamp(unit, "Europe/Berlin"))
    vectors = pa.array([[1.0, 2, 3]] * 4)
    pq.write_table(pa.table({"id": list("abcd"), "v": vectors, "expires_at": moments}), tmp_path / "rows.parquet")
    collection = client.create_collection(new_name(), SPACES)
    done = collection.import_rows(tmp_path / "rows.parquet")
    found = {memory.id: memory.expires_at for memory in collection.scroll()}
    assert (found["a"], found["d"]) == ("2100-01-01T00:00:00+00:00", None)
    assert [each.row for each in done.refusals] == ([3] if unit == "ns" else [2, 3])

    unzoned = pa.table({"id": ["e"], "v": vectors[:1], "expires_at": pa.array([0], pa.timestamp(unit))})
    pq.write_table(unzoned, tmp_path / "rows.parquet")
    with pytest.raises(InvalidRequest, match="with their zone"):
        collection.import_rows(tmp_path / "rows.parquet")


def test_a_file_that_is_no_rows_is_refused_whole(client: Client, new_name: NewName, tmp_path: Path) -> None:
    collection = client.create_collection(new_name(), SPACES)

    def refused(name: str, data: bytes, error: type[Exception], words: str) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(error, match=words):
            collection.import_rows(tmp_path / name)

    whole = io.BytesIO()
    pq.write_table(pa.table({"id": ["a"], "vectors.v": pa.array([[1.0, 2, 3]])}), whole)
    refused("a.parquet", whole.getvalue()[:-20], MalformedBody, "not whole")
    refused("b.arrow", b"no rows at all", MalformedBody, "not whole")
    refused("c.ndjson", b"\x89PNG\r\n", MalformedBody, "first line")
    refused("d.txt", b"", InvalidRequest, "ends in none")
    for columns, error, words in (
        ({"id": ["a"], "colour": ["red"]}, InvalidRequest, "colour"),
        ({"id": ["a"], "vectors.q": [[1.0]]}, UnknownSpace, "no space q"),
        ({"id": ["a"], "vectors.v": ["1,2,3"]}, InvalidRequest, "lists of numbers"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "e.parquet")
        with pytest.raises(error, match=words):
            collection.import_rows(tmp_path / "e.parquet")
    with pytest.raises(NotFound):
        collection.import_rows(tmp_path / "none.parquet")
    assert collection.count() == 0


def test_many_memories_are_taken_from_an_iterator(client: Client, new_name: NewName) -> None:
    """More than one part, and pictures among them."""
    picture = pictures(1)[0]
    collection = client.create_collection(new_name(), {**PIXELS, "v": {"dimension": 1024}})
    seen = []

    def memories() -> Iterator[dict[str, Any]]:
        for i in range(3_500):
            yield {"vectors": {"v": np.full(1024, i + 1, dtype=np.float32)}}
        yield {"id": "last", "content": picture}

    done = collection.import_rows(memories(), progress=lambda far: seen.append(far.imported.durable_row))
    assert (done.stored, done.refused) == (3_501, 0)
    assert len(seen) >= 2
    assert seen == sorted(seen)
    assert collection.content("last") == picture
    assert base64.b64decode(contents(collection)[-1][5]) == picture
