"""Writes by the engine: what a change encodes again, requests under a key, reads at a version, what has expired."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from sqlalchemy import text

from service.app.engine import Engine
from service.app.fields import AtVersion
from service.app.ids import new_id
from service.app.memory_schemas import CountRequest, PatchRequest
from service.app.patch import merge_patch
from service.app.schemas import CollectionConfig, RecallRequest, StoreReply, StoreRequest
from service.encoders.protocol import Encoded, Picture, Source
from service.errors import (
    Conflict,
    Duplicate,
    IdempotencyKeyReused,
    InvalidRequest,
    MemoryNotFound,
    Unavailable,
    VersionNotReached,
)
from service.settings import Settings
from workers.loop import running

SPACES = {
    "image": {"encoder": "means"}, "text": {"encoder": "means", "source": "text"}, "v": {"dimension": 2},
}  # fmt: skip


class Means:
    """An encoder of mean colours, which counts what it encodes."""

    name = "means"
    fingerprint = "means/1"
    dimension = 3
    takes: frozenset[Source] = frozenset({"image", "text"})

    def __init__(self) -> None:
        self.images = self.texts = 0

    def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
        self.images += len(pictures)
        return Encoded(np.stack([p.pixels.mean((0, 1)) for p in pictures]).astype(np.float32), ((),) * len(pictures))

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        self.texts += len(texts)
        return Encoded(np.array([[len(t), 1, t.count(" ")] for t in texts], np.float32), ((),) * len(texts))


def png(red: int) -> dict[str, bytes]:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 5, 3), (red, 7, 9), dtype=np.uint8)).save(buffer, "PNG")
    return {"base64": buffer.getvalue()}


@pytest.fixture
def means() -> Means:
    return Means()


@pytest.fixture
def engine(tmp_path: Path, means: Means) -> Iterator[Engine]:
    with Engine(Settings(data=tmp_path)) as opened, running(opened):
        opened.resources.make_encoder = lambda name, options: means
        opened.create_collection("c", CollectionConfig.model_validate({"spaces": SPACES}))
        yield opened


def store(engine: Engine, *memories: dict[str, Any], key: str | None = None, name: str = "c") -> StoreReply:
    return engine.store(name, StoreRequest(memories=list(memories), idempotency_key=key))


def patch(engine: Engine, memory_id: str, **changes: Any) -> int:
    return engine.patch("c", memory_id, PatchRequest.model_validate(changes)).version


def watch_patterns(engine: Engine) -> Callable[[], list[str]]:
    """Gives the spaces of the patterns written since it was last asked."""
    database = engine.repository._database
    with database.write() as connection:
        connection.execute(text("CREATE TABLE touched (space TEXT)"))
        for event, row in (("INSERT", "new"), ("UPDATE", "new"), ("DELETE", "old")):
            then = f"BEGIN INSERT INTO touched VALUES ({row}.space); END"
            connection.execute(text(f"CREATE TRIGGER on_{event} AFTER {event} ON patterns {then}"))

    def touched() -> list[str]:
        with database.write() as connection:
            spaces = connection.execute(text("DELETE FROM touched RETURNING space")).scalars()
            return sorted(set(spaces))

    return touched


# --- changes of a part ------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(target=json_values, changes=json_values, more=json_values)
def test_a_merge_patch_is_what_rfc_7396_says(target: Any, changes: Any, more: Any) -> None:
    before = repr((target, changes))
    merged = merge_patch(target, changes)
    assert repr((target, changes)) == before
    assert merge_patch(merged, changes) == merged, "once is enough"
    if not isinstance(changes, dict):
        assert merged == changes
        return
    had = target if isinstance(target, dict) else {}
    for key in {*had, *changes}:
        if key not in changes:
            assert merged[key] == had[key]
        elif changes[key] is None:
            assert key not in merged
        else:
            assert merged[key] == merge_patch(had.get(key), changes[key])
    if isinstance(more, dict) and not {*more} & {*changes}:
        assert merge_patch(merged, more) == merge_patch(merge_patch(target, more), changes), "apart, in any order"


@pytest.mark.parametrize(
    ("target", "changes", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "foo"}, None, None),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_the_examples_of_rfc_7396(target: Any, changes: Any, result: Any) -> None:
    assert merge_patch(target, changes) == result


def test_only_what_changed_is_encoded_again(engine: Engine, means: Means) -> None:
    store(engine, {"id": "a", "image": png(10), "text": "one", "vectors": {"v": [1, 0]}, "payload": {"k": 1}})
    content = engine.content("c", "a")
    written, made = watch_patterns(engine), (means.images, means.texts)

    assert patch(engine, "a", payload={"k": None, "n": {"deep": 1}}) == 2
    assert (means.images, means.texts) == made
    assert written() == []
    (match,) = recalled(engine, {"vectors": {"v": [1, 0]}})
    assert (match["payload"], match["text"]) == ({"n": {"deep": 1}}, "one")

    assert patch(engine, "a", text="a text of another length") == 3
    assert (means.images, means.texts) == (made[0], made[1] + 1)
    assert written() == ["text"]

    assert patch(engine, "a", image=png(200), vectors={"v": [0, 1]}, payload={"x": 1}, payload_mode="replace") == 4
    assert (means.images, means.texts) == (made[0] + 1, made[1] + 1)
    assert written() == ["image", "v"]
    assert engine.content("c", "a") != content
    assert engine.memory("c", "a").payload == {"x": 1}
    (match,) = recalled(engine, {"image": png(200), "vectors": {"v": [0, 1]}})
    assert match["similarity"] == pytest.approx(1, abs=1e-5)


def recalled(engine: Engine, cue: dict[str, Any], **options: Any) -> list[Any]:
    result = engine.recall("c", RecallRequest.model_validate({"cue": cue, **options}))["results"][0]
    return list(result["matches"])


def test_parts_are_removed_but_not_all(engine: Engine) -> None:
    store(engine, {"id": "a", "image": png(10), "text": "one", "vectors": {"v": [1, 0]}, "payload": {"k": 1}})
    patch(engine, "a", text=None, payload=None)
    patch(engine, "a", image=None)
    memory = engine.memory("c", "a")
    assert (memory.text, memory.payload, memory.has_content, memory.spaces) == (None, None, False, ["v"])
    with pytest.raises(InvalidRequest, match="nothing would be left"):
        patch(engine, "a", vectors={"v": None})
    patch(engine, "a", text="again", vectors={"v": None})
    assert engine.memory("c", "a").spaces == ["text"]
    patch(engine, "a", vectors={"v": [1, 1]}, expires_at="2100-01-01T00:00:00Z", payload={"k": 1})
    patch(engine, "a", text=None, payload=None, expires_at=None)
    memory = engine.memory("c", "a")
    assert (memory.text, memory.payload, memory.expires_at, memory.spaces) == (None, None, None, ["v"])
    patch(engine, "a", text="t", vectors={"v": None})
    assert engine.memory("c", "a").spaces == ["text"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "nothing is to be changed"),
    ({"if_version": 3}, "nothing is to be changed"),
    ({"txet": "a"}, "txet"),
    ({"text": "  "}, "no characters"),
    ({"vectors": {"image": [1, 2, 3]}}, "filled by its encoder"),
    ({"vectors": {"image": None}}, "filled by its encoder"),
    ({"vectors": {"w": None}}, "has no space w"),
    ({"vectors": {"v": [1, 2, 3]}}, "takes 2 values"),
    ({"vectors": {"v": "x"}}, "vectors.v"),
    ({"payload": {"k": "x" * 70_000}}, "larger than"),
    ({"payload": {"k": "x" * 40_000}}, "larger than"),  # with what is there
    ({"payload": [1]}, "payload"),
    ({"expires_at": "2020-01-01T00:00:00Z"}, "in the past"),
    ({"expires_at": "2030-01-01"}, "its zone"),
    ({"expires_at": "2030-01-01T00:00:00"}, "its zone"),
    ({"expires_at": 1893456000}, "its zone"),
    ({"image": {"base64": b"no picture"}}, "image"),
]


def test_a_wrong_change_names_what_is_wrong(engine: Engine) -> None:
    store(engine, {"id": "a", "vectors": {"v": [1, 0]}, "payload": {"l": "y" * 40_000}})
    for changes, says in WRONG:
        with pytest.raises((ValidationError, InvalidRequest), match=says):
            patch(engine, "a", **changes)
    assert engine.collection("c").version == 1


def test_changes_of_one_memory_at_one_moment_all_stay(engine: Engine) -> None:
    store(engine, {"id": "a", "vectors": {"v": [1, 0]}})
    threads = [
        threading.Thread(target=patch, args=(engine, "a"), kwargs={"payload": {f"k{n}": n}, **changed})
        for n, changed in enumerate([{"text": "new"}, {"vectors": {"v": [0, 1]}}, {"image": png(9)}, {}, {}, {}])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory = engine.memory("c", "a")
    assert memory.payload == {f"k{n}": n for n in range(6)}
    assert (memory.text, memory.spaces, memory.has_content) == ("new", ["image", "text", "v"], True)


def test_a_change_does_not_bring_in_a_duplicate_that_is_refused(engine: Engine) -> None:
    engine.create_collection("d", CollectionConfig.model_validate({"spaces": SPACES, "duplicates": {"refuse": ["v"]}}))
    store(engine, {"id": "a", "vectors": {"v": [1, 0]}}, {"id": "b", "vectors": {"v": [0, 1]}}, name="d")
    with pytest.raises(Duplicate, match="memory a"):
        engine.patch("d", "b", PatchRequest.model_validate({"vectors": {"v": [2, 0]}}))
    engine.patch("d", "b", PatchRequest.model_validate({"vectors": {"v": [0, 3]}}))
    store(engine, {"id": "a", "vectors": {"v": [1, 0]}}, {"id": "b", "vectors": {"v": [0, 1]}})
    warned = engine.patch("c", "b", PatchRequest.model_validate({"vectors": {"v": [2, 0]}}))
    assert "memory a" in warned.warnings[0]


# --- expiry -----------------------------------------------------------------------------------------------------------


def test_an_expired_memory_is_nowhere_and_is_deleted(engine: Engine) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    store(
        engine, {"id": "v", "vectors": {"v": [1, 0]}, "expires_at": soon},
        {"id": "i", "image": png(50), "expires_at": soon.isoformat()},
        {"id": "later", "vectors": {"v": [1, 1]}, "expires_at": "2100-01-01T00:00:00+02:00"},
        {"id": "stays", "vectors": {"v": [0, 1]}},
    )  # fmt: skip
    patch(engine, "stays", payload={"k": 1}, expires_at=None)
    version = engine.collection("c").version
    assert engine.memory("c", "later").expires_at == "2099-12-31T22:00:00+00:00"
    time.sleep(max(0, (soon - datetime.now(UTC)).total_seconds()) + 0.01)
    assert engine.count("c").count == engine.count("c", CountRequest()).count == engine.collection("c").count == 2
    assert {m["id"] for m in recalled(engine, {"vectors": {"v": [1, 0]}}, support="dense")} == {"later", "stays"}
    assert recalled(engine, {"image": png(50)}) == []
    for ask in (engine.memory, engine.content):
        with pytest.raises(MemoryNotFound):
            ask("c", "i")
    assert engine.diagnostics("c").memories == 2
    again = store(engine, {"id": "v2", "vectors": {"v": [1, 0]}})
    assert again.results[0].warnings == [], "it is near to what is not there any more"
    assert store(engine, {"id": "v", "vectors": {"v": [3, 1]}, "if_version": 0}).results[0].status == "stored"
    engine.expire()
    assert engine.collection("c").version == version + 3
    assert engine.repository.count(engine.resources.live("c").id) == 4
    assert engine.count("c").count == 4
    assert engine.resources.live("c").bank.view().count == 4


def test_housekeeping_deletes_what_has_expired(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.loop.EXPIRE_S", 0.2)
    with running(engine):
        soon = datetime.now(UTC) + timedelta(seconds=0.2)
        store(engine, {"id": "a", "vectors": {"v": [1, 0]}, "expires_at": soon})
        deadline = time.monotonic() + 20
        while engine.repository.count(engine.resources.live("c").id):
            assert time.monotonic() < deadline
            time.sleep(0.05)


# --- reads at a version -----------------------------------------------------------------------------------------------


def test_reads_wait_for_a_version_that_is_committed(engine: Engine) -> None:
    store(engine, {"id": "a", "vectors": {"v": [1, 0]}})
    live = engine.resources.live("c")
    assert engine.count("c", CountRequest(min_version=1)).count == 1
    with pytest.raises(VersionNotReached, match="min_version is 2, and c is at version 1"):
        engine.memory("c", "a", AtVersion(min_version=2))
    # As where another server has written: SQL is ahead of the bank until that follows.
    with engine.repository._database.write() as connection:
        connection.execute(text("UPDATE collections SET version = 2"))
    assert engine.memory("c", "a", AtVersion(min_version=2)).id == "a", "SQL is at its version by itself"
    cue = {"cue": {"vectors": {"v": [1, 0]}}, "min_version": 2}
    with pytest.raises(Unavailable, match="at version 1 here") as late:
        engine.recall("c", RecallRequest.model_validate(cue | {"timeout_s": 0.05}))
    assert late.value.retry_after_s
    following = threading.Timer(0.2, lambda: live.bank.write(None, [], 2))
    following.start()
    assert engine.recall("c", RecallRequest.model_validate(cue))["version"] == 2
    following.join()


# --- under a key ------------------------------------------------------------------------------------------------------


def test_a_request_that_comes_again_is_answered_alike_and_done_once(engine: Engine) -> None:
    memories = [
        {"vectors": {"v": [1, 0]}}, {"image": png(1), "text": "one"}, {"vectors": {"v": [0, 0]}},
        {"id": "w", "vectors": {"v": [2, 0]}, "if_version": 4}, {"vectors": {"v": [1, 0]}},
    ]  # fmt: skip
    first = store(engine, *memories, key="k")
    assert [item.status for item in first.results] == ["stored", "stored", "error", "error", "stored"]
    assert "nearly the same" in first.results[0].warnings[0]
    assert store(engine, *memories, key="k") == first
    with pytest.raises(IdempotencyKeyReused):
        store(engine, *memories[:1], key="k")
    with pytest.raises(IdempotencyKeyReused):
        patch(engine, str(first.results[0].id), payload={"a": 1}, idempotency_key="k")
    assert engine.count("c").count == 3
    changed = patch(engine, str(first.results[0].id), payload={"a": 1}, idempotency_key="p")
    assert patch(engine, str(first.results[0].id), payload={"a": 1}, idempotency_key="p") == changed
    assert engine.collection("c").version == changed


def test_two_requests_under_one_key_at_one_moment_are_one(engine: Engine) -> None:
    memories = [{"vectors": {"v": [n + 1, 1]}} for n in range(5)] + [{"text": f"text {n}"} for n in range(5)]
    replies: list[StoreReply] = []
    threads = [threading.Thread(target=lambda: replies.append(store(engine, *memories, key="once"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [replies[0]] * 4
    assert engine.count("c").count == 10


KILLED = """
import os, signal, sys
from pathlib import Path
from service.app.engine import Engine
from service.app.schemas import CollectionConfig, StoreRequest
from service.settings import Settings

engine = Engine(Settings(data=Path(sys.argv[1])))
spaces = {"image": {"encoder": "pixels", "options": {"size": 4}}, "v": {"dimension": 2}}
engine.create_collection("c", CollectionConfig.model_validate({"spaces": spaces}))
live = engine.resources.live("c")
live.follow = lambda *told: os.kill(os.getpid(), signal.SIGKILL)  # committed, and nobody has been told
memories = [{"vectors": {"v": [1, 2]}}, {"image": {"base64": sys.argv[2]}}]
engine.store("c", StoreRequest(memories=memories, idempotency_key="k"))
"""


def test_killed_between_commit_and_answer_a_request_is_still_done_once(tmp_path: Path) -> None:
    picture = base64.b64encode(png(1)["base64"]).decode()
    child = subprocess.run([sys.executable, "-c", KILLED, tmp_path, picture], check=False, capture_output=True)
    assert child.returncode == -9, child.stderr.decode()
    with Engine(Settings(data=tmp_path)) as engine, running(engine):
        reply = store(engine, {"vectors": {"v": [1, 2]}}, {"image": {"base64": picture}}, key="k")
        assert [item.status for item in reply.results] == ["stored", "stored"]
        assert engine.count("c").count == 2
        assert all(engine.memory("c", str(item.id)) for item in reply.results)


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_an_operation_that_was_cancelled_is_retried_where_it_can_be(engine: Engine) -> None:
    live = engine.resources.live("c")
    other = engine.repository.enqueue("no such kind", live.id, {})
    engine.cancel(other)
    with pytest.raises(Conflict, match="no such kind"):
        engine.retry(other)
    calibrate = engine.repository.enqueue("calibrate", live.id, {"items": 0})
    deadline = time.monotonic() + 30
    while engine.operation(calibrate).status not in ("done", "cancelled"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(Conflict, match="done"):
        engine.retry(calibrate)


def test_ids_that_we_make_are_in_the_order_of_their_making() -> None:
    ids = [new_id() for _ in range(5000)]
    assert ids == sorted(set(ids))
    made = [uuid.UUID(each) for each in ids]
    assert {each.version for each in made} == {7}
    assert {each.variant for each in made} == {uuid.RFC_4122}
    assert abs((made[0].int >> 80) / 1000 - time.time()) < 60
