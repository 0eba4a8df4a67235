"""API keys against real servers: who is let in, who may do what, how much, and what is counted."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.api.openapi import document
from service.app.access import Caller, Need, check
from service.app.needs import NEEDS
from service.app.operations import OPERATIONS, STREAMS
from service.errors import Forbidden
from service.storage.database import Database
from service.storage.repository import Repository
from service.storage.writer import Writer

Serve = Callable[..., AbstractContextManager[Any]]

ROOT = "the key of the settings"
OPEN = {"livez", "readyz"}
FOLLOWED_S = 5.0  # a change in the database is seen each second


def engram(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engram", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "", **environ})


@pytest.fixture(scope="module")
def keyed(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with a key in its settings, and two collections of two memories."""
    with serve(tmp_path_factory.mktemp("keyed"), ENGRAM_API_KEY=ROOT) as server:
        server.http.headers["authorization"] = f"Bearer {ROOT}"
        for name in ("mine", "theirs"):
            config = {"spaces": {"v": {"dimension": 2}}, "recall": {"beta": 10.0}}
            server.http.put(f"/v1/collections/{name}", json=config).raise_for_status()
            memories = [{"id": "a", "vectors": {"v": [1, 0]}}, {"id": "b", "vectors": {"v": [0, 1]}}]
            server.http.post(f"/v1/collections/{name}/store", json={"memories": memories}).raise_for_status()
        yield server


@pytest.fixture(scope="module")
def plain(keyed: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=keyed.url, timeout=60) as client:
        yield client


@pytest.fixture
def make_key(keyed: Any) -> Callable[..., dict[str, Any]]:
    def make(scopes: dict[str, str], name: str = "web", **fields: Any) -> dict[str, Any]:
        response = keyed.http.post("/v1/keys", json={"name": name, "scopes": scopes, **fields})
        assert response.status_code == 201, response.text
        made: dict[str, Any] = response.json()
        return made

    return make


@pytest.fixture
def ask(keyed: Any, plain: httpx.Client) -> Callable[..., httpx.Response]:
    def send(key: dict[str, Any] | None, method: str, path: str, **sent: Any) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key['key']}"}
        return plain.request(method, path, headers=headers, **sent)

    return send


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


def test_every_route_says_what_it_needs() -> None:
    told = {described["operationId"] for methods in document()["paths"].values() for described in methods.values()}
    assert told == NEEDS.keys() | OPEN
    assert NEEDS.keys() == OPERATIONS.keys() | STREAMS.keys() | {"get_metrics"}


def refused(scopes: dict[str, Any], need: Need, collection: str | None) -> bool:
    try:
        check(Caller("web", scopes), need, collection)
    except Forbidden:
        return True
    return False


SCOPES: list[dict[str, str]] = [
    {"m-gone": "read"}, {"m-gone": "write"}, {"m-gone": "admin"}, {"m-*": "read"}, {"m-*": "write"}, {"m-*": "admin"},
    {"*": "read"}, {"*": "write"}, {"*": "admin"}, {"other": "admin"}, {"*": "write", "m-*": "read"},
    {"m-*": "admin", "m-gone": "read"},
]  # fmt: skip


@pytest.mark.parametrize("scopes", SCOPES, ids=str)
def test_each_scope_allows_what_is_declared_and_nothing_else(scopes: dict[str, Any], make_key: Any, ask: Any) -> None:
    """Every operation of the table, asked of a collection that is not there, with a body that none takes: whoever is
    let through hears of that, and whoever is not is refused before.
    """
    key = make_key(scopes)
    routes = [(route.method, route.path, route.name) for route in (*OPERATIONS.values(), *STREAMS.values())]
    for method, path, name in [*routes, ("GET", "/metrics", "get_metrics")]:
        filled = re.sub(r"\{(\w+)\}", lambda part: "m-gone" if part[1] == "collection" else "gone", path)
        sent = {} if method in ("GET", "DELETE") else {"json": {"no": "such field"}}
        response = ask(key, method, filled, **sent)
        collection = "m-gone" if "{collection}" in path else None
        if refused(scopes, NEEDS[name], collection):
            assert code(response) == (403, "forbidden"), (name, response.text)
        else:
            assert response.status_code in (200, 404, 415, 422), (name, response.text)
            assert response.status_code != 200 or method == "GET", name


def test_without_a_key_nothing_is_answered(ask: Any) -> None:
    for method, path in {(route.method, route.path) for route in (*OPERATIONS.values(), *STREAMS.values())}:
        assert code(ask(None, method, path)) == (401, "unauthorized"), path
    assert code(ask(None, "GET", "/metrics")) == code(ask(None, "GET", "/v1/nothing")) == (401, "unauthorized")


WRITES = [
    ("PUT", "/v1/collections/new", {"spaces": {"v": {"dimension": 2}}}),
    ("POST", "/v1/collections/mine/store", {"memories": [{"vectors": {"v": [1, 1]}}]}),
    ("POST", "/v1/collections/mine/memories/delete", {"ids": ["a"]}),
    ("DELETE", "/v1/collections/mine/memories/a", None),
    ("POST", "/v1/collections/mine/train", {"what": "gate"}),
    ("POST", "/v1/collections/mine/spaces/v/reencode", {}),
    ("DELETE", "/v1/collections/mine", None),
    ("POST", "/v1/keys", {"name": "more", "scopes": {"*": "admin"}}),
]


def test_a_read_key_reads_and_changes_nothing(make_key: Any, ask: Any, keyed: Any) -> None:
    key = make_key({"*": "read"})
    before = keyed.http.get("/v1/collections").json()
    for method, path, body in WRITES:
        assert code(ask(key, method, path, json=body)) == (403, "forbidden"), path
    assert keyed.http.get("/v1/collections").json() == before
    recalled = ask(key, "POST", "/v1/collections/mine/recall", json={"cue": {"vectors": {"v": [1, 0.1]}}})
    assert recalled.json()["results"][0]["matches"][0]["id"] == "a"
    assert ask(key, "POST", "/v1/collections/mine/memories/count").json()["count"] == 2


def test_a_key_sees_its_own_collections_and_their_operations(make_key: Any, ask: Any, keyed: Any) -> None:
    started = {
        name: keyed.http.post(f"/v1/collections/{name}/train", json={"what": "gate"}).json()["id"]
        for name in ("mine", "theirs")
    }
    key = make_key({"mine": "write"})
    assert [one["name"] for one in ask(key, "GET", "/v1/collections").json()["collections"]] == ["mine"]
    assert {one["collection"] for one in ask(key, "GET", "/v1/operations").json()["operations"]} == {"mine"}
    assert ask(key, "GET", f"/v1/operations/{started['mine']}").status_code == 200
    assert code(ask(key, "GET", f"/v1/operations/{started['theirs']}")) == (403, "forbidden")
    for operation in started.values():  # a training: only an admin of the collection ends it
        assert code(ask(key, "DELETE", f"/v1/operations/{operation}")) == (403, "forbidden")
    assert ask(key, "POST", "/v1/collections/mine/store", json={"memories": []}).status_code == 422
    assert code(ask(key, "GET", "/v1/collections/theirs")) == (403, "forbidden")


def test_a_revoked_key_is_refused_at_once_and_an_expired_one_too(make_key: Any, ask: Any, keyed: Any) -> None:
    key = make_key({"*": "read"})
    brief = make_key({"*": "read"}, expires_at=datetime.fromtimestamp(time.time() + 2, UTC).isoformat())
    assert [ask(one, "GET", "/v1/collections").status_code for one in (key, brief)] == [200, 200]
    assert keyed.http.delete(f"/v1/keys/{key['id']}").status_code == 204
    assert code(keyed.http.delete("/v1/keys/gone")) == (404, "key_not_found")
    time.sleep(2)
    unknown = {"key": "engram_" + "x" * 43}
    answers = [ask(one, "GET", "/v1/collections") for one in (key, brief, unknown, None)]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].headers["www-authenticate"] == "Bearer"
    listed = {one["id"]: one for one in keyed.http.get("/v1/keys").json()["keys"]}
    assert listed[key["id"]]["revoked_at"] is not None
    assert all("key" not in one and key["key"] not in str(one) for one in listed.values())


def test_what_another_process_revokes_is_refused_soon(make_key: Any, ask: Any, keyed: Any) -> None:
    key = make_key({"*": "read"})
    database = Database.open(keyed.data / "engram.db")
    writer = Writer(database)
    Repository(database, writer).revoke_key(key["id"], datetime.now(UTC), lambda known: None)
    writer.close()
    database.close()
    deadline = time.monotonic() + FOLLOWED_S
    while ask(key, "GET", "/v1/collections").status_code == 200:
        assert time.monotonic() < deadline, "a revoked key is still let in"
        time.sleep(0.1)


def test_a_key_that_asks_too_much_is_told_when_to_ask_again(make_key: Any, ask: Any) -> None:
    key = make_key({"*": "read"}, rate_limit="3/minute")
    assert [ask(key, "GET", "/v1/collections").status_code for _ in range(3)] == [200] * 3
    refused = ask(key, "GET", "/v1/collections")
    assert code(refused) == (429, "rate_limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert (refused.headers["ratelimit-limit"], refused.headers["ratelimit-remaining"]) == ("3", "0")
    assert refused.headers["ratelimit-reset"] == refused.headers["retry-after"]
    assert ask(make_key({"*": "read"}), "GET", "/v1/collections").status_code == 200


def test_a_key_has_so_many_requests_at_once(make_key: Any, ask: Any) -> None:
    key = make_key({"*": "write"}, concurrent_max=1)
    finish = threading.Event()

    def slowly() -> Iterator[bytes]:
        yield b'{"memories": ['
        finish.wait(30)
        yield b"]}"

    answers: list[httpx.Response] = []
    upload = threading.Thread(
        target=lambda: answers.append(ask(key, "POST", "/v1/collections/mine/store", content=slowly()))
    )
    upload.start()
    deadline = time.monotonic() + 30
    while (refused := ask(key, "GET", "/v1/collections")).status_code == 200:
        assert time.monotonic() < deadline
    assert code(refused) == (429, "rate_limited")
    assert refused.headers["retry-after"] == "1"
    finish.set()
    upload.join()
    assert answers[0].status_code == 422  # no memories, but let in
    assert ask(key, "GET", "/v1/collections").status_code == 200


def test_use_is_counted_by_key(make_key: Any, ask: Any, keyed: Any, plain: httpx.Client) -> None:
    key = make_key({"*": "write"}, name="counted")
    body = {"memories": [{"id": f"c{i}", "vectors": {"v": [1, i]}} for i in range(3)] + [{"id": "bad"}]}
    sent = ask(key, "POST", "/v1/collections/theirs/store", json=body).request
    cues = {"cues": [{"vectors": {"v": [1, 1]}}] * 5}
    sent_too = ask(key, "POST", "/v1/collections/theirs/recall", json=cues).request
    lines = b'{"id": "l1", "vectors": {"v": [1, 7]}}\n{"id": "l2", "vectors": {"v": [1, 8]}}\n'
    kind = {"content-type": "application/x-ndjson", "authorization": f"Bearer {key['key']}"}
    imported = plain.post("/v1/collections/theirs/import", content=lines, headers=kind).request

    def counted() -> dict[str, float]:
        families = text_string_to_metric_families(keyed.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return {one.name: one.value for one in samples if one.labels == {"key": "counted"} and "total" in one.name}

    assert counted() == {
        "engram_key_requests_total": 3, "engram_key_stored_total": 5, "engram_key_recalls_total": 5,
        "engram_key_bytes_in_total": sum(int(one.headers["content-length"]) for one in (sent, sent_too, imported)),
    }  # fmt: skip
    assert code(ask(key, "GET", "/v1/keys")) == (403, "forbidden")
    assert keyed.http.delete(f"/v1/keys/{key['id']}").status_code == 204
    deadline = time.monotonic() + FOLLOWED_S
    while counted():  # a name that is gone takes its lines along
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_folder_gets_its_first_key_and_is_served_beyond_loopback(serve: Serve, tmp_path: Path) -> None:
    data = ("--data", str(tmp_path))
    scoped = engram("keys", "create", "reader", "--scope", "*=read", *data)
    assert (scoped.returncode, "admin_key_needed" in scoped.stderr) == (1, True)
    refused = engram("serve", "--host", "0.0.0.0", "--port", "0", *data)  # over a database without keys
    assert (refused.returncode, "engram keys create" in refused.stderr) == (1, True)
    with serve(tmp_path) as server:
        assert server.http.get("/v1/collections").status_code == 200
        reader = {"name": "reader", "scopes": {"*": "read"}}
        assert code(server.http.post("/v1/keys", json=reader)) == (409, "admin_key_needed")
        made = engram("keys", "create", "admin", "--scope", "*=admin", "--expires", "1d", *data)  # through the server
        assert made.returncode == 0, made.stderr
        key = made.stdout.strip()
        assert re.fullmatch(r"engram_[\w-]{43}", key)
        assert "will not be shown again" in made.stderr
        assert code(server.http.get("/v1/collections")) == (401, "unauthorized")
        assert server.http.get("/livez").status_code == server.http.get("/readyz").status_code == 200
        assert "unauthorized" in engram("keys", "list", *data).stderr
    with serve(tmp_path, ENGRAM_HOST="0.0.0.0") as server:
        assert code(server.http.get("/v1/collections")) == (401, "unauthorized")
        allowed = server.http.get("/v1/collections", headers={"authorization": f"bearer {key}", "host": "its.name"})
        assert allowed.status_code == 200
    listed = engram("keys", "list", *data, COLUMNS="160").stdout  # of the folder, and no server runs
    assert "admin" in listed
    assert "*=admin" in listed
    assert key[:12] in listed
    assert key not in listed
